"""The fused combine of fixed-point streams for the CPU: in place, piece by piece, in few passes."""

from __future__ import annotations

import torch
from torch import Tensor

from .format import Held, bound, unit
from .monitor import RangeMonitor
from .reference import combine_into

# Elements per thread and piece. Smaller pieces stay in a level-2 cache but cost more in calls than
# that saves; this bounds the scratch memory and stays in a level-3 cache. A multiple of the length
# that torch gives to a thread.
_PIECE = 262144


def combine(
    held: Held | None,
    increment: Tensor,
    new: Held,
    sign: int,
    fraction_bits: int,
    monitor: RangeMonitor | None,
    step: int,
) -> None:
    """Combine over dense memory of one layout into `new`.

    A reduction per piece shows that every number is in range; a piece where it does not is left to
    the reference.
    """
    one, edge = unit(fraction_bits), bound(fraction_bits, new.value.dtype)
    scale = 1.0 / one
    pieces = cut((increment, *new, *(held or ())))
    # In one piece: the C library gives two back to the system, and each call would fault their
    # pages in again.
    total, other = torch.empty((2, *pieces[0][0].shape), dtype=torch.float64)
    for addend, value, residual, *before in pieces:
        if value.shape != total.shape:
            total, other = total[: len(value)], other[: len(value)]
        total.copy_(addend).mul_(sign * scale).round_()
        for part, factor in zip(before, (scale, 1.0), strict=False):
            total.add_(other.copy_(part), alpha=factor)
        low, high = torch.aminmax(total)
        if not (low.item() > -edge and high.item() < edge):  # so also for NaN
            piece = None if held is None else Held(*before)
            into = Held(value, residual)
            combine_into(piece, addend, into, sign, fraction_bits, monitor, step)
            continue
        # Without held, minus zero is as yet zero's other form.
        value.copy_(torch.add(total, 0.0, out=other).mul_(one))
        residual.copy_(total.sub_(other.copy_(value), alpha=scale))


def cut(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Return pieces of tensors of one dense layout that stay in the cache together."""
    size = tensors[0].numel()
    length = _PIECE * torch.get_num_threads()
    if size <= length and tensors[1].is_contiguous():
        return [tensors]
    flat = [x.as_strided((size,), (1,)) for x in tensors]
    return [tuple(x[start : start + length] for x in flat) for start in range(0, size, length)]
