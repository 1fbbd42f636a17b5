"""Fixed streams on whole networks: gradients in every bit, what is caught, and how exact the
forward pass is.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import Attention, Linear, Mlp, build, noted, randn, with_dropout
from oracle import weighted
from revnet import Fixed, Reversible, ReversibleError, ReversibleSequence, Step

# Raised inside torch: by a module that its compiler imports, and by the compiler where it traces a
# Function and where it looks at what a graph break hands on.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
    # Advice of inductor for more speed on a GPU.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning"),
]

MODES = ("autocast", "bf16", "float32")
GROWTHS = (1, 4, 16)
FORMATS = (Fixed(), Fixed(16))
FORMAT_IDS = ("24-bits", "16-bits")

EVERY = list(itertools.product(MODES, GROWTHS, FORMATS))
# Each mode with each growth, formats in turn.
HALF = [
    (mode, growth, FORMATS[i % 2])
    for i, (mode, growth) in enumerate(itertools.product(MODES, GROWTHS))
]
CASES = [*((12, *case) for case in EVERY), *((96, *case) for case in HALF)]
ON_CUDA = [*((24, *case) for case in EVERY), *((96, *case) for case in HALF)]
# These take seconds each.
DEEPEST = [(1024, "autocast", 16, Fixed())]
DEEPEST_ON_CUDA = [(1024, mode, 4, fixed) for mode in ("autocast", "bf16") for fixed in FORMATS]

every_format = pytest.mark.parametrize("fixed", FORMATS, ids=FORMAT_IDS)
every_mode = pytest.mark.parametrize("mode", MODES)


def named(cases: list[tuple[int, str, int, Fixed]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [
        pytest.param(
            *case, id=f"L{case[0]}-{case[1]}-x{case[2]}-{case[3].fraction_bits}", marks=marks
        )
        for case in cases
    ]


def decoder(
    depth: int,
    mode: str,
    growth: float = 1.0,
    *,
    width: int = 8,
    rate: float = 0.1,
    device: str = "cpu",
    **options: Any,
) -> tuple[ReversibleSequence, Tensor]:
    """Return attention and MLP branches with dropout, output weights times `growth`, and an
    input.
    """
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    pairs = build(
        [(with_dropout(Attention, rate), with_dropout(Mlp, rate))] * depth, width, dtype=dtype
    )
    with torch.no_grad():
        for branch in itertools.chain.from_iterable(pairs):
            branch.leave.weight.mul_(growth)
    net = ReversibleSequence(pairs, **options).to(device)
    return net, randn(2, 4, width, dtype=dtype).to(device).requires_grad_()


def precision(mode: str, device: str = "cpu") -> Any:
    return torch.autocast(device, torch.bfloat16) if mode == "autocast" else nullcontext()


def step(
    net: Callable[[Tensor], Tensor], x: Tensor, mode: str, parameters: list[Tensor], seed: int = 0
) -> list[Tensor]:
    """Return the output and the gradients of the input and of every parameter."""
    torch.manual_seed(seed)
    with precision(mode, x.device.type):
        out = net(x)
    return [out.detach(), *torch.autograd.grad(weighted(out), [x, *parameters])]


def assert_equal_in_every_bit(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(x.isfinite().all() for x in expected)
    assert all(x.any() for x in expected[:2])
    different = [
        place
        for place, pair in enumerate(zip(actual, expected, strict=True))
        if not torch.equal(*pair)
    ]
    assert not different, (
        f"{len(different)} of {len(expected)} tensors differ, first {different[:3]}"
    )


def stored_and_inverted(
    net: ReversibleSequence, x: Tensor, mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    parameters = list(net.parameters())
    net.execution = "store"
    stored = step(net, x, mode, parameters)
    net.execution = "invert"
    inverted = step(net, x, mode, parameters)
    net.check()
    return stored, inverted


# 1. Gradients


@pytest.mark.parametrize(
    ("depth", "mode", "growth", "fixed"), [*named(CASES), *named(DEEPEST, pytest.mark.slow)]
)
def test_gradients_equal_stored_execution(
    depth: int, mode: str, growth: float, fixed: Fixed
) -> None:
    net, x = decoder(depth, mode, growth, streams=fixed)
    assert_equal_in_every_bit(*stored_and_inverted(net, x, mode)[::-1])


class _Added(torch.autograd.Function):
    """The value after an addition of integers; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, increment: Tensor, after: Tensor) -> Tensor:
        ctx.dtype = increment.dtype
        return after.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad.to(ctx.dtype), None


