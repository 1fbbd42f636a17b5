"""One function applied many times: reversible integration of an ordinary differential equation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._compiled.function import outside
from ._couplings import ADDITIVE, Coupling
from ._execution import ExecutionName
from ._factors import Increment
from ._program import BoundSteps, Program, Streams, check_stream
from ._state.structure import Memory, Structure
from ._step import BoundStep
from ._streams.fixed import Fixed
from ._streams.monitor import RangeMonitor
from ._trees import tree_leaves, tree_map


def integrate(
    f: Callable[[Tensor, Any], Any],
    x: Any,
    ts: Sequence[float] | Tensor,
    method: Literal["midpoint", "leapfrog"] = "midpoint",
    *,
    streams: Streams = "auto",
    execution: ExecutionName = "invert",
) -> Any:
    """Return the solution of `dx/dt = f(t, x)` at the last time, from x at the first.

    Activations are rebuilt in backward: memory does not grow with the number of steps, and
    gradients are those of the discrete steps; with `streams="fixed"` they equal those of stored
    execution in every bit. One step goes from each time to the next, with one evaluation of f and
    an error of second order:

    `"midpoint"` (diffrax's `LeapfrogMidpoint`) starts with an Euler step. It does not damp: where
    f contracts, an error that alternates from step to step grows with `|f'| t`.

        x[n+1] = x[n-1] + (t[n+1] - t[n-1]) f(t[n], x[n])

    `"leapfrog"` (velocity Verlet) solves `d²x/dt² = f(t, x)` for a pair of position and velocity.

        v += h/2 f(t[n], x);  x += h v;  v += h/2 f(t[n+1], x)

    Args:
        f: a module or another callable, called as `f(t, x)` with t a tensor without dimensions and
            x as given (with `"leapfrog"`, the position). It returns the structure, shapes and
            device of its x.
        x: a tensor, or a tree of tensors, floating-point; for `"leapfrog"` a pair
            `(position, velocity)` of equal structures.
        ts: (steps + 1,) times in their order, a list of numbers or a floating-point tensor.
            Gradients reach a tensor that requires them.
        method: `"midpoint"` or `"leapfrog"`.
        streams: as in `revnet.ReversibleSequence`.
        execution: of all steps: `"invert"`, `"store"`, `"checkpoint"`, `"offload"` or `"select"`.

    Returns:
        x at `ts[-1]`, in the structure and dtype of x.

    Raises:
        ValueError, TypeError: an unknown method, fewer than two times, x or ts of another type.
        ReversibleError: a stream left the range of its format; on CUDA only once the news has
            reached the host, and until then the solution is NaN there.

    Example:
        >>> f = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> integrate(lambda t, x: f(x), torch.randn(8, 2), torch.linspace(0, 1, 1001)).shape
        torch.Size([8, 2])

    Reference: Gal et al. 2025, arXiv:2512.02056; Hairer et al. 2003, doi:10.1017/S0962492902000144.
    """
    if method not in _METHODS:
        raise ValueError(f"integrate: method {method!r} is not 'midpoint' or 'leapfrog'")
    if torch.compiler.is_dynamo_compiling():
        again = partial(integrate, f, x, ts, method, streams=streams, execution=execution)
        return outside(again)
    begin, end = _METHODS[method]
    program = _Integration(f, method, _times(ts, _first_leaf(begin(x))), streams, execution)
    return end(program(*begin(x)), program.steps)


def _first_leaf(given: tuple[Any, Any]) -> Tensor:
    """Return the first tensor of the streams, all of which are checked."""
    leaves: list[Tensor] = [leaf for stream in given for leaf in tree_leaves(stream)]
    if not leaves:
        raise TypeError("integrate: x holds no tensors")
    for leaf in leaves:
        check_stream(leaf, "x")
    return leaves[0]


def _times(ts: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Return the times as a tensor on the device of the streams."""
    if not isinstance(ts, Tensor):
        wide = like.dtype if like.dtype is torch.float64 else torch.float32
        ts = torch.as_tensor(ts, dtype=wide)
    if not ts.is_floating_point():
        raise TypeError(f"integrate: ts is {ts.dtype}, but times are floating-point")
    if ts.dim() != 1 or len(ts) < 2:
        raise ValueError(
            f"integrate: ts has shape {tuple(ts.shape)}, but it takes at least two times in one "
            f"dimension"
        )
    return ts.to(like.device)


class _Field(nn.Module):
    """Evaluate f, times the length of the step."""

    def __init__(self, f: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Any, t: Tensor, h: Tensor) -> Any:
        return tree_map(lambda leaf: leaf * h, self.f(t, x))


class _Drift(nn.Module):
    """Multiply the velocity by the length of the step."""

    def forward(self, v: Any, h: Tensor) -> Any:
        return tree_map(lambda leaf: leaf * h, v)


class _FewStructures(Memory):
    """What earlier steps found, by branch: thousands of steps share one or two."""

    def structure(
        self, number: Any, fn: nn.Module, coupling: Coupling, given: Iterable[nn.Module] = ()
    ) -> Structure:
        return super().structure(id(fn), fn, coupling, given)


class _OneSample(RangeMonitor):
    """Measure how many increments vanish in the first step alone: all steps are alike."""

    def sample(self, increment: Tensor | Increment, fraction_bits: int, step: int) -> None:
        if step == 0:
            super().sample(increment, fraction_bits, step)


class _Integration(Program):
    """The steps of one call of `integrate`."""

    def __init__(
        self,
        f: Callable[[Tensor, Any], Any],
        method: str,
        ts: Tensor,
        streams: Streams,
        execution: ExecutionName,
    ) -> None:
        steps = len(ts) - 1
        count = steps if method == "midpoint" else 2 * steps + 1
        super().__init__(count, streams, execution)
        self.steps, self.ts, self.method = steps, ts, method
        self._memory, self._monitor = _FewStructures(), _OneSample()
        self.field, self.drift = _Field(f), _Drift()

    def forward(self, *streams: Any) -> tuple[Any, ...]:
        """Return the streams after the last step."""
        outputs = self._run(streams, {})[: len(streams)]
        fixed = self.streams if isinstance(self.streams, Fixed) else Fixed()
        self._raise(self._monitor.poll(), fixed)
        return outputs

    def _parts(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundSteps:
        return self._midpoint() if self.method == "midpoint" else self._leapfrog()

    def _midpoint(self) -> BoundSteps:
        ts = self.ts
        lengths = torch.cat((ts[1:2] - ts[:1], ts[2:] - ts[:-2]))
        times = zip(ts[:-1].unbind(), lengths.unbind(), strict=True)
        # Both streams start as x, so that the first step, on one of them, is an Euler step.
        return [
            self._step(i, self.field, (i + 1) % 2, i % 2, {"t": t, "h": h})
            for i, (t, h) in enumerate(times)
        ]

    def _leapfrog(self) -> BoundSteps:
        ts = self.ts
        lengths = ts.diff()
        halves = lengths / 2
        kicks = torch.cat((halves[:1], halves[:-1] + halves[1:], halves[-1:]))
        steps = []
        drifts = lengths.unbind()
        for i, (t, h) in enumerate(zip(ts.unbind(), kicks.unbind(), strict=True)):
            steps.append(self._step(2 * i, self.field, 1, 0, {"t": t, "h": h}))
            if i < self.steps:
                steps.append(self._step(2 * i + 1, self.drift, 0, 1, {"h": drifts[i]}))
        return steps

    @staticmethod
    def _step(
        index: int, fn: nn.Module, target: int, source: int, keywords: dict[str, Tensor]
    ) -> tuple[int, BoundStep]:
        name = f"step {index}"
        return index, BoundStep(name, fn, ADDITIVE, target, (source,), keywords)


def _both(x: Any) -> tuple[Any, Any]:
    return x, x


def _latest(streams: Sequence[Any], steps: int) -> Any:
    """Return the stream that the last of the steps updated."""
    return streams[steps % 2]


def _pair(x: Any) -> tuple[Any, Any]:
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(
            f"integrate: x is {type(x).__name__}, but method 'leapfrog' takes a pair "
            f"(position, velocity)"
        )
    return x[0], x[1]


def _pair_again(streams: Sequence[Any], steps: int) -> Any:
    return tuple(streams)


# Of each method, the streams that it starts with, and the solution in those that it ends with.
_METHODS: dict[str, tuple[Callable[[Any], tuple[Any, Any]], Callable[[Sequence[Any], int], Any]]]
_METHODS = {"midpoint": (_both, _latest), "leapfrog": (_pair, _pair_again)}
