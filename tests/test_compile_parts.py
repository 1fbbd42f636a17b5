"""`compile` of sequences, blocks and programs makes a graph of each branch, torch's own too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import cases
import oracle
import revnet

pytestmark = cases.COMPILER_WARNINGS

WIDTH = 8
STREAMS = [pytest.param("float", id="float"), pytest.param(revnet.Fixed(37), id="fixed")]


class Scaled(nn.Module):
    """A branch with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.linear(x).tanh()
        return out if scale is None else out * scale


class Prints(nn.Module):
    """A branch whose graph breaks."""

    def forward(self, x: Tensor) -> Tensor:
        print("", end="")
        return x.sin()


def mlp(rate: float = 0.0) -> nn.Module:
    parts = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(rate), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(nn.LayerNorm(WIDTH), *parts)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)


def step_of(fn: Any) -> revnet.Step:
    return revnet.Step(fn, target=0, source=1)


Branch = Callable[[], nn.Module]
BRANCHES: dict[str, Branch] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "subclass": lambda: cases.Linear(WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "mlp": mlp,
    "encoder": encoder,
    "nested": lambda: nn.Sequential(nn.Sequential(cases.Mlp(WIDTH), nn.Tanh()), Scaled()),
    "custom": lambda: cases.Mlp(WIDTH),
}


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> CompileCounterWithBackend:
    """Counts the graphs that it is given."""
    return CompileCounterWithBackend("aot_eager")


def pairs_of(f: Branch, g: Branch | None = None, depth: int = 3) -> list[tuple[nn.Module, ...]]:
    torch.manual_seed(0)
    return [(f().double(), (g or f)().double()) for _ in range(depth)]


def tokens() -> Tensor:
    return torch.randn(
        2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


def assert_as_stored(
    net: nn.Module, stored: nn.Module, tolerance: float = 1e-12, **kw: Any
) -> None:
    stored.zero_grad()
    wanted = oracle.train_step(stored, tokens(), **kw)
    for _ in range(2):
        net.zero_grad()
        oracle.assert_same_step(oracle.train_step(net, tokens(), **kw), wanted, tolerance)


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("kind", BRANCHES)
def test_every_branch_is_compiled_once_for_its_class(kind: str, streams: Any, graphs: Any) -> None:
    pairs = pairs_of(BRANCHES[kind])
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs, streams=streams)
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored, 1e-12 if streams == "float" else 1e-10)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select", "offload", "mixed"])
def test_fixed_streams_stay_exact_in_every_bit(execution: str, graphs: Any) -> None:
    net = revnet.ReversibleSequence(pairs_of(lambda: mlp(0.3), Scaled), streams="fixed").float()
    net.compile(backend=graphs)
    x, found = tokens().float(), []
    for executions in ("store", ["invert", "store", "select", "checkpoint"] + ["invert"] * 2):
        net.execution = executions if execution == "mixed" or executions == "store" else execution
        net.zero_grad()
        found.append(oracle.train_step(net, x).gradients)
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
    assert graphs.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_fixed_streams_stay_exact_with_inductor(rate: float) -> None:
    net = revnet.ReversibleSequence(pairs_of(lambda: mlp(rate), depth=2), streams="fixed").float()
    net.compile(fullgraph=True)
    x, found = tokens().float(), []
    for execution in ("store", "invert"):
        net.execution = execution
        net.zero_grad()
        found.append(oracle.train_step(net, x).gradients)
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_dropout_draws_the_same_numbers_again(graphs: Any) -> None:
    pairs = pairs_of(lambda: mlp(0.4), lambda: nn.Sequential(nn.Dropout(0.2), Scaled()))
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored)
    assert graphs.frame_count == 2


def test_keywords_reach_compiled_branches(graphs: Any) -> None:
    pairs = pairs_of(Scaled, mlp)
    route = {"scale": (True, False)}
    stored = oracle.stored_copy(pairs, args_route={"scale": [(True, False)] * 3})
    net = revnet.ReversibleSequence(pairs, route)
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored, scale=torch.randn(WIDTH).double().requires_grad_())
    assert graphs.frame_count == 2


def test_a_twin_without_streams_is_compiled_alike(graphs: Any) -> None:
    pairs = pairs_of(mlp, Scaled)
    plain = revnet.SequentialSequence(copy.deepcopy(pairs))
    net = revnet.SequentialSequence(pairs, execution="checkpoint")
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, plain)
    assert graphs.frame_count == 2


