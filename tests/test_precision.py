"""Products of float32 in TF32 or bfloat16: `streams="auto"` then holds streams as integers."""

from __future__ import annotations

import copy
import gc
import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import cases
from cases import Mlp, build, randn
from oracle import weighted
from revnet import (
    Momentum,
    Reversible,
    ReversibleBlock,
    ReversibleCycle,
    ReversibleSequence,
    Step,
    _precision,
    integrate,
)

pytestmark = cases.COMPILER_WARNINGS


EVERY = {f"{a}_{b}" for a, b in itertools.product(("cuda", "cpu"), ("matmul", "conv", "rnn"))}
PRODUCTS = {"cuda_matmul", "cuda_conv", "cuda_rnn"}

# What a user may write, and what is low then.
SETTINGS = {
    "pass": {"cuda_conv", "cuda_rnn"},
    "backends.cuda.matmul.allow_tf32 = True": PRODUCTS,
    "set_float32_matmul_precision('high')": {*PRODUCTS, "cpu_matmul"},
    "set_float32_matmul_precision('medium')": {*PRODUCTS, "cpu_matmul"},
    "backends.cuda.matmul.fp32_precision = 'tf32'": PRODUCTS,
    "backends.fp32_precision = 'tf32'": EVERY,
    "backends.fp32_precision = 'ieee'": set(),
    "backends.cudnn.allow_tf32 = False": set(),
    "backends.cudnn.fp32_precision = 'ieee'": set(),
    "backends.cudnn.conv.fp32_precision = 'ieee'": {"cuda_rnn"},
    "backends.mkldnn.matmul.fp32_precision = 'bf16'": {"cuda_conv", "cuda_rnn", "cpu_matmul"},
    "backends.mkldnn.conv.fp32_precision = 'bf16'": {"cuda_conv", "cuda_rnn", "cpu_conv"},
    # Of both interfaces: torch then refuses to read the older one.
    "set_float32_matmul_precision('medium'); backends.cuda.matmul.fp32_precision = 'ieee'": {
        "cuda_conv",
        "cuda_rnn",
        "cpu_matmul",
    },
}

