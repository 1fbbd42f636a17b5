"""What streams are multiplied by: numbers, tensors and signs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._trees import tree_map


class Increment(NamedTuple):
    """What a step adds: `gain · (addend - less)`, of tensors or equal trees of tensors."""

    addend: Any
    gain: float = 1.0
    less: Any = None

    @property
    def parts(self) -> tuple[Any, ...]:
        """Return the tensors or trees of which it is made."""
        return (self.addend,) if self.less is None else (self.addend, self.less)

    def with_parts(self, parts: Iterable[Any]) -> Increment:
        """Return the same of other tensors or trees, as many."""
        addend, *less = parts
        return Increment(addend, self.gain, *less)


def times(x: Tensor, factor: float) -> Tensor:
    """Return a tensor times a number."""
    # Multiplying by a Python number keeps it for backward as a tensor of its own, outside all
    # hooks.
    return torch.ops.aten.mul.Scalar(x, factor)  # type: ignore[no-any-return]


def _multiply(target: Tensor, scale: Any) -> Tensor:
    return target * scale.to(target.dtype) if isinstance(scale, Tensor) else times(target, scale)


def _divide(target: Tensor, scale: Any) -> Tensor:
    if isinstance(scale, Tensor):
        return target / scale.to(target.dtype)
    return torch.ops.aten.div.Scalar(target, scale)  # type: ignore[no-any-return]


def _scaled(target: Any, scale: Any, apply: Callable[[Tensor, Any], Tensor]) -> Any:
    if isinstance(scale, Fraction):
        return tree_map(lambda leaf: apply(leaf, number(scale)), target)
    return tree_map(apply, target, scale)


def signed(target: Any, sign: Tensor | None) -> Any:
    """Return a stream times what `Coupling.sign` returned."""
    if sign is None:
        return target
    return tree_map(lambda leaf: leaf * per_sample(sign, leaf).to(leaf.dtype), target)


def per_sample(factor: Tensor, leaf: Tensor) -> Tensor:
    """Return one factor per sample, (batch,), in a shape that multiplies `leaf`, (batch, ...)."""
    return factor.view(-1, *(1,) * (leaf.dim() - 1))


def multiplied(target: Any, scale: Any) -> Any:
    """Return a stream times what `Coupling.scale` returned."""
    return _scaled(target, scale, _multiply)


def divided(target: Any, scale: Any) -> Any:
    """Return a stream divided by what `Coupling.scale` returned."""
    return _scaled(target, scale, _divide)


def number(fraction: Fraction) -> float:
    """Return a fraction as a float."""
    # What float(fraction) is, which torch 2.11 cannot trace.
    return fraction.numerator / fraction.denominator


# Of a larger one, few digits would fit into a buffer.
LARGEST_DENOMINATOR = 10_000


def ratio_of(gamma: float | Fraction, rule: str) -> Fraction:
    """Return γ as the decimal number that was written, not the binary one that is nearest."""
    ratio = Fraction(str(gamma))
    if ratio.denominator > LARGEST_DENOMINATOR:
        raise ValueError(
            f"{rule}(gamma={gamma}): expected at most four decimal digits, or a Fraction with a "
            f"denominator up to {LARGEST_DENOMINATOR}"
        )
    return ratio
