"""Every operator of torch as the last one that saves: a replay stops after it has returned, never
inside it.

The operators and their inputs are those that torch tests itself with, one sample of each.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from oracle import relative_error, weighted
from revnet import Reversible, Step

# What must run at least: fewer would mean that samples are skipped, not that they agree.
LEAST = 300
# Those that replay a step for what it saved alone.
EXECUTIONS = ("checkpoint", "select")


def operators() -> list[Any]:
    """Return what torch knows of its operators."""
    # Only torch's own tests compare with recorded texts, for which this package is there.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stand_in)
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo import core

    # It looks for the test of torch that asks, through all frames: for each sample, in the deep
    # stack of pytest, longer than the operator takes. Each module has its own name for the search.
    for module in (common_utils, core):
        module.extract_test_fn = lambda: None
    return [op for op in op_db if op.supports_autograd]


def differentiable(tree: Any) -> list[Tensor]:
    """Return the float64 tensors of a tree to which a gradient may flow."""
    return [
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor)
        and leaf.dtype is torch.float64
        and leaf.layout is torch.strided
        and leaf.requires_grad
    ]


class Branch:
    """An operator with all arguments but the first; what it returns is a list of tensors.

    What follows the operator saves nothing, so a replay may stop as soon as it has saved.
    """

    def __init__(self, op: Any, sample: Any) -> None:
        self.op, self.args, self.kwargs = op, sample.args, sample.kwargs
        self.transform = sample.output_process_fn_grad
        self.others = [
            leaf for leaf in differentiable((sample.args, sample.kwargs)) if leaf.is_leaf
        ]

    def __call__(self, x: Any) -> list[Tensor]:
        return differentiable(self.transform(self.op(x, *self.args, **self.kwargs)))


def fresh(tree: Any) -> Any:
    """Return the tree with new leaves of the autograd graph in place of its tensors."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return pytree.tree_map(copy, tree)


def gradients(run: Callable[..., Any], branch: Branch, x: Any, targets: list[Tensor]) -> list[Any]:
    """Return the outputs and the gradients of one step from a fixed seed."""
    x, targets = fresh(x), fresh(targets)
    torch.manual_seed(3)
    outputs = pytree.tree_leaves(run(targets, x)[0])
    wanted = [*differentiable(x), *targets, *branch.others]
    found = torch.autograd.grad(weighted(*outputs), wanted, allow_unused=True)
    return [out.detach() for out in outputs] + list(found)


def samples(op: Any) -> Iterator[tuple[Branch, Any, list[Tensor]]]:
    """Yield the first sample with which ordinary autograd differentiates the operator."""
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        streams = pytree.tree_leaves(sample.input)
        if not differentiable(sample.input) or len(differentiable(sample.input)) != len(streams):
            return
        branch = Branch(op, sample)
        targets = [torch.zeros_like(out).requires_grad_() for out in branch(fresh(sample.input))]
        if sum(target.numel() for target in targets):
            yield branch, sample.input, targets
        return


def stored(branch: Branch) -> Callable[..., Any]:
    """Return the step as anyone would write it."""

    def run(targets: list[Tensor], x: Any) -> Any:
        return [target + out for target, out in zip(targets, branch(x), strict=True)], x

    return run


def worst(op: Any) -> float | None:
    """Return the largest error of an operator's gradients; None where it has no sample to try."""
    try:
        case = next(samples(op), None)
        if case is None:
            return None
        branch, x, targets = case
        want = gradients(stored(branch), branch, x, targets)
    except Exception:
        # Not implemented here, not deterministic, or without a gradient for this sample.
        return None
    errors = []
    for execution in EXECUTIONS:
        net = Reversible([Step(branch, 0, 1)], streams="float", execution=execution)
        found = gradients(net, branch, x, targets)
        errors += [_error(a, b) for a, b in zip(found, want, strict=True)]
    return max(errors)


def _error(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    # NaN where both have it is no difference; where one of them has it, it is.
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    return relative_error(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.slow
def test_a_replay_stops_after_the_operator_that_saved_last():
    ran, wrong = 0, []
    with warnings.catch_warnings():
        # The samples use, on purpose, what torch warns of.
        warnings.simplefilter("ignore")
        for op in operators():
            # Uninitialised memory is NaN; some samples switch that off.
            torch.use_deterministic_algorithms(True)
            try:
                error = worst(op)
            except Exception as found:
                wrong.append(f"{op.formatted_name}: {type(found).__name__}: {found}")
                continue
            if error is None:
                continue
            ran += 1
            if error > 1e-12:
                wrong.append(f"{op.formatted_name}: {error:.1e}")
    print(f"{ran} operators ran")
    assert not wrong, f"{len(wrong)} wrong, {ran} ran: " + ", ".join(wrong)
    assert ran >= LEAST, f"{ran} operators ran, fewer than {LEAST}"
