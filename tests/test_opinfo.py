"""Every operator of torch in a branch: a replay stops early, and finds what the operator saved.

Some operators fill what they save after saving it, and some save what a replay must not share. The
operators and their inputs are those with which torch tests itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revnet import Reversible, ReversibleError, Step

# Fewer would mean that the enumeration broke.
LEAST = 300


class Applied(nn.Module):
    """Applies an operator to its stream and to fixed other arguments.

    The result is summed into the shape of the stream.
    """

    def __init__(self, op: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.op, self.args, self.kwargs = op, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        # A copy, since some operators write to what they are given.
        first = x * 1
        out = self.op(first, *self.args, **self.kwargs)
        parts = [leaf for leaf in pytree.tree_leaves(out) if _differentiable(leaf)]
        total = sum((part * part.cos()).sum() for part in parts)
        return total.expand(x.shape) + 0


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float64 and value.requires_grad


def _plain(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.layout == torch.strided


def operators() -> Iterator[tuple[str, Any, Tensor, Any, Any]]:
    """Go through the operators that have a gradient, with the first input of torch's own tests."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        name = f"{op.name} {op.variant_test_name}".strip()
        if not op.supports_autograd or torch.float64 not in op.supported_dtypes("cpu"):
            continue
        try:
            samples = op.sample_inputs("cpu", torch.float64, requires_grad=False)
            sample = next(
                s
                for s in samples
                if isinstance(s.input, Tensor)
                and s.input.dtype is torch.float64
                and s.input.numel()
                and _plain(s.input)
            )
        except (StopIteration, RuntimeError, NotImplementedError, ImportError):
            continue
        others = [
            leaf.detach() if isinstance(leaf, Tensor) else leaf
            for leaf in pytree.tree_leaves((sample.args, sample.kwargs))
        ]
        _, spec = pytree.tree_flatten((sample.args, sample.kwargs))
        args, kwargs = pytree.tree_unflatten(others, spec)
        yield name, op.op, sample.input.detach().clone(), args, kwargs


def _gradients(branch: nn.Module, x: Tensor, execution: str | None) -> list[Tensor]:
    """Return the gradient twice; `None` for the execution is ordinary autograd without revnet."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    other = torch.zeros_like(x, requires_grad=True)
    if execution is None:
        y = other + branch(x)
    else:
        y = Reversible([Step(branch)], execution=execution, streams="float")(other, x)[0]
    loss = (y * y.detach().cos()).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    return [first, torch.autograd.grad(loss, x)[0]]


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.slow
def test_operators(record_property: Any) -> None:
    """Uninitialised memory is NaN here, so that a replay that stops too early shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    ran, wrong = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, op, x, args, kwargs in operators():
            branch = Applied(op, args, kwargs)
            try:
                expected = _gradients(branch, x, None)
                again = _gradients(branch, x, None)
            except (RuntimeError, TypeError, AttributeError, NotImplementedError):
                continue
            if not _agree(again, expected):
                # It draws from elsewhere, or reads memory that nobody wrote.
                continue
            ran += 1
            # The first may stop early, the second undoes the step with the whole branch.
            for execution in ("checkpoint", "invert"):
                try:
                    if not _agree(_gradients(branch, x, execution), expected):
                        wrong.append(f"{name}, {execution}: another gradient")
                except (ReversibleError, RuntimeError, TypeError) as error:
                    text = str(error)[:150]
                    wrong.append(f"{name}, {execution}: {type(error).__name__}: {text}")
    record_property("operators", ran)
    assert not wrong
    assert ran >= LEAST, ran