def test_a_block_is_compiled_alone_and_in_its_sequence(graphs: Any) -> None:
    pairs = pairs_of(mlp, depth=2)
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net[0].compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored)
    assert graphs.frame_count == 1
    x = tokens()
    plain = copy.deepcopy(net[0])
    for found, wanted in zip(net[0](x, x), plain(x, x), strict=True):
        oracle.assert_near(found, wanted)
    assert net[1].f._compiled_call_impl is None


def test_a_program_compiles_modules_and_functions(graphs: Any) -> None:
    shared = step_of(mlp().double())
    steps = [shared, revnet.Step(torch.sin, 1, 0), step_of(nn.Linear(WIDTH, WIDTH).double())]
    steps += [revnet.Step(None, 1, 0), shared]
    net, x = revnet.Reversible(steps), tokens()
    plain = copy.deepcopy(net)
    net.compile(backend=graphs, fullgraph=True)
    found = []
    for module in (net, plain):
        y = module(x, x.cos())
        grads = torch.autograd.grad(oracle.weighted(*y), [x, *module.parameters()])
        found.append([*y, *grads])
    for actual, wanted in zip(*found, strict=True):
        oracle.assert_near(actual, wanted)
    assert graphs.frame_count == 3


def test_the_branches_of_a_sum_stay_steps_of_their_own(graphs: Any) -> None:
    def total() -> nn.Module:
        return revnet.Sum([mlp(), mlp()])

    pairs = pairs_of(total, Scaled, depth=2)
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend=graphs, fullgraph=True)
    assert all(pair[0].divides for pair in pairs)
    assert_as_stored(net, stored)
    assert graphs.frame_count == 2


def test_a_sequence_as_a_branch_compiles_its_own_branches(graphs: Any) -> None:
    pairs = pairs_of(lambda: revnet.ReversibleSequence(pairs_of(mlp, depth=1)), Scaled, depth=2)
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend=graphs, fullgraph=True)
    assert pairs[0][0]._compiled_call_impl is None
    assert_as_stored(net, stored)
    assert graphs.frame_count == 2


def test_structures_of_one_class_do_not_use_up_one_limit(graphs: Any) -> None:
    """Dynamo compiles one function for 8 kinds of input, and then no more."""
    acts = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.CELU)
    pairs = [
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), act()).double(), nn.Linear(WIDTH, WIDTH).double())
        for act in acts
    ]
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored)
    assert graphs.frame_count == len(acts) + 1


def test_sizes_of_one_class_do_not_use_up_one_limit(graphs: Any) -> None:
    pairs = [
        tuple(nn.Sequential(nn.Linear(WIDTH, n), nn.Linear(n, WIDTH)).double() for _ in "fg")
        for n in range(3, 13)
    ]
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored)
    assert graphs.frame_count == len(pairs)


def test_what_was_compiled_before_stays(graphs: Any) -> None:
    own = CompileCounterWithBackend("aot_eager")
    pairs = pairs_of(mlp, Scaled, depth=2)
    by_function = torch.compile(pairs[0][0], backend=own)
    pairs[1][1].compile(backend=own)
    scripted = torch.jit.trace(pairs[1][0], tokens().detach())
    stored = oracle.stored_copy(pairs)
    found = [(by_function, pairs[0][1]), (scripted, pairs[1][1])]
    net = revnet.ReversibleSequence(found)
    before = pairs[1][1]._compiled_call_impl
    for _ in range(2):
        net.compile(backend=graphs)
    assert net[0].f is by_function
    assert net[1].f is scripted
    assert pairs[1][1]._compiled_call_impl is before
    assert scripted._compiled_call_impl is None
    x = tokens()
    oracle.assert_near(net(x), stored(x))
    assert (own.frame_count, graphs.frame_count) == (2, 1)


def test_compiling_again_takes_the_new_options(graphs: Any) -> None:
    first = CompileCounterWithBackend("eager")
    pairs = pairs_of(mlp, Scaled, depth=2)
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend=first)
    net.compile(disable=True)
    net.compile(backend=graphs, fullgraph=True)
    assert_as_stored(net, stored)
    assert (first.frame_count, graphs.frame_count) == (0, 2)


