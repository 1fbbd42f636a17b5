"""What the tests compare with: the plain stored two-stream loop, and counters that share no code
with revnet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Route = Mapping[str, Sequence[tuple[bool, bool]]]
Results = dict[str, Tensor | None]


class _Pair(nn.Module):
    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g


class StoredSequence(nn.Module):
    """The two-stream loop as anyone would write it: autograd keeps everything. Parameter names are
    the sequence's.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[nn.Module, nn.Module]],
        args_route: Route | None = None,
        *,
        split: str = "copy",
        merge: str = "mean",
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Pair(f, g) for f, g in pairs])
        self.args_route = dict(args_route or {})
        self.split, self.merge, self.dim = split, merge, dim

    def keywords(self, depth: int, branch: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the route sends to f (branch 0) or g (branch 1)."""
        return {
            name: value for name, value in given.items() if self.args_route[name][depth][branch]
        }

    def run(
        self, x1: Tensor, x2: Tensor, *, kept: Sequence[int] | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        for depth, block in enumerate(self.blocks):
            if kept is not None and depth not in kept:
                continue
            x1 = x1 + block.f(x2, **self.keywords(depth, 0, given)).to(x1.dtype)
            x2 = x2 + block.g(x1, **self.keywords(depth, 1, given)).to(x2.dtype)
        return x1, x2

    def inverse(self, y1: Tensor, y2: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        for depth, block in reversed(list(enumerate(self.blocks))):
            y2 = y2 - block.g(y1, **self.keywords(depth, 1, given)).to(y2.dtype)
            y1 = y1 - block.f(y2, **self.keywords(depth, 0, given)).to(y1.dtype)
        return y1, y2

    def forward(self, x: Tensor, *, kept: Sequence[int] | None = None, **given: Any) -> Tensor:
        x1, x2 = (x, x) if self.split == "copy" else x.chunk(2, self.dim)
        y1, y2 = self.run(x1, x2, kept=kept, **given)
        if self.merge == "concat":
            return torch.cat((y1, y2), self.dim)
        return (y1 + y2) / 2 if self.merge == "mean" else y1 + y2


def stored_copy(
    pairs: Iterable[tuple[nn.Module, nn.Module]], args_route: Route | None = None, **options: Any
) -> StoredSequence:
    """Returns the stored loop over deep copies of the same branches, sharing between depths
    kept.
    """
    return StoredSequence(copy.deepcopy(list(pairs)), args_route, **options)


def weighted(*outputs: Tensor) -> Tensor:
    """Returns a scalar in which every element of every output counts differently and not
    linearly.
    """
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for place, out in enumerate(outputs):
        weight = torch.arange(1, out.numel() + 1, dtype=torch.float64, device=out.device).view(
            out.shape
        )
        total = (
            total + ((weight + place).cos() * (out.double() + 0.1 * out.double().square())).sum()
        )
    return total


def leaf(value: Any) -> Any:
    """Returns a fresh leaf with the same values for a tensor, and anything else as it is."""
    return (
        value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
    )


class Outcome(NamedTuple):
    """All that one training step leaves behind."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    rng_after_forward: Tensor
    rng_after_backward: Tensor


def train_step(module: nn.Module, x: Tensor, *, seed: int = 0, **given: Any) -> Outcome:
    """Returns what one forward and backward leave, from fresh leaves and the given seed."""
    x, given = leaf(x), {name: leaf(value) for name, value in given.items()}
    torch.manual_seed(seed)
    out = module(x, **given)
    rng_after_forward = torch.get_rng_state()
    if out.requires_grad:
        weighted(out).backward()
    gradients = {"x": x.grad}
    gradients |= {name: value.grad for name, value in given.items() if isinstance(value, Tensor)}
    gradients |= {name: parameter.grad for name, parameter in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return Outcome(out.detach(), gradients, buffers, rng_after_forward, torch.get_rng_state())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference, in units of the norm of what was expected."""
    if not expected.numel():
        return 0.0
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return difference / scale if scale else difference


def assert_near(
    actual: Tensor | None, expected: Tensor | None, name: str = "value", tolerance: float = 1e-12
) -> None:
    """Raises unless both are None, or agree in shape, dtype and (relatively) in value."""
    assert (actual is None) == (expected is None), (
        f"{name}: {actual} where the stored loop has {expected}"
    )
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def assert_same_gradients(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    tolerance: float = 1e-12,
) -> None:
    """Raises unless both name the same tensors and all agree."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_near(actual[name], expected[name], name, tolerance)


def assert_same_step(actual: Outcome, expected: Outcome, tolerance: float = 1e-12) -> None:
    """Raises unless outputs, gradients, buffers and the generator all agree."""
    assert_near(actual.output, expected.output, "output", tolerance)
    assert_same_gradients(actual.gradients, expected.gradients, tolerance)
    assert_same_gradients(actual.buffers, expected.buffers, tolerance)
    assert torch.equal(actual.rng_after_forward, expected.rng_after_forward), (
        "the generator after forward"
    )
    assert torch.equal(actual.rng_after_backward, expected.rng_after_backward), (
        "the generator after backward"
    )


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns copies of the accumulated gradients by parameter name."""
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }


def assert_alike(
    net: nn.Module, oracle: nn.Module, run: Callable[[nn.Module], Results], tolerance: float = 1e-12
) -> None:
    """Raises unless `run`, from one seed, returns the same tensors for both modules and leaves the
    same gradients.
    """
    found = []
    for module in (net, oracle):
        torch.manual_seed(0)
        found.append({**run(module), **gradients_of(module)})
    assert_same_gradients(*found, tolerance)


class Evaluations:
    """Counts how often each branch runs, from the outside, in order."""

    def __init__(self, module: nn.Module) -> None:
        self.order: list[str] = []
        self._handles = [
            getattr(block, branch).register_forward_pre_hook(
                lambda *_, name=f"{depth}.{branch}": self.order.append(name)
            )
            for depth, block in enumerate(module.blocks)
            for branch in ("f", "g")
        ]

    def take(self) -> list[str]:
        """Returns what ran since the last call, and forgets it."""
        taken, self.order = self.order, []
        return taken

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class OperationLog(TorchDispatchMode):
    """The name of every ATen operation, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