def integer_loop(net: ReversibleSequence, fixed: Fixed) -> Callable[[Tensor], Tensor]:
    """Return the stored two-stream loop over integers, as anyone would write it, without a line of
    revnet's.
    """
    scale = 2.0**fixed.fraction_bits

    def integers(x: Tensor) -> Tensor:
        return (x.detach().double() * scale).round().to(torch.int64)

    def value(held: Tensor, dtype: torch.dtype) -> Tensor:
        return (held.float() / scale).to(dtype)

    def run(x: Tensor) -> Tensor:
        held = [integers(x), integers(x)]
        values = [_Added.apply(x, x.detach(), value(part, x.dtype)) for part in held]
        for block in net.blocks:
            for target, branch in enumerate((block.f, block.g)):
                out = branch(values[1 - target])
                held[target] = held[target] + integers(out)
                values[target] = _Added.apply(values[target], out, value(held[target], x.dtype))
        return (values[0] + values[1]) / 2

    return run


@every_format
@every_mode
def test_gradients_equal_a_plain_loop_over_integers(mode: str, fixed: Fixed) -> None:
    net, x = decoder(12, mode, 4, streams=fixed)
    parameters = list(net.parameters())
    expected = step(integer_loop(net, fixed), x, mode, parameters)
    assert_equal_in_every_bit(step(net, x, mode, parameters), expected)


@every_mode
def test_float_streams_are_not_exact(mode: str) -> None:
    """What the other tests can tell apart."""
    net, x = decoder(12, mode, 4, streams="float")
    stored, inverted = stored_and_inverted(net, x, mode)
    assert torch.equal(stored[0], inverted[0])
    assert not torch.equal(stored[1], inverted[1])


@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_the_default_is_exact_in_low_precision(mode: str) -> None:
    net, x = decoder(12, mode, 4)
    assert_equal_in_every_bit(*stored_and_inverted(net, x, mode)[::-1])


@pytest.mark.parametrize("execution", ["checkpoint", "select", "offload", ["store", "invert"] * 6])
def test_every_execution_is_exact(execution: Any) -> None:
    net, x = decoder(6, "autocast", 4, streams="fixed", execution="store")
    stored = step(net, x, "autocast", list(net.parameters()))
    net.execution = execution
    assert_equal_in_every_bit(step(net, x, "autocast", list(net.parameters())), stored)


@pytest.mark.slow
def test_branches_compiled_one_by_one_stay_exact() -> None:
    net, x = decoder(2, "autocast", 4, streams="fixed")
    for block in net.blocks:
        block.f.compile()
        block.g.compile()
    assert_equal_in_every_bit(*stored_and_inverted(net, x, "autocast")[::-1])


# 2. The same on CUDA


@pytest.fixture
def deterministic_kernels() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_kernels")
@pytest.mark.parametrize(
    ("depth", "mode", "growth", "fixed"),
    [*named(ON_CUDA), *named(DEEPEST_ON_CUDA, pytest.mark.slow)],
)
def test_gradients_equal_stored_execution_on_cuda(
    depth: int, mode: str, growth: float, fixed: Fixed
) -> None:
    net, x = decoder(depth, mode, growth, width=64, device="cuda", streams=fixed)
    assert_equal_in_every_bit(*stored_and_inverted(net, x, mode)[::-1])


@pytest.mark.gpu
@every_format
@every_mode
def test_streams_come_back_in_every_bit_with_any_kernels_on_cuda(mode: str, fixed: Fixed) -> None:
    net, x = decoder(24, mode, 4, width=64, device="cuda", streams=fixed, determinism_check="exact")
    runs = [step(net, x, mode, list(net.parameters())) for _ in range(3)]
    net.execution = "store"
    stored = [step(net, x, mode, list(net.parameters())) for _ in range(3)]
    noise = max((a - b).abs().max().item() for a, b in zip(stored[0], stored[1], strict=True))
    for run in runs:
        assert torch.equal(run[0], stored[0][0])
        difference = max((a - b).abs().max().item() for a, b in zip(run, stored[2], strict=True))
        assert difference <= 4 * noise


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_kernels")
@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_branches_compiled_one_by_one_stay_exact_on_cuda(mode: str) -> None:
    net, x = decoder(4, mode, 4, width=64, device="cuda", streams="fixed")
    for block in net.blocks:
        block.f.compile()
        block.g.compile()
    assert_equal_in_every_bit(*stored_and_inverted(net, x, mode)[::-1])


