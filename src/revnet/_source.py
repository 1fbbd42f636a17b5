"""Rules that read the source of their step."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from ._couplings import Coupling
from ._trees import branch_output


class WithSource(Coupling):
    """Make a rule that reads the source one of the branch's output alone.

    The output is the pair of what the branch returned and what it read; see `received`.

    Args:
        rule: a rule with `reads_source`.
    """

    def __init__(self, rule: Coupling) -> None:
        super().__init__(approximate=rule.approximate)
        self.rule = rule
        self.rearranges = rule.rearranges
        self.scales = rule.scales
        self.linear = rule.linear
        self.translates = rule.translates
        self.least_scale = rule.least_scale
        self.greatest_scale = rule.greatest_scale

    @property
    def state_owner(self) -> Coupling:
        return self.rule

    @property
    def forgets(self) -> bool:
        return self.rule.forgets

    def scale(self, out: Any) -> Any:
        return self.rule.scale(*out) if self.scales else Fraction(1)

    def increment(self, out: Any) -> Any:
        return self.rule.increment(*out)

    def sign(self, out: Any) -> Tensor | None:
        return self.rule.sign(out[0])

    def combine(self, target: Any, out: Any) -> Any:
        if self.linear:
            return super().combine(target, out)
        return self.rule.combine(target, *out)

    def invert(self, target: Any, out: Any) -> Any:
        if self.linear:
            return super().invert(target, out)
        return self.rule.invert(target, *out)


def rule_of(coupling: Coupling) -> Coupling:
    """Return the rule by which the engine combines: of the branch's output alone."""
    return WithSource(coupling) if coupling.reads_source else coupling


def received(coupling: Coupling, out: Any, sources: tuple[Any, ...]) -> Any:
    """Return what a branch returned as `rule_of` the coupling takes it."""
    if not coupling.reads_source:
        return coupling.receive(out)
    source = sources[0] if len(sources) == 1 else sources
    out, aux = branch_output(coupling.receive(out), source)
    # A list, because a tuple would be a branch's update and extra output.
    return [out, source] if aux is None else ([out, source], aux)


class Adapter:
    """Stand between a step and its branch, whose modules are those of the step."""

    branch: nn.Module


def branch_of(fn: Any) -> Any:
    """Return the branch that a step evaluates, perhaps through an adapter."""
    return fn.branch if isinstance(fn, Adapter) else fn


class Receiving(Adapter, nn.Module):
    """A branch, whose output is handed to a rule as a `Step` does it.

    Args:
        branch: the branch.
        coupling: the rule.
    """

    def __init__(self, branch: nn.Module, coupling: Coupling) -> None:
        super().__init__()
        self.branch = branch
        self.coupling = coupling

    def forward(self, *sources: Any, **kwargs: Any) -> Any:
        """Return the output of the branch as the rule takes it."""
        return received(self.coupling, self.branch(*sources, **kwargs), sources)


def receiving(branch: nn.Module, coupling: Coupling) -> nn.Module:
    """Return a branch for steps with this rule: the branch itself, where that does."""
    plain = type(coupling).receive is Coupling.receive and not coupling.reads_source
    return branch if plain else Receiving(branch, coupling)
