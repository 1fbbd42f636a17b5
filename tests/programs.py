"""Random programs of steps for the fuzzer, and the plain loop that says what they compute."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import revnet
from oracle import gradients_of, weighted
from revnet import Additive, Affine, Leapfrog, Midpoint, Momentum, Reversible, Step

WIDTH = 4
EXECUTIONS = ("invert", "checkpoint", "select", "store", "offload")


class Branch(nn.Module):
    """Mixes the streams that it reads; subclasses put state in between."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 2 * WIDTH if wide else WIDTH)
        self.scale = 1.0

    def forward(self, *streams: Tensor) -> Tensor:
        mixed = sum((i + 1.0) * stream for i, stream in enumerate(streams)) / len(streams)
        return self.between(self.lin(mixed.sin())).tanh() * self.scale

    def between(self, x: Tensor) -> Tensor:
        return x


class Dropped(Branch):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class Noisy(Branch):
    def between(self, x: Tensor) -> Tensor:
        return F.rrelu(x, 0.1, 0.9, self.training)


class Counted(Branch):
    def __init__(self, wide: bool) -> None:
        super().__init__(wide)
        self.count = 0

    def between(self, x: Tensor) -> Tensor:
        self.count += 1
        return x / self.count


class Averaged(Branch):
    """Keeps a running mean in place, under `.data` every second time."""

    def __init__(self, wide: bool) -> None:
        super().__init__(wide)
        self.register_buffer("mean", torch.zeros(self.lin.out_features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def between(self, x: Tensor) -> Tensor:
        self.steps += 1
        mean = self.mean if self.steps % 2 else self.mean.data
        mean.mul_(0.5).add_(x.detach().mean((0, 1)))
        return x - self.mean.clone()


class Rebound(Averaged):
    def between(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + x.detach().mean((0, 1))
        return x * (1 + self.mean)


class Logged(Branch):
    """Records what it saw in containers."""

    def __init__(self, wide: bool) -> None:
        super().__init__(wide)
        self.log: list[Any] = []
        self.table: dict[str, Any] = {"last": self.log}

    def between(self, x: Tensor) -> Tensor:
        self.table["last"].append(x.detach().mean())
        self.table[str(len(self.log))] = len(self.log)
        return x * (1 + sum(self.log)) / len(self.table)


class Recurrent(Branch):
    def __init__(self, wide: bool) -> None:
        super().__init__(wide)
        self.state: Any = None

    def between(self, x: Tensor) -> Tensor:
        before = x.detach() if self.state is None else self.state[0]
        self.state = (0.5 * before + 0.1 * x.detach(), "seen")
        return x + before


class Gated(Branch):
    def between(self, x: Tensor) -> Tensor:
        keep = revnet.remember(x.detach() > 0)
        return torch.where(keep, x, 0.1 * x)


class Normed(Branch):
    def __init__(self, wide: bool) -> None:
        super().__init__(wide)
        # Before a batch norm a bias has no gradient but rounding noise.
        self.lin = nn.Linear(WIDTH, self.lin.out_features, bias=False)
        self.norm = nn.BatchNorm1d(self.lin.out_features, momentum=0.3)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


BRANCHES = (
    Branch,
    Dropped,
    Noisy,
    Counted,
    Averaged,
    Rebound,
    Logged,
    Recurrent,
    Gated,
    Normed,
)
COUPLINGS = ("additive", "momentum", "affine", "midpoint", "leapfrog")
# Those that add, and those that act on trees.
ADDING = ("additive", "midpoint", "leapfrog")
ON_TREES = (*ADDING, "momentum")
TREES: dict[str, Any] = {
    "tensor": lambda make: make(),
    "dict": lambda make: {"a": make(), "b": [make()]},
    # Not to be taken for a branch's update and extra output.
    "pair": lambda make: (make(), make()),
}
ACTIONS = ("scale", "call", "eval", "train", "count", "clear", "no_grad")
BACKWARDS = ("plain", "retained", "partial", "one by one", "reversed")


@dataclasses.dataclass(frozen=True)
class StepSpec:
    branch: int
    target: int
    sources: tuple[int, ...]
    coupling: str
    execution: str


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
    """A program, what is done between its forward and its backward, and the kind of backward."""

    streams: int
    tree: str
    branches: tuple[int, ...]
    steps: tuple[StepSpec, ...]
    actions: tuple[str, ...]
    backward: str
    seed: int


@st.composite
def programs(
    draw: st.DrawFn,
    executions: tuple[str, ...] = EXECUTIONS,
    couplings: tuple[str, ...] = COUPLINGS,
) -> ProgramSpec:
    streams = draw(st.integers(1, 4))
    tree = draw(st.sampled_from(tuple(TREES)))
    if tree != "tensor":
        couplings = tuple(name for name in couplings if name in ON_TREES)
    branches = draw(st.lists(st.integers(0, len(BRANCHES) - 1), min_size=1, max_size=4))
    place = st.integers(0, streams - 1)
    steps = draw(
        st.lists(
            st.builds(
                StepSpec,
                st.integers(0, len(branches) - 1),
                place,
                st.lists(place, min_size=1, max_size=3).map(tuple),
                st.sampled_from(couplings),
                st.sampled_from(executions),
            ),
            min_size=1,
            max_size=6,
        )
    )
    return ProgramSpec(
        streams,
        tree,
        tuple(branches),
        tuple(steps),
        tuple(draw(st.lists(st.sampled_from(ACTIONS), max_size=4))),
        draw(st.sampled_from(BACKWARDS)),
        draw(st.integers(0, 3)),
    )


class OnTrees(nn.Module):
    """Calls a branch for each leaf of its streams in turn."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, *streams: Any) -> Any:
        return pytree.tree_map(self.branch, *streams)


def couple(name: str, target: Tensor, out: Tensor) -> Tensor:
    """Return the target after a step, from the formulas of the papers."""
    if name == "affine":
        raw, shift = out.chunk(2, -1)
        return target * (2 * (raw / 2).tanh()).exp() + shift
    if name == "momentum":
        return 0.75 * target + 0.25 * out
    return target + {"additive": 1.0, "midpoint": 0.5, "leapfrog": 0.5}[name] * out


class Plain(nn.Module):
    """The program as a loop."""

    def __init__(self, spec: ProgramSpec, branches: nn.ModuleDict) -> None:
        super().__init__()
        self.spec, self.branches = spec, branches

    def forward(self, *streams: Any) -> tuple[Any, ...]:
        found = list(streams)
        for step in self.spec.steps:
            out = self.branches[_key(step)](*(found[i] for i in step.sources))
            update = partial(couple, step.coupling)
            found[step.target] = pytree.tree_map(update, found[step.target], out)
        return tuple(found)


class Integers(Plain):
    """The program as a loop over integers, for rules that add."""

    def forward(self, *streams: Any) -> tuple[Any, ...]:
        counts = [pytree.tree_map(_count, stream) for stream in streams]
        found = list(streams)
        for place, stream in enumerate(found):
            found[place] = pytree.tree_map(_valued, stream, stream, counts[place])
        for step in self.spec.steps:
            i = step.target
            out = self.branches[_key(step)](*(found[j] for j in step.sources))
            added = pytree.tree_map(partial(_increment, step.coupling), out)
            counts[i] = pytree.tree_map(torch.add, counts[i], pytree.tree_map(_count, added))
            smooth = pytree.tree_map(torch.add, found[i], added)
            found[i] = pytree.tree_map(_valued, found[i], smooth, counts[i])
        return tuple(found)


UNIT = 2.0**-24


def _increment(name: str, out: Tensor) -> Tensor:
    return couple(name, torch.zeros_like(out), out)


def _count(x: Tensor) -> Tensor:
    return (x.detach().double() / UNIT).round().long()


def _valued(like: Tensor, smooth: Tensor, count: Tensor) -> Tensor:
    return _Straight.apply(smooth, (count.double() * UNIT).to(like.dtype))


class _Straight(torch.autograd.Function):
    """A value with the gradient of another tensor."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _key(step: StepSpec) -> str:
    # An affine rule needs an output of twice the width.
    return f"{step.branch}{'wide' if step.coupling == 'affine' else ''}"


def _branches(spec: ProgramSpec) -> nn.ModuleDict:
    torch.manual_seed(spec.seed)
    keys = sorted({_key(step) for step in spec.steps})
    return nn.ModuleDict(
        {
            key: BRANCHES[spec.branches[int(key.removesuffix("wide"))]](key.endswith("wide"))
            for key in keys
        }
    )


def build(
    spec: ProgramSpec, dtype: torch.dtype, execution: str | None = None, **options: Any
) -> tuple[nn.Module, nn.ModuleDict]:
    """Return the program as revnet runs it, and its branches."""
    rules = {
        "additive": Additive,
        "momentum": lambda: Momentum(0.75),
        "affine": lambda: Affine(limit=2.0),
        "midpoint": lambda: Midpoint(0.25),
        "leapfrog": lambda: Leapfrog(0.5),
    }
    branches = _branches(spec).to(dtype)
    called = _called(spec, branches)
    steps = [Step(called[_key(s)], s.target, s.sources, rules[s.coupling]()) for s in spec.steps]
    chosen = [s.execution if execution is None else execution for s in spec.steps]
    return Reversible(steps, execution=chosen, **options), branches


def plain(
    spec: ProgramSpec, dtype: torch.dtype, loop: type[Plain] = Plain
) -> tuple[nn.Module, nn.ModuleDict]:
    """Return the program as a loop, and its branches."""
    branches = _branches(spec).to(dtype)
    return loop(spec, _called(spec, branches)), branches


def _called(spec: ProgramSpec, branches: nn.ModuleDict) -> nn.ModuleDict:
    if spec.tree == "tensor":
        return branches
    return nn.ModuleDict({key: OnTrees(branch) for key, branch in branches.items()})


def _total(streams: Any) -> Tensor:
    return weighted(*pytree.tree_leaves(streams))


def _act(action: str, net: nn.Module, branches: nn.ModuleDict, x: list[Any]) -> Tensor | None:
    if action in ("eval", "train"):
        branches.train(action == "train")
    elif action == "call":
        return _total(net(*(pytree.tree_map(lambda leaf: 0.5 * leaf, value) for value in x)))
    elif action == "no_grad":
        with torch.no_grad():
            net(*x)
    for branch in branches.values():
        if action == "scale":
            branch.scale = 0.7 * branch.scale
        elif action == "count" and hasattr(branch, "count"):
            branch.count += 3
        elif action == "clear" and hasattr(branch, "log"):
            branch.log = []
            branch.table = {"last": branch.log}
        elif action == "clear" and hasattr(branch, "state"):
            branch.state = None
    return None


def run(
    spec: ProgramSpec, net: nn.Module, branches: nn.ModuleDict, dtype: torch.dtype
) -> dict[str, Any]:
    """Return all that a run leaves: outputs, gradients, state of the branches, generator."""
    torch.manual_seed(spec.seed + 10)

    def leaf() -> Tensor:
        return torch.randn(2, 3, WIDTH, dtype=dtype, requires_grad=True)

    x = [TREES[spec.tree](leaf) for _ in range(spec.streams)]
    outputs = net(*x)
    losses = [_total(outputs)]
    for action in spec.actions:
        loss = _act(action, net, branches, x)
        if loss is not None:
            losses.append(loss)
    results = pytree.tree_leaves(outputs)
    found: dict[str, Any] = {f"out {i}": out.detach() for i, out in enumerate(results)}
    total = torch.stack(losses).sum()
    inputs = pytree.tree_leaves(x)
    leaves = [*inputs, *branches.parameters()]
    if spec.backward == "retained":
        first = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        found |= {f"first {i}": grad for i, grad in enumerate(first)}
        total.backward()
    elif spec.backward == "partial":
        for i, part in enumerate((leaves[-1:], leaves[:1])):
            grads = torch.autograd.grad(total, part, retain_graph=True, allow_unused=True)
            found[f"part {i}"] = grads[0]
        total.backward()
    elif spec.backward == "plain":
        total.backward()
    else:
        for loss in losses if spec.backward == "one by one" else reversed(losses):
            loss.backward()
    found |= {f"x {i}": value.grad for i, value in enumerate(inputs)} | gradients_of(branches)
    found |= {name: buffer.clone() for name, buffer in branches.named_buffers()}
    for name, branch in branches.items():
        found[f"{name} log"] = torch.tensor([float(v) for v in getattr(branch, "log", ())])
        found[f"{name} count"] = torch.tensor(getattr(branch, "count", 0))
        state = getattr(branch, "state", None)
        found[f"{name} state"] = None if state is None else state[0].clone()
    found["generator"] = torch.get_rng_state()
    return found
