"""The rule that undoes another one: with it, the inverse of a program is a program of steps."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ._couplings import Additive, Coupling
from ._errors import ReversibleError
from ._factors import divided, signed
from ._step import BoundStep
from ._trees import tree_map


class Inverse(Coupling):
    """Compute what `rule.invert` computes, and undo it by `rule.combine`.

    With `y = scale · x + increment`, this is `x = y / scale - increment / scale`: a rule of the
    same form, which fixed streams hold as they hold the rule itself.

    Args:
        rule: the rule of the step that is taken back.
    """

    def __init__(self, rule: Coupling) -> None:
        super().__init__(approximate=rule.approximate)
        self.rule = rule
        self.rearranges = rule.rearranges
        self.scales = rule.scales
        self.linear = rule.linear
        self.translates = rule.translates
        self.least_scale = _least_reciprocal(rule)

    @property
    def state_owner(self) -> Coupling:
        return self.rule.state_owner

    def sign(self, out: Any) -> Tensor | None:
        return self.rule.sign(out)

    def scale(self, out: Any) -> Any:
        scale = self.rule.scale(out)
        if isinstance(scale, Fraction):
            return 1 / scale
        return tree_map(Tensor.reciprocal, scale)

    def increment(self, out: Any) -> Any:
        increment = signed(tree_map(Tensor.neg, self.rule.increment(out)), self.sign(out))
        return divided(increment, self.rule.scale(out)) if self.scales else increment

    def combine(self, target: Any, out: Any) -> Any:
        return self.rule.invert(target, out)

    def invert(self, target: Any, out: Any) -> Any:
        return self.rule.combine(target, out)


def _least_reciprocal(rule: Coupling) -> float | Fraction | None:
    """Return the smallest value of `1 / scale`; None where the rule does not say."""
    if isinstance(rule.least_scale, Fraction):
        return 1 / rule.least_scale
    return None if rule.greatest_scale is None else 1 / rule.greatest_scale


def inverted(parts: Sequence[tuple[int, BoundStep]]) -> list[tuple[int, BoundStep]]:
    """Return the steps that undo these, in the order in which they run.

    Each keeps its number in the program, and with it its execution and its name.

    Raises:
        ReversibleError: a step reads its own target, or its rule forgets it.
    """
    steps = []
    for index, step in reversed(parts):
        if step.coupling.forgets:
            raise ReversibleError(
                f"{step.name}: its rule, {step.coupling.state_owner}, forgets the target and has "
                f"no inverse"
            )
        if step.target in step.source:
            raise ReversibleError(
                f"a step that reads its target, stream {step.target}, has no inverse"
            )
        # A tracer cannot look into a module that is made while it traces.
        traced = torch.compiler.is_dynamo_compiling() and type(step.coupling) is Additive
        rule = _SUBTRACTIVE if traced else Inverse(step.coupling)
        steps.append((index, step._replace(coupling=rule)))
    return steps


def traceable(parts: Sequence[tuple[int, BoundStep]]) -> bool:
    """Check whether a compiled graph can hold the steps that undo these."""
    return all(type(step.coupling) is Additive for _, step in parts)


_SUBTRACTIVE = Inverse(Additive())
