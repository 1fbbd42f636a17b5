"""A checksum of a tensor's bits, taken on its device."""

from __future__ import annotations

import torch
from torch import Tensor

# The multipliers of SplitMix64 (Steele et al. 2014), and its increment as the step from one index
# to the next.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_INDEX = -0x61C8864680B583EB
_PIECE_OF_CHECKSUM = 1 << 22


def checksum(x: Tensor) -> Tensor:
    """Return a 64-bit checksum of the bits and places of x's elements, as a scalar on its device.

    Each element's bits are mixed with its index by a bijection of 64 bits and the results are
    added: one changed element always changes the sum, any other change with probability 1 - 2^-64.
    Independent of strides, and equal on every device.

    Args:
        x: numbers of any dtype and shape.
    """
    # Negations and conjugations that torch put off have to be in the bits.
    x = x.detach().resolve_conj().resolve_neg()
    if x.is_complex():
        x = torch.view_as_real(x)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.reshape(-1).view(width)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), _PIECE_OF_CHECKSUM):
        piece = bits[start : start + _PIECE_OF_CHECKSUM].to(torch.int64)
        mixed = torch.arange(start + 1, start + 1 + piece.numel(), device=x.device) * _INDEX + piece
        for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
            mixed = (mixed ^ _shifted(mixed, shift)) * multiplier
        total += (mixed ^ _shifted(mixed, 31)).sum()
    return total


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros: with copies of the sign, mixing would not be a bijection."""
    return x.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