# A setting that was written once never is the default again: each is tried in a process of its own.
READ = """
import os, sys, warnings
from torch import backends, set_float32_matmul_precision
from revnet import _precision
warnings.simplefilter("error")
for setting in sys.argv[2:]:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        exec(setting)
        print(*(name for name in sys.argv[1].split() if getattr(_precision, name)))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_the_settings_of_torch_are_read() -> None:
    command = [sys.executable, "-c", READ, " ".join(EVERY), *SETTINGS]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert dict(zip(SETTINGS, map(set, map(str.split, found)), strict=True)) == SETTINGS


def test_what_has_no_setting_is_no_attribute() -> None:
    for name in ("mps_matmul", "cuda_linear", "matmul"):
        with pytest.raises(AttributeError, match=name):
            getattr(_precision, name)


@pytest.fixture(autouse=True)
def settings_of_the_cpu() -> Iterator[None]:
    yield
    for operation in ("matmul", "conv", "rnn"):
        lower(operation, "none")


def lower(operation: str, precision: str = "bf16") -> None:
    """Allow low precision on the CPU: where that cannot compute so, the setting still holds."""
    getattr(torch.backends.mkldnn, operation).fp32_precision = precision


# What comes of it


class Convolved(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.convolve = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.convolve(self.norm(x)))


class Rounded(Convolved):
    """A convolution that reads its input with the ten bits of TF32, as tensor cores do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        # To the nearest: half of the last bit that stays is added, and thirteen are cut off.
        cut = ((x.detach().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)
        return F.gelu(self.convolve(x + (cut - x.detach())))


def convolutions(
    streams: Any, branch: Any = Rounded, shape: tuple[int, ...] = (2, 8, 6, 6), device: str = "cpu"
) -> tuple[ReversibleSequence, Tensor]:
    pairs = build([(branch, branch)] * 12, shape[1], dtype=torch.float32)
    with torch.no_grad():
        for each in itertools.chain.from_iterable(pairs):
            each.convolve.weight.mul_(4)  # as training makes them grow
    net = ReversibleSequence(pairs, streams=streams).to(device)
    return net, randn(*shape, dtype=torch.float32).to(device)


def distance(net: nn.Module, x: Tensor) -> tuple[float, bool]:
    """Return how far the gradients are from those of stored execution, and if none differs."""
    found = []
    for execution in ("store", "invert"):
        net.execution = execution
        leaf = x.detach().requires_grad_()
        loss = weighted(net(leaf))
        found.append(torch.autograd.grad(loss, [leaf, *net.parameters()]))
    stored, inverted = (torch.cat([grad.flatten() for grad in grads]) for grads in found)
    error = (inverted.double() - stored.double()).norm() / stored.double().norm()
    return error.item(), torch.equal(inverted, stored)


def test_rounded_inputs_make_gradients_of_float_streams_wrong() -> None:
    error, equal = distance(*convolutions("float"))
    assert error > 1e-3
    assert not equal
    # It is the rounding of inputs that does it.
    assert distance(*convolutions("float", Convolved))[0] < 1e-4
    assert distance(*convolutions("fixed")) == (0.0, True)


def test_auto_is_right_where_inputs_are_rounded() -> None:
    assert distance(*convolutions("auto"))[0] > 1e-3
    lower("conv")
    assert distance(*convolutions("auto")) == (0.0, True)


# Which networks it concerns


def format_of(net: Any, *given: Any) -> str:
    """Return the streams that a call has, by the bits of its outputs."""
    run = net.run if isinstance(net, ReversibleSequence) and len(given) > 1 else net
    before = net.streams
    outputs = {}
    for net.streams in ("float", "fixed", before):
        out = run(*given)
        outputs[net.streams] = out if isinstance(out, tuple) else (out,)
    (floats, fixed, found) = outputs.values()
    equal = [all(map(torch.equal, found, each)) for each in (floats, fixed)]
    assert sum(equal) == 1
    return ("float", "fixed")[equal.index(True)]


class Functional(nn.Module):
    """A convolution without a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Outputs half as large as inputs, whatever the width: fixed streams have a range.
        self.weight = nn.Parameter(torch.randn(width, width, 3) / (12 * width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=1)


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Holds(nn.Module):
    """A branch that finds its layer in a function that an attribute holds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.functions = [lambda x: layer(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.functions[0](x.float()).to(x.dtype)


def scripted(width: int) -> nn.Module:
    return torch.jit.script(nn.Conv1d(width, width, 3, padding=1))


def nested(width: int) -> nn.Module:
    return ReversibleSequence([(nn.Conv1d(width, width, 1), nn.Tanh())])


def convolution(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.Tanh())


class Blurred(nn.Module):
    """A convolution with a frozen kernel, between linear layers, that is no parameter."""

    def __init__(self, width: int, keep: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.kernel: Any
        keep(self, torch.randn(width, width, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel if isinstance(self.kernel, Tensor) else self.kernel["blur"][0]
        return F.conv1d(self.linear(x), kernel.to(x.dtype), padding=1)


def blurred(keep: Callable[[nn.Module, Tensor], None]) -> Callable[[int], nn.Module]:
    return lambda width: Blurred(width, keep)


class Masked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(1, width, width, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).masked_fill(~self.mask, 0)


WIDTH = 8
BRANCHES: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "linear": (lambda width: nn.Linear(width, width), "matmul"),
    "mlp": (Mlp, "matmul"),
    "attention": (cases.Attention, "matmul"),
    "convolution": (convolution, "conv"),
    "transposed": (lambda width: nn.ConvTranspose1d(width, width, 3, padding=1), "conv"),
    "lazy": (lambda width: nn.LazyConv1d(width, 1), "conv"),
    "functional": (Functional, "conv"),
    "scripted": (scripted, "conv"),
    "nested": (nested, "conv"),
    "held": (lambda width: Holds(nn.Conv1d(width, width, 1)), "conv"),
    "recurrent": (Recurrent, "rnn"),
    "scripted-recurrent": (lambda width: torch.jit.script(Recurrent(width)), "rnn"),
    "buffer": (blurred(lambda module, kernel: module.register_buffer("kernel", kernel)), "conv"),
    "mask": (Masked, "matmul"),
}


def sequence(branch: Callable[[int], nn.Module], **options: Any) -> ReversibleSequence:
    return ReversibleSequence([(branch(WIDTH), branch(WIDTH)) for _ in range(2)], **options)


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("operation", ["matmul", "conv", "rnn"])
def test_auto_is_fixed_where_the_products_of_branches_are_low(name: str, operation: str) -> None:
    branch, own = BRANCHES[name]
    net, x = sequence(branch), torch.randn(2, WIDTH, WIDTH)
    net(x)  # so that none is lazy any more
    assert format_of(net, x) == "float"
    lower(operation)
    # Any branch may multiply matrices.
    expected = "fixed" if operation in (own, "matmul") else "float"
    assert format_of(net, x) == expected
    assert format_of(net.double(), x.double()) == "float"


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_every_kind_of_network_decides_alike(precision: str) -> None:
    lower("conv", precision)
    x = torch.randn(2, WIDTH, WIDTH)
    net = sequence(convolution)
    steps = [Step(convolution(WIDTH), i % 2, (i + 1) % 2) for i in range(3)]
    assert format_of(net, x) == "fixed"
    assert format_of(net[1:], x) == "fixed"
    assert format_of(net, x, x.flip(0)) == "fixed"
    assert format_of(ReversibleBlock(convolution(WIDTH), nn.Tanh()), x, x) == "fixed"
    assert format_of(net.blocks[1], x, x) == "fixed"
    assert format_of(Reversible(steps), x, x.flip(0)) == "fixed"
    assert format_of(ReversibleCycle([convolution(WIDTH) for _ in range(3)]), x) == "fixed"
    assert format_of(copy.deepcopy(net), x) == "fixed"
    assert format_of(sequence(Mlp), x) == "float"
    assert format_of(Reversible([Step(nn.Tanh(), 0, 1)]), x, x) == "float"


def test_a_format_that_was_named_stays() -> None:
    lower("conv")
    for streams in ("float", "fixed"):
        net = sequence(convolution, streams=streams)
        x = torch.randn(2, WIDTH, WIDTH)
        found = net(x)
        net.streams = streams
        assert torch.equal(net(x), found)
        assert net._arithmetic(x).exact == (streams == "fixed")


def test_modules_that_change_are_looked_at_again() -> None:
    lower("conv")
    net, x = sequence(lambda width: nn.Sequential(Mlp(width), nn.Tanh())), torch.randn(2, 8, 8)
    assert format_of(net, x) == "float"
    inner = net.blocks[1].g
    inner[1] = nn.Conv1d(WIDTH, WIDTH, 1)
    assert format_of(net, x) == "fixed"
    inner[1] = nn.Tanh()
    assert format_of(net, x) == "float"
    inner.append(nn.Conv1d(WIDTH, WIDTH, 1))
    assert format_of(net, x) == "fixed"
    del inner[2]
    net.blocks[0].f = convolution(WIDTH)
    assert format_of(net, x) == "fixed"
    net.blocks[0] = ReversibleBlock(Mlp(WIDTH), Mlp(WIDTH))
    assert format_of(net, x) == "float"


class Growing(nn.Module):
    """A branch that convolves as soon as it has a weight of three dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width, 1))
        self.register_buffer("shift", torch.zeros(width, 1))
        self.kernel: Any = None
        self.layers: list[Any] = [None]
        self.options = {"layer": (nn.Tanh(),)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.options["layer"][0](self.linear(x) * self.scale[..., 0] + self.shift[..., 0])
        for kernel in (self.kernel, *self.layers):
            if isinstance(kernel, Tensor):
                x = F.conv1d(x, kernel, padding=1)
            elif kernel is not None:
                x = kernel(x)
        return x


def kernel() -> Tensor:
    return torch.randn(WIDTH, WIDTH, 3) / 5


def replace_data(branch: Any) -> None:
    branch.scale.data = torch.ones(WIDTH, 1, 1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda branch: setattr(branch, "scale", nn.Parameter(torch.ones(WIDTH, 1, 1))),
    "data": replace_data,
    "buffer": lambda branch: setattr(branch, "shift", torch.zeros(WIDTH, 1, 1)),
    "new-parameter": lambda branch: branch.register_parameter("w", nn.Parameter(kernel())),
    "new-buffer": lambda branch: branch.register_buffer("w", kernel()),
    "module-in-a-list": lambda branch: branch.layers.__setitem__(0, convolution(WIDTH)),
    "module-in-a-tuple": lambda branch: branch.options.update(layer=(convolution(WIDTH),)),
    "list": lambda branch: setattr(branch, "layers", [convolution(WIDTH)]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_convolution_that_a_branch_has_later_is_noticed(change: str) -> None:
    lower("conv")
    net, x = sequence(lambda width: nn.Sequential(Growing(width))), torch.randn(2, WIDTH, WIDTH)
    before = copy.deepcopy(net)
    for _ in range(2):
        assert format_of(net, x) == "float"
    CHANGES[change](net.blocks[1].g[0])
    for _ in range(2):
        assert format_of(net, x) == "fixed"
    assert format_of(copy.deepcopy(net), x) == "fixed"
    assert format_of(before, x) == "float"
    net.blocks[1].g[0] = Growing(WIDTH)
    assert format_of(net, x) == "float"


class Late(nn.Module):
    """A branch that makes its weight in its first call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(kernel())
        return F.conv1d(self.linear(x), self.weight, padding=1)


class Uninitialized(nn.Module):
    """A branch that learns of the shape of its weight in its first call, and convolves or not."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.UninitializedParameter()

    def forward(self, x: Tensor) -> Tensor:
        if nn.parameter.is_lazy(self.weight):
            self.weight.materialize(self.shape)
            with torch.no_grad():
                self.weight.normal_(0, 0.2)
        return F.conv1d(x, self.weight) if len(self.shape) > 2 else F.linear(x, self.weight)


def test_a_parameter_made_in_the_first_call_counts_from_the_second_on() -> None:
    lower("conv")
    net, x = sequence(Late), torch.randn(2, WIDTH, WIDTH)
    net(x)
    assert format_of(net, x) == "fixed"


@pytest.mark.parametrize("shape", [(WIDTH, WIDTH, 1), (WIDTH, WIDTH)], ids=["conv", "linear"])
def test_an_uninitialized_parameter_may_be_of_a_convolution(shape: tuple[int, ...]) -> None:
    lower("conv")
    net = ReversibleSequence([(Uninitialized(shape), nn.Tanh())])
    x = torch.randn(2, WIDTH, WIDTH)
    first = net(x)
    net.streams = "fixed"
    assert torch.equal(first, net(x))
    net.streams = "auto"
    assert format_of(net, x) == ("fixed" if len(shape) > 2 else "float")


def test_gradients_are_exact_where_the_kernel_is_frozen() -> None:
    """The oracle of rounded inputs, with weights that are buffers."""

    class Frozen(Rounded):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            weight = self.convolve.weight.detach() * 6
            self.convolve = None
            self.register_buffer("kernel", weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            cut = ((x.detach().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)
            return F.gelu(F.conv2d(x + (cut - x.detach()), self.kernel, padding=1))

    net = ReversibleSequence(build([(Frozen, Frozen)] * 12, 8, dtype=torch.float32))
    x = randn(2, 8, 6, 6, dtype=torch.float32)
    assert distance(net, x)[0] > 1e-3
    lower("conv")
    assert distance(net, x) == (0.0, True)


def test_a_network_is_freed_at_once_after_a_call() -> None:
    lower("conv")
    net, x = sequence(Growing), torch.randn(2, WIDTH, WIDTH)
    net(x)
    freed = [weakref.ref(each) for each in (net, *net.modules(), *net.parameters())]
    gc.disable()
    try:
        del net
        assert not any(each() is not None for each in freed)
    finally:
        gc.enable()


def test_what_a_branch_merely_refers_to_is_no_part_of_it() -> None:
    """A network with a convolution before the sequence, which a branch may ask for settings."""
    lower("conv")
    net, x = sequence(lambda width: nn.Sequential(Mlp(width))), torch.randn(2, WIDTH, WIDTH)
    whole = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 1), net)
    net.blocks[0].f[0].network = [whole]
    assert format_of(net, x) == "float"


@pytest.mark.parametrize("method", ["midpoint", "leapfrog"])
def test_integrate_decides_by_its_function(method: Any) -> None:
    layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    x = torch.randn(2, WIDTH, WIDTH)
    start: Any = x if method == "midpoint" else (x, torch.zeros_like(x))

    def solved(streams: Any) -> Tensor:
        found = integrate(lambda t, x: layer(x), start, [0, 0.1, 0.2, 0.3], method, streams=streams)
        return found if method == "midpoint" else found[0]

    assert torch.equal(solved("auto"), solved("float"))
    lower("conv")
    assert torch.equal(solved("auto"), solved("fixed"))
    assert not torch.equal(solved("auto"), solved("float"))


def test_a_rule_that_scales_is_as_before() -> None:
    net = sequence(convolution, coupling=Momentum(0.5))
    x = torch.randn(2, WIDTH, WIDTH)
    assert format_of(net, x) == "fixed"
    lower("conv")
    assert format_of(net, x) == "fixed"
    assert format_of(net.double(), x.double()) == "float"


# In a graph


def test_a_graph_is_compiled_anew_when_a_setting_changes() -> None:
    x = torch.randn(2, WIDTH, WIDTH)
    for branch, operation in ((convolution, "conv"), (Mlp, "matmul")):
        torch._dynamo.reset()
        counter = CompileCounter()
        net = sequence(branch)[:1]
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        expected = {}
        for streams in ("float", "fixed", "auto"):
            net.streams = streams
            expected[streams] = net(x)
        counts = []
        for precision, streams in (("none", "float"), ("bf16", "fixed"), ("none", "float")):
            lower(operation, precision)
            for _ in range(2):
                assert torch.equal(compiled(x), expected[streams])
            counts.append(counter.frame_count)
        assert counts == [1, 2, 2]


def test_a_graph_of_others_stays() -> None:
    lower("conv")
    x = torch.randn(2, WIDTH, WIDTH)
    net = sequence(Mlp)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), net(x))
    assert format_of(net, x) == "float"


def test_gradients_in_a_graph_are_exact() -> None:
    lower("conv")
    net, x = sequence(convolution), torch.randn(2, WIDTH, WIDTH)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = []
    for execution, run in (("store", net), ("invert", compiled)):
        net.execution = execution
        leaf = x.detach().requires_grad_()
        found.append(torch.autograd.grad(weighted(run(leaf)), [leaf, *net.parameters()]))
    assert all(map(torch.equal, *found))


def test_an_exported_program_is_fixed() -> None:
    lower("conv")
    net, x = sequence(convolution).eval(), torch.randn(2, WIDTH, WIDTH)
    for strict in (True, False):
        exported = torch.export.export(net, (x,), strict=strict).module()
        assert torch.equal(exported(x), net(x))


# What it costs


def test_the_choice_costs_few_calls_whatever_the_depth() -> None:
    lower("conv")
    x = torch.randn(2, WIDTH, WIDTH)
    counts = []
    for depth in (2, 12):
        net = ReversibleSequence([(Mlp(WIDTH), Mlp(WIDTH)) for _ in range(depth)])
        net(x)
        count = 0

        def profile(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(profile)
        try:
            net._rounds_products("cpu")
        finally:
            sys.setprofile(None)
        counts.append(count)
    assert counts[0] == counts[1] <= 20


# CUDA


def cuda_network(
    streams: Any, branch: Callable[[int], nn.Module]
) -> tuple[ReversibleSequence, Tensor]:
    pairs = [(branch(64), branch(64)) for _ in range(12)]
    return ReversibleSequence(pairs, streams=streams).cuda(), torch.randn(8, 64, 64).cuda()


@pytest.fixture
def deterministic() -> None:
    """Let kernels add in the same order whenever they run, as stored execution does."""
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_convolutions_on_cuda_have_exact_gradients() -> None:
    shape = (8, 64, 16, 16)
    error, equal = distance(*convolutions("float", Convolved, shape, "cuda"))
    assert error > 1e-3
    assert not equal
    assert distance(*convolutions("auto", Convolved, shape, "cuda")) == (0.0, True)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["convolution", "functional", "recurrent"])
def test_layers_of_cudnn_have_exact_gradients(name: str) -> None:
    net, x = cuda_network("auto", BRANCHES[name][0])
    assert format_of(net, x) == "fixed"
    assert distance(net, x) == (0.0, True)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_products_of_matrices_on_cuda_have_exact_gradients() -> None:
    net, x = cuda_network("auto", Mlp)
    assert format_of(net, x) == "float"
    torch.set_float32_matmul_precision("high")
    try:
        assert format_of(net, x) == "fixed"
        assert distance(net, x) == (0.0, True)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_without_tf32_auto_is_float_on_cuda() -> None:
    torch.backends.cudnn.allow_tf32 = False
    try:
        net, x = convolutions("auto", Convolved, (8, 64, 16, 16), "cuda")
        assert format_of(net, x) == "float"
        assert distance(net, x)[0] < 1e-3
    finally:
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_a_graph_on_cuda_is_compiled_anew_when_convolutions_change() -> None:
    net, x = cuda_network("auto", convolution)
    counter = CompileCounter()
    compiled = torch.compile(net[:1], backend=counter, fullgraph=True)
    try:
        for allowed, streams in ((True, "fixed"), (False, "float")):
            torch.backends.cudnn.allow_tf32 = allowed
            twin = net[:1]
            twin.streams = streams
            assert torch.equal(compiled(x), twin(x))
        assert counter.frame_count == 2
    finally:
        torch.backends.cudnn.allow_tf32 = True
