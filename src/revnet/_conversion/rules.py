"""Rules by which converted layers update the streams of their call, and what they hand on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._couplings import Additive, Coupling
from .._step import BoundStep, Step


class Readout(NamedTuple):
    """What a layer returns: `own · streams[place] + other · streams[1 - place]`."""

    place: int
    own: float
    other: float


class Momentum:
    """`v ← a v + b f(x)`, then `x ← x + v`: read as `x + c v`, the residual stream of the network.

    With `c = μ/(1-μ)` after a layer and `c₋` before it, `b = 1-μ` and `a = c₋ (1-μ)` (which is μ
    where c₋ = c), the readout grows by `f(x)` exactly.
    """

    steps_per_layer = 2

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of a new call: v = 0, and x."""
        return torch.zeros_like(x), x

    def readout(self, bits: int, turn: int) -> Readout:
        """Return what a layer of these bits hands on."""
        return Readout(1, 1.0, 1 / (2**bits - 1))

    def steps(
        self, name: str, layer: nn.Module, kwargs: dict[str, Any], before: int, bits: int, turn: int
    ) -> list[BoundStep]:
        """Return the steps of a layer: the kick, and the drift."""
        kick = _Kick(Fraction(2**bits - 1, 2**bits * (2**before - 1)), 1 - 2.0**-bits)
        return [
            BoundStep(name, layer, kick, 0, (1,), kwargs),
            BoundStep(f"{name}, drift", _drift(), _ADDITIVE, 1, (0,), {}),
        ]


class TwoStreams:
    """`a ← a + f(b)`, and in the next layer `b ← b + f(a)`: read as the mean of both."""

    steps_per_layer = 1

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of a new call: x twice."""
        return x, x

    def readout(self, bits: int, turn: int) -> Readout:
        """Return what a layer hands on; a layer after it reads the stream that it left alone."""
        return Readout(turn % 2, 0.5, 0.5)

    def steps(
        self, name: str, layer: nn.Module, kwargs: dict[str, Any], before: int, bits: int, turn: int
    ) -> list[BoundStep]:
        """Return the one step of a layer."""
        return [BoundStep(name, layer, _ADDITIVE, turn % 2, (1 - turn % 2,), kwargs)]


RULES: dict[str, Momentum | TwoStreams] = {"momentum": Momentum(), "two-stream": TwoStreams()}


class _Kick(Coupling):
    """`v = a · v + b · f`."""

    def __init__(self, keep: Fraction, gain: float) -> None:
        super().__init__()
        self.least_scale = self.keep = keep
        self.gain = gain

    def scale(self, out: Any) -> Fraction:
        return self.keep

    def increment(self, out: Any) -> Any:
        # Of a bfloat16 difference the product would lose digits that a fixed stream holds.
        wide = out if out.dtype in (torch.float32, torch.float64) else out.float()
        return torch.ops.aten.mul.Scalar(wide, self.gain)


_ADDITIVE = Additive()
_DRIFT: list[Step] = []


def _drift() -> Step:
    """Return the step that adds v to x, one for all layers."""
    if not _DRIFT:
        _DRIFT.append(Step(None, 1, 0))
    return _DRIFT[0]


class HandOn(torch.autograd.Function):
    """The readout of two streams. Its node carries the open call, which dies with it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor, hidden: Tensor, own: float, other: float, dtype: torch.dtype
    ) -> Tensor:
        if own == 1.0:
            return torch.add(value, hidden, alpha=other).to(dtype)
        return ((value + hidden) * own).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factors, ctx.dtype = inputs[2:4], inputs[0].dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        ctx.__dict__.pop("open_call", None)
        own, other = ctx.factors
        if grad is None:
            return None, None, None, None, None
        grad = grad.to(ctx.dtype)
        return grad if own == 1.0 else grad * own, grad * other, None, None, None


class TakeUp(torch.autograd.Function):
    """A stream, as a function of the readout that a layer was given and of the other stream.

    Its value is known. Its gradient reaches the earlier layers through the tensor that the layer
    was given, where hooks of the model sit.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(given: Tensor, hidden: Tensor, value: Tensor, own: float, other: float) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given, _, _, own, other = inputs
        ctx.factors, ctx.dtype = (1 / own, -other / own), given.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None, None
        own, other = ctx.factors
        given = (grad if own == 1.0 else grad * own).to(ctx.dtype)
        return given, grad * other, None, None, None
