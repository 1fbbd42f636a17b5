"""Checksums of streams and branch outputs, for `determinism_check="exact"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import ReversibleError
from .._streams.checksum import checksum
from .._trees import tree_leaves
from .tape import Record, Tape


def tree_checksum(tree: Any) -> Tensor:
    """Return the checksums of the tensors of a tree."""
    sums = [checksum(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return torch.stack(sums) if sums else torch.empty(0)


def compare(record: Record, which: int, tree: Any) -> None:
    """Raise where a replay gave something else than the forward pass.

    Args:
        record: of the step.
        which: 0 to compare the target before the step, 1 the output of the branch.
        tree: what the replay gave.
    """
    if record.checksums is None or torch.equal(record.checksums[which], tree_checksum(tree)):
        return
    raise ReversibleError(
        f"{record.step.name} is not deterministic: called again on the same input, it gave another "
        "output, so its gradient would be wrong. Randomness of Python, NumPy or a custom "
        "torch.Generator is not restored: draw from torch's global generators. Kernels that add in "
        "changing order have deterministic forms: torch.use_deterministic_algorithms(True)."
    )


def forget_inexact(tape: Tape) -> None:
    """Forget the checksums of steps that a walk reaches with rounding errors."""
    for k, record in enumerate(tape.records):
        if record is None or record.checksums is None:
            continue
        if not all(_exact(tape, i, k) for i in record.step.source):
            record.checksums = None


def _exact(tape: Tape, stream: int, k: int) -> bool:
    """Check whether the walk finds this stream in the very bits that it had before step k."""
    for record in tape.records[k + 1 :]:
        if record is None:
            break
        if record.step.target == stream:
            return tape.arithmetic.exact or record.kept is not None
    return True
