"""Sizes in bytes: as text, back from text, and what is free."""

from __future__ import annotations

import math
import os
import re

import torch

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_bytes(size: int | float | str) -> int:
    """Return the bytes that `size` says: a number, or text such as "8GiB" or "1.5 GB".

    Raises:
        ValueError: the text is not a size, or the number is negative, infinite or NaN.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", size)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"{size!r} is not a size: write bytes, or a number and a unit, as in '8GiB' or "
                f"'800 MB'"
            )
        size = float(match[1]) * unit
    if not math.isfinite(size) or size < 0:
        raise ValueError(f"{size!r} is not a size: a number of bytes is finite and not negative")
    return int(size)


def format_bytes(size: int) -> str:
    """Return `size` in the largest binary unit of which it has at least one."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{size} B" if unit == "B" else f"{amount:.2f} {unit}"


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now; on the CPU, of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
