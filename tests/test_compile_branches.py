"""Branches compiled one by one: Dynamo never compiles the hooks and functions of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd, convert_frame
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import oracle
import revnet
from cases import COMPILER_WARNINGS
from revnet import _sequence

pytestmark = COMPILER_WARNINGS

WIDTH = 8
COMPILES_BUILT_IN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


class Custom(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.drop(self.enter(x).tanh()))


class Dropped(nn.Module):
    """Its own frame with randomness, and few tensors to save."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.enter(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, x, x, need_weights=False)[0]


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sin()


# Each with the number of graphs that one of it makes. Before torch 2.14 built-in modules are not
# compiled themselves, but modules of other classes inside of them are. Since then each is a graph.
BRANCHES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), 0),
    "norm": (lambda: nn.LayerNorm(WIDTH), 0),
    "sequential": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), 0),
    "dropout": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)), 0),
    "encoder": (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True), 0),
    "nested": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU())), 0),
    "nested-custom": (lambda: nn.Sequential(nn.Sequential(Custom(), Fourier()), nn.Tanh()), 2),
    "custom": (Custom, 1),
    "custom-dropout": (lambda: Custom(0.4), 1),
    "custom-small": (Dropped, 1),
    "custom-attention": (Attention, 1),
    "compiled-by-function": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), 1),
}
STREAMS = [pytest.param("float", id="float"), pytest.param(revnet.Fixed(37), id="fixed")]
EXECUTIONS = ["invert", "checkpoint", "select", "store"]
# Every kind of branch once, and every way to run two of them that differ most: one that Dynamo
# leaves alone, one of which it makes a graph, with randomness.
WAYS = [(kind, "invert", STREAMS[0]) for kind in BRANCHES if kind != "custom-small"]
WAYS += [
    (kind, execution, streams)
    for kind in ("sequential", "custom-dropout")
    for execution in EXECUTIONS
    for streams in STREAMS
    if (execution, streams) != ("invert", STREAMS[0])
]


def ways(chosen: list[tuple[str, str, Any]]) -> list[Any]:
    return [
        pytest.param(kind, execution, *streams.values, id=f"{kind}-{execution}-{streams.id}")
        for kind, execution, streams in chosen
    ]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network(
    branch: Callable[[], nn.Module], depth: int = 2, **options: Any
) -> revnet.ReversibleSequence:
    torch.manual_seed(0)
    pairs = [(branch(), branch()) for _ in range(depth)]
    return revnet.ReversibleSequence(pairs, **options).double()


def step(net: nn.Module, run: Callable[[Tensor], None] = lambda loss: loss.backward()) -> Any:
    net.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = net(x).pow(2).sum()
    run(loss)
    return {"x": x.grad, **oracle.gradients_of(net)}


@pytest.fixture(autouse=True)
def compiled_files(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files of which Dynamo was given a frame to compile."""
    inner, files = convert_frame._compile, set()

    def watched(code: Any, *args: Any, **kwargs: Any) -> Any:
        files.add(code.co_filename)
        return inner(code, *args, **kwargs)

    monkeypatch.setattr(convert_frame, "_compile", watched)
    return files


def assert_no_engine(files: set[str]) -> None:
    library = str(Path(revnet.__file__).parent)
    assert not {name for name in files if name.startswith(library)} - {_sequence.__file__}


@pytest.mark.parametrize(("kind", "execution", "streams"), ways(WAYS))
def test_compiled_branches_have_the_gradients_of_eager_ones(
    kind: str, execution: str, streams: Any, compiled_files: set[str]
):
    make, graphs = BRANCHES[kind]
    wanted = step(network(make, streams=streams, execution="store"))
    net = network(make, streams=streams, execution=execution)
    counter = CompileCounterWithBackend("aot_eager")
    for block in net.blocks:
        if kind == "compiled-by-function":
            block.f, block.g = (torch.compile(b, backend=counter) for b in (block.f, block.g))
        else:
            block.f.compile(backend=counter)
            block.g.compile(backend=counter)
    for _ in range(2):
        found = step(net)
        found = {name.replace("._orig_mod", ""): value for name, value in found.items()}
        oracle.assert_same_gradients(found, wanted)
    # Branches of one class share their graphs.
    assert counter.frame_count == (1 if COMPILES_BUILT_IN else graphs)
    assert_no_engine(compiled_files)


# The graph breaks at every saved tensor, and what is left of it is compiled anew each time: one
# block of small branches.
BACKWARDS = [
    ("linear", "invert", STREAMS[0]),
    ("linear", "checkpoint", STREAMS[1]),
    ("dropout", "select", STREAMS[0]),
    ("dropout", "invert", STREAMS[1]),
    ("custom-small", "invert", STREAMS[0]),
]


@pytest.mark.parametrize(("kind", "execution", "streams"), ways(BACKWARDS))
def test_a_backward_under_compiled_autograd_evaluates_each_branch_once(
    kind: str, execution: str, streams: Any
):
    branch = BRANCHES[kind][0]
    wanted = step(network(branch, depth=1, streams=streams, execution="store"))
    net = network(branch, depth=1, streams=streams, execution=execution)
    calls: list[int] = []
    for block in net.blocks:
        for branch in (block.f, block.g):
            branch.register_forward_pre_hook(lambda *_: calls.append(1))

    def backward(loss: Tensor) -> None:
        assert len(calls) == 2
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()

    oracle.assert_same_gradients(step(net, backward), wanted)
    assert len(calls) == 4


@pytest.mark.parametrize("streams", STREAMS)
def test_a_compiled_training_step_whose_graph_breaks_compiles_no_engine(
    streams: Any, compiled_files: set[str]
):
    """Dynamo is at work when backward asks for what it needs."""
    wanted = step(network(lambda: Custom(0.4), streams=streams, execution="store"))
    net = network(lambda: Custom(0.4), streams=streams)
    oracle.assert_same_gradients(torch.compile(step, backend="aot_eager")(net), wanted)
    # What decides between graph and engine is compiled, as is the code of the caller.
    library = Path(revnet.__file__).parent
    packages = {Path(name).parent.name for name in compiled_files if library in Path(name).parents}
    assert not packages & {"_engine", "_state"}
