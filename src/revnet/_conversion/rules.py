"""Rules by which converted layers update the streams of their call, and what they hand on."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compiled.function import active
from .._couplings import ADDITIVE, Coupling
from .._factors import Increment
from .._step import SOURCE, BoundStep
from .._streams.reference import computed
from .._torch import current_backward, is_forward_mode


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
    # Whether the rule takes what a layer returns and what it read, and subtracts them itself.
    subtracts = True

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of a new call: v = 0, and x."""
        return torch.zeros_like(x), x

    def readout(self, bits: int, turn: int) -> Readout:
        """Return what a layer of these bits hands on."""
        return Readout(1, 1.0, 1 / (2**bits - 1))

    def steps(
        self, name: str, update: Any, kwargs: dict[str, Any], before: int, bits: int, turn: int
    ) -> list[BoundStep]:
        """Return the steps of a layer: the kick, and the drift."""
        return [
            BoundStep(name, update, _kick(before, bits), 0, (1,), kwargs),
            BoundStep(f"{name}, drift", SOURCE, ADDITIVE, 1, (0,), {}),
        ]


class TwoStreams:
    """`a ← a + f(b)`, and in the next layer `b ← b + f(a)`: read as the mean of both."""

    steps_per_layer = 1
    subtracts = False

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of a new call: x twice."""
        return x, x

    def readout(self, bits: int, turn: int) -> Readout:
        """Return what a layer hands on; a layer after it reads the stream that it left alone."""
        return Readout(turn % 2, 0.5, 0.5)

    def steps(
        self, name: str, update: Any, kwargs: dict[str, Any], before: int, bits: int, turn: int
    ) -> list[BoundStep]:
        """Return the one step of a layer."""
        return [BoundStep(name, update, ADDITIVE, turn % 2, (1 - turn % 2,), kwargs)]


RULES: dict[str, Momentum | TwoStreams] = {"momentum": Momentum(), "two-stream": TwoStreams()}


class _Kick(Coupling):
    """`v = a · v + b · f`, where f is the difference of two tensors in a list."""

    quiet = True

    def __init__(self, keep: Fraction, gain: float) -> None:
        super().__init__()
        self.least_scale = self.keep = keep
        self.gain = gain

    def scale(self, out: Any) -> Fraction:
        return self.keep

    def increment(self, out: Any) -> Any:
        return computed(self.factored(out))

    def factored(self, out: Any) -> Increment:
        # In bfloat16 the difference, and the product, would lose digits that a fixed stream holds.
        return Increment(out[0], self.gain, out[1])


@cache
def _kick(before: int, bits: int) -> _Kick:
    """Return the rule of a layer of these bits, after one of those."""
    return _Kick(Fraction(2**bits - 1, 2**bits * (2**before - 1)), 1 - 2.0**-bits)


class _HandOn(torch.autograd.Function):
    """The readout of two streams, for transforms. Its node carries the open call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor, hidden: Tensor, own: float, other: float, dtype: torch.dtype
    ) -> Tensor:
        return _readout(value, hidden, own, other, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factors, ctx.dtype, ctx.returned = inputs[2:4], inputs[0].dtype, inputs[4]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        ctx.__dict__.pop("open_call", None)
        own, other = ctx.factors
        if grad is None:
            return None, None, None, None, None
        grad = grad.to(ctx.dtype)
        return grad if own == 1.0 else grad * own, grad * other, None, None, None

    @staticmethod
    def jvp(ctx: Any, value: Tensor | None, hidden: Tensor | None, *_: Any) -> Tensor | None:
        own, other = ctx.factors
        parts = (value, own), (hidden, other)
        tangents = [tangent * factor for tangent, factor in parts if tangent is not None]
        return sum(tangents[1:], tangents[0]).to(ctx.returned) if tangents else None


class _HandOnNow(torch.autograd.Function):
    """The readout of two streams: `setup_context` would bind the arguments by inspection."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, hidden: Tensor, own: float, other: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.factors, ctx.dtype = (own, other), value.dtype
        ctx.set_materialize_grads(False)
        return _readout(value, hidden, own, other, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        backward, sent = ctx.__dict__.pop("sent", (None, None))
        if sent is None or backward != current_backward():
            return _HandOn.backward(ctx, grad)
        ctx.__dict__.pop("open_call", None)
        own, other = ctx.factors
        if grad is None:
            return None, -other * sent.to(ctx.dtype), None, None, None
        value = grad.to(ctx.dtype)
        value = value if own == 1.0 else value * own
        if grad is sent:
            return value, None, None, None, None
        # A hook, or whoever else read the tensor, adds to the gradient.
        return value, (grad - sent).to(ctx.dtype) * other, None, None, None


def _readout(value: Tensor, hidden: Tensor, own: float, other: float, dtype: torch.dtype) -> Tensor:
    if own == 1.0:
        return torch.add(value, hidden, alpha=other).to(dtype)
    return ((value + hidden) * own).to(dtype)


def hand_on(value: Tensor, hidden: Tensor, own: float, other: float, dtype: torch.dtype) -> Tensor:
    """Return the readout of two streams, a tensor of its own."""
    function: Any = _HandOn if active() or is_forward_mode() else _HandOnNow
    y: Tensor
    if torch.is_inference_mode_enabled():
        # Writes to an inference tensor are not counted, and the model may write to this one.
        with torch.inference_mode(False), torch.no_grad():
            y = function.apply(value, hidden, own, other, dtype)
    else:
        y = function.apply(value, hidden, own, other, dtype)
    return y


# The nodes of readouts.
NODES: tuple[Any, ...] = (_HandOn._backward_cls, _HandOnNow._backward_cls)


class _TakeUp(torch.autograd.Function):
    """What `take_up` returns, for transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(given: Tensor, hidden: Tensor, value: Tensor, own: float, other: float) -> Tensor:
        # The tangent of a view must be a view, and a batch of tangents has none.
        return value.clone() if is_forward_mode() else value.view_as(value)

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

    @staticmethod
    def jvp(ctx: Any, given: Any, hidden: Any, value: Tensor | None, *_: Any) -> Tensor | None:
        # That of the readout, less its share of the other stream: the value has this tangent.
        return value


class _TakeUpNow(torch.autograd.Function):
    """What `take_up` returns, without the inspection of `setup_context`.

    Of the readout `own · x + other · v`, and of x as a function of it and v, the gradients for v
    cancel. Neither is computed, then: this node tells that of the readout what it sent there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        hidden: Tensor,
        value: Tensor,
        own: float,
        other: float,
        node: Any,
    ) -> Tensor:
        ctx.own, ctx.dtype, ctx.node = own, given.dtype, node
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None, None, None
        given = (grad if ctx.own == 1.0 else grad * (1 / ctx.own)).to(ctx.dtype)
        vars(ctx.node)["sent"] = current_backward(), given
        return given, None, None, None, None, None


def take_up(
    given: Tensor, hidden: Tensor, value: Tensor, own: float, other: float, node: Any
) -> Tensor:
    """Return a stream, as a function of the readout that a layer was given and the other stream.

    Its value is known. Its gradient reaches the earlier layers through the tensor that the layer
    was given, where hooks of the model sit.

    Args:
        given: the readout, as the layer was given it.
        hidden: the other stream.
        value: of the stream.
        own: the factor of the stream in the readout.
        other: the factor of the other stream.
        node: of the readout in the graph.
    """
    stream: Tensor
    if type(node) is _HandOnNow._backward_cls and not active():
        stream = _TakeUpNow.apply(given, hidden, value, own, other, node)
    else:
        stream = _TakeUp.apply(given, hidden, value, own, other)
    return stream
