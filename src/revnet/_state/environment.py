"""Settings of the process under which a step runs: autocast, TF32, attention, the default dtype.

A setting is a class with two static methods: `readers` returns what reads its values, `write` sets
them. To have another one replayed, write such a class and name it in `SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import call
from typing import Any, Protocol

import torch

from .._torch import choose_attention_kernel_once, is_autocasting
from .undo import Undo

Reader = Callable[[], Any]


class Setting(Protocol):
    """One setting of the process."""

    @staticmethod
    def readers(device_types: Sequence[str]) -> list[Reader]:
        """Return what reads the present values, which compare by `==`."""

    @staticmethod
    def write(values: Sequence[Any], device_types: Sequence[str]) -> None:
        """Set these values."""


class Autocast:
    """Autocast of the CPU and of the device types in use."""

    @staticmethod
    def readers(device_types: Sequence[str]) -> list[Reader]:
        enabled = [partial(torch.is_autocast_enabled, kind) for kind in device_types]
        dtypes = [partial(torch.get_autocast_dtype, kind) for kind in device_types]
        return [torch.is_autocast_cache_enabled, *enabled, *dtypes]

    @staticmethod
    def write(values: Sequence[Any], device_types: Sequence[str]) -> None:
        count = len(device_types)
        for kind, enabled, dtype in zip(
            device_types, values[1 : 1 + count], values[1 + count :], strict=True
        ):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(values[0])
        # A cast that was made under the other value belongs to the gradients made there.
        torch.clear_autocast_cache()


class MatmulPrecision:
    """TF32 in matrix products and convolutions, through the old and the new interface of torch.

    What is equal already is not written: torch refuses to read the old one once the new one was
    set, and its readers then return None here.
    """

    PLACES = (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))

    @staticmethod
    def readers(device_types: Sequence[str]) -> list[Reader]:
        places = MatmulPrecision.PLACES
        new = [partial(torch._C._get_fp32_precision_getter, *place) for place in places]
        return [_old_products, _old_convolutions, *new]

    @staticmethod
    def write(values: Sequence[Any], device_types: Sequence[str]) -> None:
        products, convolutions, *new = values
        if products is not None and products != _old_products():
            torch._C._set_float32_matmul_precision(products)
        if convolutions is not None and convolutions != _old_convolutions():
            torch._C._set_cudnn_allow_tf32(convolutions)
        for place, precision in zip(MatmulPrecision.PLACES, new, strict=True):
            if torch._C._get_fp32_precision_getter(*place) != precision:
                torch._C._set_fp32_precision_setter(*place, precision)


def _old_products() -> Any:
    try:
        return torch._C._get_float32_matmul_precision()
    except RuntimeError:
        return None


def _old_convolutions() -> Any:
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        return None


class AttentionKernels:
    """The kernels that scaled_dot_product_attention may choose, as `sdpa_kernel` sets them."""

    KINDS = ("flash", "mem_efficient", "math", "cudnn", "overrideable")

    @staticmethod
    def readers(device_types: Sequence[str]) -> list[Reader]:
        read = [getattr(torch._C, f"_get_{kind}_sdp_enabled") for kind in AttentionKernels.KINDS]
        return [*read, torch._C._get_sdp_priority_order]

    @staticmethod
    def write(values: Sequence[Any], device_types: Sequence[str]) -> None:
        *enabled, order = values
        for kind, on in zip(AttentionKernels.KINDS, enabled, strict=True):
            getattr(torch._C, f"_set_sdp_use_{kind}")(on)
        torch._C._set_sdp_priority_order(order)


class DefaultDtype:
    """The dtype of tensors that are made without one."""

    @staticmethod
    def readers(device_types: Sequence[str]) -> list[Reader]:
        return [torch.get_default_dtype]

    @staticmethod
    def write(values: Sequence[Any], device_types: Sequence[str]) -> None:
        torch.set_default_dtype(*values)


SETTINGS: tuple[type[Setting], ...] = (
    Autocast,
    MatmulPrecision,
    AttentionKernels,
    DefaultDtype,
)


@cache
def _readers(device_types: tuple[str, ...]) -> tuple[list[Reader], list[tuple[Any, int, int]]]:
    """Return all readers, and for each setting the range of its own among them."""
    if "cuda" in device_types:
        choose_attention_kernel_once()
    readers: list[Reader] = []
    ranges = []
    for setting in SETTINGS:
        start = len(readers)
        readers += setting.readers(device_types)
        ranges.append((setting, start, len(readers)))
    return readers, ranges


class Environment:
    """The settings of the process at one moment."""

    __slots__ = ("device_types", "readers", "values")

    def __init__(self, device_types: Sequence[str]) -> None:
        self.device_types = tuple(dict.fromkeys(("cpu", *device_types)))
        self.readers = _readers(self.device_types)[0]
        self.values = list(map(call, self.readers))

    def restore(self, undo: Undo) -> None:
        """Set every setting that has other values now, until `undo` runs."""
        if is_autocasting():
            # In a backward inside autocast, casts of parameters would pile up until it ends.
            undo.add(torch.clear_autocast_cache)
        present = list(map(call, self.readers))
        if present == self.values:
            return
        for setting, start, end in _readers(self.device_types)[1]:
            if present[start:end] != self.values[start:end]:
                undo.add(partial(setting.write, present[start:end], self.device_types))
                setting.write(self.values[start:end], self.device_types)
