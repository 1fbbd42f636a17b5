"""The rule of two steps, with which an ordinary residual network becomes reversible."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ._couplings import ADDITIVE, Coupling
from ._factors import LARGEST_DENOMINATOR, per_sample, ratio_of, times
from ._trees import tree_leaves, tree_map


class TwoStep(Coupling):
    """Compute `x[n+1] = γ x[n-1] + (1 - γ) x[n] + (1 + γ) f(x[n])`.

    Two streams hold `x[n-1]` and `x[n]`, and steps update them in turn. With γ = 0 this is the
    ordinary residual network `x + f(x)`, so that its weights can be taken over; with γ = 1 the
    midpoint rule. In fixed streams a step takes log2(1/γ) bits per element; with γ = 0, and in
    float streams, it keeps its target.

    BDIA trains with a γ of random sign and evaluates the ordinary network:
    `TwoStep(0.5, random_sign=True)`. Dr²Net, `x[n+1] = β x[n-1] + α x[n] + f(x[n])`, is
    `TwoStep(β, present=α, update=1)`, where β grows while a pretrained network is finetuned.

    Args:
        gamma: γ, from 0 to 1: a fraction, or a decimal number of at most four digits.
        present: factor of `x[n]`, by default 1 - γ.
        update: factor of `f(x[n])`, by default 1 + γ.
        random_sign: in training, draw a sign of γ for each sample and step; in evaluation γ is 0.
            The first dimension of a stream counts samples.
        start: γ before the first call of `advance`, where it follows a schedule.
        steps: how many calls of `advance` take γ from `start` to `gamma`, in equal steps.

    Attributes:
        taken: the calls of `advance` so far, a buffer, so that a state_dict has them.

    Raises:
        ValueError: γ outside of 0 to 1, or with more than four digits.

    Reference: Zhang et al. 2024, arXiv:2407.09093; Zhao et al. 2024, arXiv:2401.04105.
    """

    quiet = True

    reads_source = True
    starts_at_rest = True
    taken: Tensor

    def __init__(
        self,
        gamma: float | Fraction = 0.5,
        *,
        present: float | None = None,
        update: float | None = None,
        random_sign: bool = False,
        start: float | Fraction | None = None,
        steps: int = 0,
        approximate: bool = False,
    ) -> None:
        super().__init__(approximate=approximate)
        self.end = ratio_of(gamma, "TwoStep")
        self.start = self.end if start is None else ratio_of(start, "TwoStep")
        for value in (self.start, self.end):
            if not 0 <= value <= 1:
                raise ValueError(f"TwoStep(gamma={value}): expected a number from 0 to 1")
        if (start is None) != (steps == 0):
            raise ValueError("TwoStep: a schedule takes both start and steps, at least one")
        self.present, self.update = present, update
        self.random_sign = random_sign
        self.steps = steps
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        # Read by each step: a buffer may lie on a device, and reading it would synchronise.
        self._count = 0

    def advance(self) -> None:
        """Take γ one step further; call it after the optimizer's step."""
        self._count += 1
        self.taken = torch.full_like(self.taken, self._count)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._count = int(self.taken)

    @property
    def gamma(self) -> Fraction:
        """Return γ as it is now, without its sign; in evaluation 0 where the sign is random."""
        if self.random_sign and not self.training:
            return Fraction(0)
        if self._count >= self.steps:
            return self.end
        now = self.start + (self.end - self.start) * Fraction(self._count, self.steps)
        return Fraction(round(now * LARGEST_DENOMINATOR), LARGEST_DENOMINATOR)

    @property
    def least_scale(self) -> Fraction | None:  # type: ignore[override]
        """Return γ; None for 0, by which no stream can be divided."""
        return self.gamma or None

    @property
    def forgets(self) -> bool:
        return not self.gamma

    @property
    def first(self) -> Coupling:
        """Return an ordinary residual step, from `x[0]` in both streams."""
        return ADDITIVE

    def receive(self, out: Any) -> Any:
        if not (self.random_sign and self.training):
            return out
        out, *aux = out if isinstance(out, tuple) else (out,)
        leaf = tree_leaves(out)[0]
        sign = torch.randint(2, (len(leaf),), device=leaf.device) * 2 - 1
        return ([out, sign], *aux) if aux else [out, sign]

    def sign(self, out: Any) -> Tensor | None:
        if not (self.random_sign and self.training):
            return None
        sign: Tensor = out[1]
        return sign

    def scale(self, out: Any, source: Any = None) -> Fraction:
        return self.gamma

    def increment(self, out: Any, source: Any = None) -> Any:
        gamma = float(self.gamma)
        sign = self.sign(out)
        if sign is not None:
            out = out[0]

        def sum_of(out: Tensor, source: Tensor) -> Tensor:
            signed: Any = gamma
            if sign is not None:
                signed = gamma * per_sample(sign, source).to(source.dtype)
            update = 1 + signed if self.update is None else self.update
            present = 1 - signed if self.present is None else self.present
            return _product(out, update) + _product(source, present)

        return tree_map(sum_of, out, source)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}" + (", random_sign=True" if self.random_sign else "")


def _product(x: Tensor, factor: Any) -> Tensor:
    return x * factor if isinstance(factor, Tensor) else times(x, factor)