# 3. The forward pass


@every_format
@pytest.mark.parametrize("execution", ["store", "invert", "checkpoint"])
def test_a_stream_is_the_sum_of_its_branch_outputs(execution: str, fixed: Fixed) -> None:
    """Up to half a unit for the start and for each addition, however the sequence is executed."""
    depth = 12
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * depth, 8)
    net = ReversibleSequence(pairs, streams=fixed, execution=execution, merge="concat")
    outputs: list[list[Tensor]] = [[], []]
    for block in net.blocks:
        for stream, branch in enumerate((block.f, block.g)):
            branch.register_forward_hook(
                lambda _, __, out, stream=stream: outputs[stream].append(out.detach())
            )
    x = randn(2, 4, 8)
    y = net(x)
    bound = (depth + 1) * 2.0 ** -(fixed.fraction_bits + 1)
    for stream, found in enumerate(y.detach().chunk(2, -1)):
        error = (found - (x + torch.stack(outputs[stream]).sum(0))).abs().max().item()
        # float64 itself rounds at 2^-53 of values of size 10 or so.
        assert error <= bound + 1e-13
        assert fixed.fraction_bits > 16 or error > bound / 100


class Sine(nn.Module):
    """Changes its output by at most `slope` times the largest change of its input."""

    slope = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * (3 * x).sin() / 3


@every_format
def test_distance_from_float32_streams(fixed: Fixed) -> None:
    """With branches of slope a, the largest error e of the streams grows to e + a·e + half a unit
    in each step.
    """
    depth = 24
    x = randn(8, 64, dtype=torch.float32)
    net = ReversibleSequence(
        [(Sine(), Sine()) for _ in range(depth)], streams=fixed, merge="concat"
    )
    error = unit = 2.0 ** -(fixed.fraction_bits + 1)
    # What float32 adds: half a place of a stream below 8 on each side, and the rounding inside the
    # branch.
    rounding = 2 * 8 * 2.0**-24 + 4 * 2.0**-24
    error += rounding
    for _ in range(2 * depth):
        error = error * (1 + Sine.slope) + unit + rounding
    fixed_streams = net(x)
    float_streams = ReversibleSequence(
        [(Sine(), Sine()) for _ in range(depth)], streams="float", merge="concat"
    )(x)
    assert float_streams.abs().max() < 8
    assert (fixed_streams - float_streams).abs().max() <= error


def test_the_default_is_as_near_to_float32_as_float32_is_to_float64() -> None:
    net, x = decoder(24, "float32", 4, rate=0.0, streams="float")
    with torch.no_grad():
        in_float32 = net(x).double()
        exact = copy.deepcopy(net).double()(x.double())
        in_fixed = ReversibleSequence(net.blocks, streams="fixed")(x).double()
    assert (in_fixed - exact).norm() <= 2 * (in_float32 - exact).norm()
    assert (in_fixed - exact).norm() <= 1e-5 * exact.norm()


@every_format
@every_mode
def test_a_model_evaluates_the_same_however_it_is_executed(mode: str, fixed: Fixed) -> None:
    net, x = decoder(6, mode, 4, streams=fixed)
    net.eval()
    found = []
    for execution in ("store", "invert", "checkpoint"):
        net.execution = execution
        with precision(mode):
            found.append(net(x).detach())
            with torch.no_grad():
                found.append(net(x))
            with torch.inference_mode():
                found.append(net(x).clone())
    assert all(torch.equal(found[0], other) for other in found)


class Elementwise(nn.Module):
    """Of operations that autocast leaves alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).tanh()


class OwnPrecision(nn.Linear):
    """A matrix product in float32, whatever surrounds it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x).tanh()


def test_autocast_changes_branches_and_not_streams() -> None:
    """Branches whose outputs do not depend on autocast give the same bits with and without it in
    fixed streams.

    Automatic streams change their format with autocast.
    """
    pairs = [(Elementwise(8), OwnPrecision(8, 8)) for _ in range(6)]
    x = randn(4, 8, dtype=torch.float32)
    for streams, same in (("fixed", True), (Fixed(16), True), ("float", True), ("auto", False)):
        net = ReversibleSequence(pairs, streams=streams)
        without = net(x)
        with precision("autocast"):
            assert torch.equal(net(x), without) == same


