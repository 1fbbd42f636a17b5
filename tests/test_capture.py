"""A training step as a CUDA graph: the recipe of `docs/compile.md`, and what that page promises."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from test_docs import code_of

PAGE = Path(__file__).parent.parent / "docs" / "compile.md"
WIDTH = 64
# Of the steps that warm up.
pytestmark = pytest.mark.filterwarnings("ignore:.*step.. is running without CUDA graph:UserWarning")


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The function that the page gives its readers."""
    (code,) = [code for _, code in code_of(PAGE) if "def captured" in code]
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    return names["captured"](step)


class Branch(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.dropout = nn.Dropout(rate)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(nn.functional.gelu(self.up(self.norm(x)))))


def network(device: str, depth: int = 4, rate: float = 0.1, **options: Any) -> Any:
    torch.manual_seed(0)
    pairs = [(Branch(rate), Branch(rate)) for _ in range(depth)]
    return revnet.ReversibleSequence(pairs, **options).to(device)


class Training:
    """A network, its optimizer and its batch."""

    def __init__(self, net: nn.Module, autocast: bool = False) -> None:
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, capturable=True)
        self.x, self.target = torch.zeros(2, 8, 16, WIDTH, device="cuda")
        self.autocast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=autocast)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = (self.net(self.x) - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, step: Callable[[], Tensor], batches: list[Tensor]) -> list[Tensor]:
        losses = []
        for batch in batches:
            self.x.copy_(batch[0])
            self.target.copy_(batch[1])
            losses.append(step().clone())
        return losses


EXECUTIONS = ("invert", "checkpoint", "select", "offload", "store")


@pytest.mark.gpu
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("streams", ["float", "fixed", "autocast"])
def test_captured_steps_are_eager_steps_bit_for_bit(streams: str, execution: Any) -> None:
    autocast = streams == "autocast"
    options = {"streams": "auto" if autocast else streams, "execution": execution}
    batches = [torch.randn(2, 8, 16, WIDTH, device="cuda") for _ in range(5)]
    eager = Training(network("cuda", **options), autocast)
    graph = Training(network("cuda", **options), autocast)
    torch.manual_seed(1)
    eager.run(eager.step, [torch.zeros_like(batches[0])] * 3)
    expected = eager.run(eager.step, batches)
    torch.manual_seed(1)
    # The recipe warms up with three steps on the batch that is there.
    found = graph.run(captured(graph.step), batches)
    assert all(map(torch.equal, found, expected))
    assert len({loss.item() for loss in found}) == len(found)
    for a, b in zip(graph.net.parameters(), eager.net.parameters(), strict=True):
        assert torch.equal(a, b)
    graph.net.check()


@pytest.mark.gpu
def test_each_replay_of_a_captured_step_draws_new_masks() -> None:
    net = network("cuda", rate=0.5, streams="fixed")
    x = torch.randn(8, 16, WIDTH, device="cuda", requires_grad=True)

    def step() -> Tensor:
        x.grad = None
        net(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    replay = captured(step)
    first, second = replay().clone(), replay().clone()
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_a_captured_step_tells_of_a_stream_out_of_range() -> None:
    training = Training(network("cuda", streams="fixed"))
    replay = captured(training.step)
    replay()
    training.net.check()
    training.x.fill_(1e6)
    replay()
    with pytest.raises(revnet.ReversibleError, match="left the range"):
        training.net.check()


@pytest.mark.gpu
def test_a_captured_step_takes_the_memory_of_its_execution() -> None:
    taken = {}
    for execution in ("store", "invert"):
        net = network("cuda", depth=16, rate=0.0, streams="fixed", execution=execution)
        x = torch.randn(16384, WIDTH, device="cuda")

        def step(net: nn.Module = net, x: Tensor = x) -> None:
            net(x).sum().backward()

        step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        replay = captured(step)
        # The warm-up leaves memory cached for its stream.
        torch.cuda.empty_cache()
        taken[execution] = torch.cuda.memory_reserved() - before
        replay()
        allocated = torch.cuda.memory_allocated()
        for _ in range(3):
            replay()
        assert torch.cuda.memory_allocated() == allocated
        del replay
    assert taken["invert"] < taken["store"] / 4


# Once a process, for any module: torch keeps the nodes that it made in the stream of the capture.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_graphed_callables_of_captured_networks_have_the_eager_gradients(streams: str) -> None:
    net = network("cuda", streams=streams)
    twin = copy.deepcopy(net)
    x = torch.randn(8, 16, WIDTH, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(net, (torch.randn_like(x, requires_grad=True),))
    for seed in (1, 2):
        steps = []
        for one in (graphed, twin):
            torch.manual_seed(seed)
            one.zero_grad()
            x.grad = None
            y = one(x)
            y.square().sum().backward()
            gradients = [parameter.grad for parameter in one.parameters()]
            steps.append([tensor.clone() for tensor in (y, x.grad, *gradients)])
        if streams == "fixed":
            assert all(map(torch.equal, *steps))
        for found, expected in zip(*steps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_captured_draw_of_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would leave out the same blocks in every step."""
    net = network("cpu", layer_dropout=0.5)
    x = torch.randn(2, WIDTH)
    net(x)
    monkeypatch.setattr("revnet._sequential.is_capturing", lambda: True)
    with pytest.raises(revnet.ReversibleError, match=r"layer_dropout=0\.5 in a CUDA graph"):
        net(x)
    net.eval()
    net(x)


class Recorded:
    """Takes the place of a CUDA graph where there is no device: replays by calling again."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.replay = step


def test_the_captured_recipe_warms_up_captures_once_and_replays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recipe as far as it can run without a device."""
    happened: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            happened.append("wait")

    @contextlib.contextmanager
    def noted(name: str, *_: Any) -> Any:
        happened.append(f"enter {name}")
        yield
        happened.append(f"leave {name}")

    stream, graph = Stream(), Recorded(lambda: happened.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", partial(noted, "stream"))
    monkeypatch.setattr(torch.cuda, "graph", partial(noted, "graph"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    def step() -> str:
        happened.append("step")
        return "result"

    replay = captured(step)
    assert replay() == "result"
    warm = ["wait", "enter stream", "step", "step", "step", "leave stream", "wait"]
    assert happened == [*warm, "enter graph", "step", "leave graph", "replay"]
