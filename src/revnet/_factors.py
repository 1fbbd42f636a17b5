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


class Factor(NamedTuple):
    """What a step multiplies by: `least / denominator`, or tensors of at least that.

    Args:
        least: the smallest numerator.
        denominator: of all factors; tensors are rounded to multiples of 1 / denominator.
        scale: positive factors, a tensor or a tree of them; None where there is one for all.
    """

    least: int
    denominator: int
    scale: Any = None


# The denominator of factors that are tensors, and what their numerators stay below: a larger one
# times a remainder would overflow.
DENOMINATOR = 2**24
NUMERATORS = 2**38


def factor_of(scale: Any, least: Any) -> Factor:
    """Return what `Coupling.scale` returned, whose smallest value is `least`, as a factor."""
    if isinstance(scale, Fraction):
        return Factor(scale.numerator, scale.denominator)
    # A bfloat16 factor may have been rounded to less than the bound.
    return Factor(max(1, int(0.98 * least * DENOMINATOR)), DENOMINATOR, scale)


def times(x: Tensor, factor: float) -> Tensor:
    """Return a tensor times a number."""
    # Multiplying by a Python number keeps it for backward as a tensor of its own, outside all
    # hooks.
    return torch.ops.aten.mul.Scalar(x, factor)  # type: ignore[no-any-return]


def multiply(target: Tensor, scale: Any) -> Tensor:
    """Return a tensor times a number or a tensor, in its dtype."""
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
    return _scaled(target, scale, multiply)


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
