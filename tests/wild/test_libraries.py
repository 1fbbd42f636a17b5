"""Branches of real libraries: every execution gives the gradients of ordinary autograd, and leaves
the state that ordinary calls leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from oracle import StoredSequence, assert_near, gradients_of, weighted
from revnet import ReversibleError, ReversibleSequence
from wild import branches
from wild.branches import WIDTH

EXECUTIONS = ("invert", "checkpoint", "select", "offload")
# What every module has, which is no state of the branch.
MACHINERY = {*vars(nn.Module())} - {"_buffers", "training"}

Run = Callable[[Any, Tensor], Tensor]


def micro_batches(net: Any, x: Tensor) -> Tensor:
    """Three calls of different lengths before one backward."""
    return weighted(net(x)) + weighted(net(x[:, :3])) + weighted(net(x * 0.5))


def one_after_the_other(net: Any, x: Tensor) -> Tensor:
    """Calls with a backward after each."""
    for part in (x[:, :3], x):
        weighted(net(part)).backward()
    return weighted(net(x[:, 1:]))


def switched(net: Any, x: Tensor) -> Tensor:
    """Another adapter, another scale and none at all before backward."""
    total = torch.zeros((), dtype=x.dtype)
    for names, scale, disabled in ((["en"], 1.0, False), (["de", "en"], 3.0, False), ([], 1, True)):
        for block in net.blocks:
            block.f.active_adapters = names
            block.f.scaling["de"] = scale
            block.f.disabled = disabled
        total = total + weighted(net(x))
    net.blocks[0].f.active_adapters = ["de"]
    return total


def with_contexts(net: Any, x: Tensor) -> Tensor:
    """A context with a gradient for each micro-batch, gone before backward."""
    total = torch.zeros((), dtype=x.dtype)
    for part in x.split(1):
        encoded = net.encoder(part.mean(1, keepdim=True))
        for block in net.blocks:
            block.f.context["gamma"], block.f.context["beta"] = encoded.chunk(2, -1)
        total = total + weighted(net(part))
    for block in net.blocks:
        block.f.context.clear()
    return total


def steered(net: Any, x: Tensor) -> Tensor:
    """Hooks that add a direction during the call alone, as tools for interpretation do."""
    direction = torch.linspace(-1, 1, WIDTH, dtype=x.dtype)
    handles = [
        block.f.enter.register_forward_hook(lambda module, args, out: out + direction)
        for block in net.blocks
    ]
    loss = weighted(net(x))
    for handle in handles:
        handle.remove()
    return loss + weighted(net(0.5 * x))


def initialised(net: Any, x: Tensor) -> Tensor:
    """One forward without gradients first, as the error tells."""
    with torch.no_grad():
        net(x)
    return micro_batches(net, x)


CASES: list[tuple[type[nn.Module], Run]] = [
    *(
        (branch, run)
        for branch in (
            branches.RotaryBuffers,
            branches.RotaryAttributes,
            branches.RotaryScaled,
            branches.Alibi,
            branches.RelativePositions,
            branches.Recorder,
            branches.Schedule,
            branches.RunningStatistics,
            branches.Router,
            branches.Codebook,
            branches.KeyValueCache,
            branches.StreamingConvolution,
            branches.Lstm,
            branches.GruStack,
            branches.OwnNoise,
            branches.WrappedForward,
            branches.ListedExperts,
        )
        for run in (micro_batches, one_after_the_other)
    ),
    (branches.ActNorm, initialised),
    (branches.Lora, switched),
    (branches.Film, with_contexts),
    (branches.Recorder, steered),
]
PARAMETERS = [
    pytest.param(branch, run, id=f"{branch.__name__}-{run.__name__}") for branch, run in CASES
]
COMPILED = [
    pytest.param(branch, run, id=branch.__name__)
    for branch, run in CASES
    if run is not one_after_the_other
]


def build(kind: Callable[..., nn.Module], branch: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = kind([(branch(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)], {}, **options)
    net.encoder = nn.Linear(WIDTH, 2 * WIDTH)
    return net.double()


def state_of(net: Any) -> list[Any]:
    """Return the tensors, numbers and names in all attributes of the branches."""
    return [
        (name, key, leaf)
        for i, block in enumerate(net.blocks)
        for name, module in block.f.named_modules(prefix=str(i))
        for key, value in sorted(vars(module).items())
        if key not in MACHINERY
        for leaf in pytree.tree_leaves(list(value) if isinstance(value, deque) else value)
        if leaf is None or isinstance(leaf, Tensor | int | float | str)
    ]


def outcome(net: nn.Module, run: Run, call: Callable[..., Any] | None = None) -> Any:
    """Return the loss, the gradients and the state after one run from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    torch.manual_seed(1)
    loss = run(net if call is None else call, x)
    state = state_of(net)
    loss.backward()
    return loss.detach(), {"x": x.grad, **gradients_of(net)}, state, state_of(net)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert_near(found[0], expected[0], "loss", tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_near(found[1][name], gradient, name, tolerance)
    for state in found[2:]:
        assert len(state) == len(expected[3])
        for (*place, value), (*expected_place, wanted) in zip(state, expected[3], strict=True):
            assert place == expected_place
            if isinstance(wanted, Tensor):
                assert_near(value, wanted, str(place), tolerance)
            else:
                assert value == wanted, f"{place}: {value}, expected {wanted}"


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("branch", "run"), PARAMETERS)
def test_gradients_and_state_are_those_of_ordinary_autograd(
    branch: type[nn.Module], run: Run, execution: str
):
    expected = outcome(build(StoredSequence, branch), run)
    assert_same(outcome(build(ReversibleSequence, branch, execution=execution), run), expected)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("branch", "run"), PARAMETERS)
def test_fixed_streams_give_the_gradients_of_stored_steps_in_every_bit(
    branch: type[nn.Module], run: Run, execution: str
):
    nets = [
        build(ReversibleSequence, branch, execution=how, streams="fixed")
        for how in ("store", execution)
    ]
    expected, found = (outcome(net, run) for net in nets)
    assert_same(found, expected, tolerance=0.0)


class Compiled:
    """A compiled sequence that shows the attributes of the sequence."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.call = net, torch.compile(net, backend="aot_eager")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, x: Tensor) -> Any:
        return self.call(x)


@pytest.mark.long
# Both are what Dynamo says of its own work.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("branch", "run"), COMPILED)
def test_compiled_sequences_give_the_same(branch: type[nn.Module], run: Run):
    expected = outcome(build(StoredSequence, branch), run)
    net = build(ReversibleSequence, branch)
    assert_same(outcome(net, run, Compiled(net)), expected)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_initialisation_from_data_is_right_or_says_what_to_do(execution: str):
    expected = outcome(build(StoredSequence, branches.ActNorm), micro_batches)
    net = build(ReversibleSequence, branches.ActNorm, execution=execution)
    refusal = ""
    try:
        assert_same(outcome(net, micro_batches), expected)
    except ReversibleError as error:
        refusal = str(error)
    if refusal:
        assert "block 0, branch f" in refusal or "block 1, branch f" in refusal
        assert "no_grad" in refusal
