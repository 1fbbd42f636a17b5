"""The two ways to hold a stream, and the numbers of a fixed-point format of some fraction bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

# Magnitudes below 2^39 units: what a float32 of 24 and a bfloat16 of 8 significant bits leave over
# then fits 16 and 32 bits. Formats whose units are finer than 2^-24 keep 15 integer bits, and leave
# twice the bits over.
_MAGNITUDE_BITS = 39
_INTEGER_BITS = 15
# Sums are taken in float64, of whose 53 bits one stays free.
LARGEST_FRACTION = 52 - _INTEGER_BITS

DEFAULT_FRACTION_BITS = _MAGNITUDE_BITS - _INTEGER_BITS


@dataclass(frozen=True)
class Float:
    """Hold streams as floating-point tensors: `(x + f) - f` is then close to x, not equal to it."""


class Encoded(NamedTuple):
    """Hold a fixed-point stream: the numbers that branches read, and integers that rounding left.

    Tensors, or equal trees of tensors; the stream is `value + residual · 2^-fraction_bits`.
    """

    value: Any
    residual: Any


def limit(fraction_bits: int) -> float:
    """Return the smallest magnitude that no stream of this format holds."""
    return 2.0 ** max(_MAGNITUDE_BITS - fraction_bits, _INTEGER_BITS)


def unit(fraction_bits: int) -> float:
    """Return what an integer of one stands for."""
    return 2.0**-fraction_bits


def limit_in(fraction_bits: int, dtype: torch.dtype) -> float:
    """Return the limit of a stream of this dtype: float16 ends at 65504."""
    return min(limit(fraction_bits), torch.finfo(dtype).max)


@cache
def bound(fraction_bits: int, dtype: torch.dtype) -> int:
    """Return the smallest integer that a stream of this dtype cannot hold."""
    return int(limit_in(fraction_bits, dtype) / unit(fraction_bits))


def residual_dtype(fraction_bits: int, dtype: torch.dtype) -> torch.dtype:
    """Return the integers that hold what rounding to this dtype leaves over."""
    wide = fraction_bits > DEFAULT_FRACTION_BITS
    if dtype in (torch.bfloat16, torch.float16):
        return torch.int64 if wide else torch.int32
    return torch.int32 if wide else torch.int16