def test_autocast_is_evaluated_with_the_rounding_of_its_branches_alone() -> None:
    """What differs with autocast is each branch's output for the same input, not how outputs are
    summed.
    """
    net, x = decoder(4, "autocast", rate=0.0, streams="fixed")
    net.eval()
    with precision("autocast"):
        cast = net(x)
    without = net(x)
    assert not torch.equal(cast, without)
    assert torch.equal(without, integer_loop(net, Fixed())(x))
    with precision("autocast"):
        assert torch.equal(cast, integer_loop(net, Fixed())(x))


# 4. Training


@pytest.mark.slow
def test_two_hundred_steps_on_digits_give_the_same_losses() -> None:
    pytest.importorskip("sklearn")
    from revnet.app.data import digits, step_batch
    from revnet.app.model import Shape, Transformer, bits_per_token

    data = digits.load()
    shape = Shape(depth=3, width=16, heads=2, dropout=0.1, **data.shape)
    losses: dict[str, list[float]] = {}
    for execution in ("store", "invert"):
        torch.manual_seed(0)
        model = Transformer(shape, execution=execution)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[execution] = []
        for number in range(200):
            prefix, tokens = (torch.from_numpy(part) for part in step_batch(data, number, 2, 0))
            with torch.autocast("cpu", torch.bfloat16):
                loss = bits_per_token(model, prefix, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[execution].append(loss.item())
    assert losses["invert"] == losses["store"]
    assert sum(losses["store"][-20:]) < 0.8 * sum(losses["store"][:20])


# 5. What leaves the range


class Bad(nn.Module):
    """One number of its output is `value`, the others are zero."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[0, 3] = self.value
        return out


class Ahead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def breaking(value: float, streams: Any = "fixed") -> tuple[ReversibleSequence, Tensor]:
    blocks = [(Ahead(), Ahead()), (Ahead(), Bad(value))]
    return ReversibleSequence(blocks, streams=streams, merge="concat"), randn(
        2, 8, dtype=torch.float32
    )


BAD = [
    (40_000.0, r"block 1, branch g: .*largest value was 4000\d.*Fixed\(fraction_bits=23\)"),
    (-1e9, r"block 1, branch g: .*largest value was 1e\+09.*Fixed\(fraction_bits=9\)"),
    (1e30, "block 1, branch g: .*largest value was 1e\\+30.*Look for the cause"),
    (math.inf, "block 1, branch g: .*largest value was inf.*Look for the cause"),
    (math.nan, "block 1, branch g: .*largest value was nan.*Look for the cause"),
]
every_bad = pytest.mark.parametrize(
    ("value", "message"), BAD, ids=["40000", "-1e9", "1e30", "inf", "nan"]
)


def assert_nan_in_one_place(y: Tensor) -> None:
    assert y.isnan().nonzero().tolist() == [[0, 8 + 3]]


@every_bad
@pytest.mark.parametrize("how", ["train", "eval", "no_grad", "inference"])
def test_what_leaves_the_range_is_nan_and_named(how: str, value: float, message: str) -> None:
    net, x = breaking(value)
    net.train(how == "train")
    around = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(how, nullcontext)
    with around():
        assert_nan_in_one_place(net(x))
        with pytest.raises(ReversibleError, match=message):
            net.check()
        net.check()
        assert_nan_in_one_place(net(x))
        with pytest.raises(ReversibleError, match=message):
            net(x)
        # The news is told once: the caller may go on, and is told again when it happens again.
        net.blocks[1].g.value = 1.0
        assert net(x).isfinite().all()
        net.check()


def test_the_fraction_bits_of_the_message_fit() -> None:
    for value, bits in ((40_000.0, 23), (-1e9, 9)):
        net, x = breaking(value, Fixed(bits))
        assert net(x).isfinite().all()
        net.check()


def test_an_input_out_of_range_is_named() -> None:
    net, x = breaking(0.0)
    x[1, 2] = 50_000
    assert net(x)[1].isnan().any()
    with pytest.raises(ReversibleError, match=r"the input: .*50000.*fraction_bits=23"):
        net.check()


def test_sums_do_not_wrap_around() -> None:
    net = ReversibleSequence(
        [(Ahead(), Bad(20_000.0)) for _ in range(2)], streams="fixed", merge="concat"
    )
    x = torch.zeros(2, 8)
    assert_nan_in_one_place(net(x))
    with pytest.raises(ReversibleError, match=r"block 1, branch g: .*40000"):
        net.check()


def test_gradients_of_what_left_the_range_are_not_silent() -> None:
    net, x = breaking(math.inf)
    loss = net(x.requires_grad_()).sum()
    assert loss.isnan()
    with pytest.raises(ReversibleError):
        net.check()


def test_the_fixed_streams_of_auto_are_watched_too() -> None:
    net, x = breaking(1e20, "auto")
    with precision("autocast"):
        assert_nan_in_one_place(net(x))
    with pytest.raises(ReversibleError, match=r"block 1, branch g: .*1e\+20"):
        net.check()


@every_bad
def test_what_leaves_the_range_in_a_compiled_model_around_the_engine(
    value: float, message: str
) -> None:
    """Dropout makes the graph break, and the engine runs between its parts."""
    net, x = breaking(value)
    net.blocks[0].f = nn.Sequential(Ahead(), nn.Dropout(0.1))
    compiled = torch.compile(net, backend="aot_eager")
    assert_nan_in_one_place(compiled(x))
    with pytest.raises(ReversibleError, match=message):
        net.check()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_what_leaves_the_range_in_one_graph_is_named(grad: bool) -> None:
    net, x = breaking(40_000.0)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            assert_nan_in_one_place(compiled(x))
        with pytest.raises(
            ReversibleError, match=r"block 1, branch g: .*largest value was (40000|39999)"
        ):
            net.check()
    net.blocks[1].g.value = 1.0
    with torch.set_grad_enabled(grad):
        compiled(x)
    net.check()


def test_what_leaves_the_range_under_a_transform_is_named() -> None:
    net, x = breaking(math.inf)
    torch.func.grad(lambda x: net(x).nansum())(x)
    with pytest.raises(ReversibleError, match=r"block 1, branch g: .*largest value was inf"):
        net.check()


class Small(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), size))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.sin()


def test_outputs_that_vanish_are_warned_of() -> None:
    pairs = [(Small(1e-6), Small(1.0))]
    x = randn(16, 8, dtype=torch.float32)
    net = ReversibleSequence(pairs, streams=Fixed(16), merge="concat")
    assert torch.equal(net(x)[:, :8], (x * 2**16).round() / 2**16)
    with pytest.warns(
        UserWarning, match=r"block 0, branch f: \d+% of its nonzero outputs .*fraction_bits=37"
    ):
        net.check()
    net.check()
    wanted = 1e-6 * x.double().sin()
    for streams, lost in (("fixed", 0.04), (Fixed(37), 1e-5)):
        finer = ReversibleSequence(pairs, streams=streams, merge="concat")
        change = (finer(x.double())[:, :8] - x.double()).detach()
        assert (change - wanted).norm() < lost * wanted.norm()
        finer.check()


@pytest.mark.parametrize("outer", ["the next call", "a model's next call", "check"])
def test_the_warning_points_at_the_line_that_called_the_library(outer: str) -> None:
    net = ReversibleSequence([(Small(1e-6), Small(1.0))], streams=Fixed(16))
    x = randn(16, 8, dtype=torch.float32)
    net(x)
    model = nn.Sequential(net)
    call = {
        "the next call": lambda: net(x),
        "a model's next call": lambda: model(x),
        "check": net.check,
    }[outer]
    with pytest.warns(UserWarning, match="block 0, branch f") as found:
        call()
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize(
    ("bits", "size", "lost"),
    [(16, 1e-4, 0.044), (16, 1e-6, 1.0), (24, 1e-4, 1.7e-4), (24, 1e-6, 0.017)],
)
def test_what_fraction_bits_lose(bits: int, size: float, lost: float) -> None:
    increment = size * randn(100_000)
    value = (
        Fixed(bits)
        .add(Fixed(bits).encode(torch.zeros(100_000, dtype=torch.float64)), increment)
        .value
    )
    assert ((value - increment).norm() / increment.norm()).item() == pytest.approx(lost, rel=0.05)


# 6. Branches that do not repeat


class PythonRandom(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() * (0.5 + random.random())


class NumPyRandom(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() * (0.5 + np.random.rand())


class OwnGenerator(Linear):
    """Its randomness is an attribute's, which a replay finds as it was before the call."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() * torch.rand(x.shape, generator=self.generator)


class Counting(Linear):
    """Its output depends on how often it was called, which is known outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        noted(self).append(x.shape)
        return super().forward(x).tanh() * (1 + 0.1 * len(noted(self)))


class CountingInBuffer(Linear):
    """The same by a buffer, which a replay finds as it was before the call."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x).tanh() * (1 + 0.1 * self.calls)


def with_one_branch(branch: type[nn.Module], **options: Any) -> tuple[ReversibleSequence, Tensor]:
    pairs = build([(Mlp, Linear), (Mlp, branch), (Linear, Mlp)], 8, dtype=torch.float32)
    net = ReversibleSequence(pairs, determinism_check="exact", **options)
    return net, randn(4, 8, dtype=torch.float32, requires_grad=True)


@pytest.mark.parametrize("execution", ["invert", "select", "checkpoint", "offload"])
@pytest.mark.parametrize("branch", [PythonRandom, NumPyRandom, Counting])
def test_the_exact_check_finds_what_is_not_repeated(
    branch: type[nn.Module], execution: str
) -> None:
    for streams in ("fixed", Fixed(16)):
        net, x = with_one_branch(branch, streams=streams, execution=execution)
        loss = weighted(net(x))
        with pytest.raises(ReversibleError, match="block 1, branch g is not deterministic"):
            loss.backward()


@pytest.mark.parametrize("execution", ["checkpoint", "offload"])
@pytest.mark.parametrize("branch", [PythonRandom, NumPyRandom, Counting])
def test_the_exact_check_finds_it_in_float_streams_where_the_input_is_kept(
    branch: type[nn.Module], execution: str
) -> None:
    net, x = with_one_branch(branch, streams="float", execution=execution)
    loss = weighted(net(x))
    with pytest.raises(ReversibleError, match="block 1, branch g is not deterministic"):
        loss.backward()


@pytest.mark.parametrize("streams", ["fixed", "float"])
@pytest.mark.parametrize("execution", ["invert", "select", "checkpoint", "offload", "store"])
def test_the_exact_check_accepts_what_is_repeated(execution: str, streams: str) -> None:
    for branch in (CountingInBuffer, Mlp, with_dropout(Mlp), OwnGenerator):
        net, x = with_one_branch(branch, streams=streams, execution=execution)
        weighted(net(x)).backward()
        assert x.grad is not None


def test_the_exact_check_accepts_an_input_that_was_undone_two_steps_above() -> None:
    """In float streams, which then differ in their last digits."""
    branches = [Mlp(8).float() for _ in range(3)]
    steps = [
        Step(branch, target, source)
        for branch, target, source in zip(branches, (0, 2, 1), (1, 0, 2), strict=True)
    ]
    execution = ["checkpoint", "invert", "invert"]
    net = Reversible(steps, streams="float", execution=execution, determinism_check="exact")
    streams = [(10.0**i * randn(64, 8, dtype=torch.float32)).requires_grad_() for i in range(3)]
    weighted(*net(*streams)).backward()
    assert all(x.grad is not None for x in streams)


def test_a_buffer_that_counts_keeps_gradients_exact() -> None:
    found = []
    for execution in ("store", "invert"):
        net, x = with_one_branch(CountingInBuffer, streams="fixed", execution=execution)
        parameters = list(net.parameters())
        found.append([step(net, x, "float32", parameters) for _ in range(2)])
        assert net.blocks[1].g.calls == 2
    for stored, inverted in zip(*found, strict=True):
        assert_equal_in_every_bit(inverted, stored)


# 7. What a user reads


@pytest.mark.parametrize(
    ("streams", "text"),
    [
        ("auto", "streams='auto' (Fixed(fraction_bits=24) in low precision, else Float())"),
        ("fixed", "streams=Fixed(fraction_bits=24)"),
        (Fixed(16), "streams=Fixed(fraction_bits=16)"),
        ("float", "streams=Float()"),
    ],
)
def test_the_format_is_in_the_repr(streams: Any, text: str) -> None:
    assert text in repr(ReversibleSequence([(Ahead(), Ahead())], streams=streams))