def test_options_go_to_every_branch(graphs: Any) -> None:
    net = revnet.ReversibleSequence(pairs_of(BRANCHES["linear"], Scaled))
    net.compile(backend=graphs, dynamic=True)
    for length in range(4, 12):
        net(torch.randn(2, length, WIDTH).double().requires_grad_()).sum().backward()
    assert graphs.frame_count == 2


def test_fullgraph_raises_where_the_graph_of_a_branch_breaks() -> None:
    net = revnet.ReversibleSequence(pairs_of(mlp, lambda: nn.Sequential(Prints()), depth=1))
    net.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        net(tokens())
    net.compile(backend="aot_eager")
    net(tokens()).sum().backward()


def test_without_gradients(graphs: Any) -> None:
    pairs = pairs_of(mlp, Scaled)
    stored, net = oracle.stored_copy(pairs).eval(), revnet.ReversibleSequence(pairs).eval()
    with torch.no_grad():
        net.compile(backend=graphs, fullgraph=True)
        oracle.assert_near(net(tokens().detach()), stored(tokens()))
    assert graphs.frame_count == 2
    assert_as_stored(net, stored)


def test_hooks_on_a_branch_run(graphs: Any) -> None:
    pairs = pairs_of(mlp, Scaled, depth=2)
    net = revnet.ReversibleSequence(pairs, execution="store")
    for pair in pairs:
        pair[0].register_forward_hook(lambda module, args, out: 2 * out)
    stored = copy.deepcopy(net)
    net.compile(backend=graphs)
    assert_as_stored(net, stored)
    net.execution = "invert"
    assert_as_stored(net, stored)


def test_the_module_stays_what_it_was(graphs: Any) -> None:
    net = revnet.ReversibleSequence(pairs_of(mlp, Scaled))
    keys, modules, shown = list(net.state_dict()), list(net.modules()), repr(net)
    net.compile(backend=graphs)
    assert list(net.state_dict()) == keys
    assert list(net.modules()) == modules
    assert repr(net) == shown
    assert net._compiled_call_impl is None


def test_copies_are_as_after_any_compile_not_compiled(graphs: Any) -> None:
    net, x = revnet.ReversibleSequence(pairs_of(mlp, Scaled)), tokens()
    net.compile(backend=graphs)
    wanted = net(x)
    before = graphs.frame_count
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(module._compiled_call_impl is None for module in twin.modules())
        oracle.assert_near(twin(x), wanted)
    assert graphs.frame_count == before
    twin.compile(backend=graphs)
    oracle.assert_near(twin(x), wanted)
    assert graphs.frame_count == before


def test_a_lazy_branch_finds_its_width(graphs: Any) -> None:
    net = revnet.ReversibleSequence([(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH))])
    net.compile(backend=graphs)
    net(torch.randn(2, WIDTH)).sum().backward()
    assert net[0].f.weight.grad.shape == (WIDTH, WIDTH)


def test_a_class_of_no_module_is_compiled(graphs: Any) -> None:
    names: dict[str, Any] = {"nn": nn}
    exec("class Sine(nn.Module):\n    def forward(self, x):\n        return x.sin()", names)
    net = revnet.ReversibleSequence([(names["Sine"](), nn.Linear(WIDTH, WIDTH))])
    net.compile(backend=graphs)
    net(torch.randn(2, WIDTH)).sum().backward()
    assert graphs.frame_count == 2


def test_one_graph_of_the_whole_is_still_to_be_had(graphs: Any) -> None:
    pairs = pairs_of(mlp, Scaled, depth=2)
    stored, net = oracle.stored_copy(pairs), revnet.ReversibleSequence(pairs)
    net.compile(backend="eager")
    whole = torch.compile(net, backend=graphs, fullgraph=True)
    oracle.assert_near(whole(tokens()), stored(tokens()))
    whole(tokens()).sum().backward()
    assert graphs.frame_count == 1


def test_a_changed_stance_runs_branches_as_written() -> None:
    net, x = revnet.ReversibleSequence(pairs_of(mlp, Scaled)), tokens()
    wanted = net(x)
    counter = CompileCounterWithBackend("aot_eager")
    net.compile(backend=counter)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(net(x), wanted)
    assert counter.frame_count == 0
