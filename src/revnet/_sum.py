"""A branch that is a sum of branches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ._tile import added
from ._torch import compile_branch
from ._trees import branch_output, tree_map


class Sum(nn.ModuleList):
    """Compute the sum of several branches, each of which is a step of its own.

    Attention is a sum over groups of heads. As additive steps on the same streams the groups give
    what one attention gives, and the activations of one group live at a time.

    In a `ReversibleSequence` whose rule is `Additive`, `Midpoint` or `Leapfrog` each branch is
    called by itself. Elsewhere the sum is one branch: in a `Step`, a tile, a compiled graph, a
    `SequentialSequence`, and with hooks on the sum. In a program, give each branch a `Step`.

    Args:
        branches: modules that map a stream to a tensor of its shape, or to `(tensor, aux)`. All are
            given the keywords of the sum. Their extra outputs are added up.

    Raises:
        ValueError: no branches.

    Example:
        >>> f = Sum([nn.Linear(8, 8), nn.Linear(8, 8)])
        >>> net = ReversibleSequence([(f, nn.Linear(8, 8))])
        >>> net(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__(branches)
        if len(self) == 0:
            raise ValueError("Sum is empty: give at least one branch")

    def forward(self, *sources: Any, **kwargs: Any) -> Any:
        """Return the sum of what the branches return."""
        total, extra = None, None
        for number, branch in enumerate(self):
            out, aux = branch_output(branch(*sources, **kwargs), sources[0] if sources else None)
            total = out if total is None else tree_map(lambda a, b: a + b, total, out)
            extra = extra if aux is None else added(extra, aux, f"branch {number} of the sum")
        return total if extra is None else (total, extra)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each branch by itself, as each is a step of its own."""
        for branch in self:
            compile_branch(branch, *args, **options)

    @property
    def divides(self) -> bool:
        """Return whether nothing but the branches runs when the sum is called."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks
        # FSDP2 puts another class in the place of this one.
        return (
            type(self) is Sum
            and not any((*hooks, self._backward_pre_hooks))
            and self._compiled_call_impl is None
            and "forward" not in vars(self)
        )
