"""Settings of the process under which a step runs: autocast, TF32, the kernels of attention.

A setting is a class with two static methods: `read` returns its value, `write` sets it. To have
another one replayed, write such a class and name it in `SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from .undo import Undo


class Setting(Protocol):
    """One setting of the process."""

    @staticmethod
    def read(device_types: Sequence[str]) -> Any:
        """Return the present value, comparable by `==`."""

    @staticmethod
    def write(value: Any) -> None:
        """Set the value."""


class Autocast:
    """Autocast of the CPU and of the device types in use."""

    @staticmethod
    def read(device_types: Sequence[str]) -> Any:
        states = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in device_types
        ]
        return torch.is_autocast_cache_enabled(), states

    @staticmethod
    def write(value: Any) -> None:
        cache, states = value
        for kind, enabled, dtype in states:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cache)
        # A cast that was made under the other value belongs to the gradients made there.
        torch.clear_autocast_cache()


class MatmulPrecision:
    """TF32 in matrix products and convolutions, through the old and the new interface of torch.

    What is equal already is not written: torch refuses to read the old one once the new one was
    set.
    """

    @staticmethod
    def read(device_types: Sequence[str]) -> Any:
        backend = "mkldnn" if len(device_types) == 1 else "cuda"
        products = _precision(backend, "matmul")
        convolutions = _precision(backend, "conv")
        try:
            return backend, products, convolutions, _old_precision(), _old_convolutions()
        except RuntimeError:
            return backend, products, convolutions, None, None

    @staticmethod
    def write(value: Any) -> None:
        backend, products, convolutions, old_products, old_convolutions = value
        present = MatmulPrecision.read(("cpu",) if backend == "mkldnn" else ("cpu", backend))
        if old_products is not None and old_products != present[3]:
            torch._C._set_float32_matmul_precision(old_products)
        if old_convolutions is not None and old_convolutions != present[4]:
            torch._C._set_cudnn_allow_tf32(old_convolutions)
        for kind, precision in (("matmul", products), ("conv", convolutions)):
            if _precision(backend, kind) != precision:
                torch._C._set_fp32_precision_setter(backend, kind, precision)


class AttentionKernels:
    """The kernels that scaled_dot_product_attention may choose, as `sdpa_kernel` sets them."""

    @staticmethod
    def read(device_types: Sequence[str]) -> Any:
        return [read() for read in _READ_KERNELS]

    @staticmethod
    def write(value: Any) -> None:
        for write, choice in zip(_WRITE_KERNELS, value, strict=True):
            write(choice)


# Looked up once, since they are called in each replay.
_precision = torch._C._get_fp32_precision_getter
_old_precision = torch._C._get_float32_matmul_precision
_old_convolutions = torch._C._get_cudnn_allow_tf32
_KERNELS = ("flash", "mem_efficient", "math", "cudnn", "overrideable")
_READ_KERNELS = [getattr(torch._C, f"_get_{kernel}_sdp_enabled") for kernel in _KERNELS]
_READ_KERNELS.append(torch._C._get_sdp_priority_order)
_WRITE_KERNELS = [getattr(torch._C, f"_set_sdp_use_{kernel}") for kernel in _KERNELS]
_WRITE_KERNELS.append(torch._C._set_sdp_priority_order)

SETTINGS: tuple[type[Setting], ...] = (Autocast, MatmulPrecision, AttentionKernels)


class Environment:
    """The settings of the process at one moment."""

    __slots__ = ("device_types", "values")

    def __init__(self, device_types: Sequence[str]) -> None:
        self.device_types = tuple(dict.fromkeys(("cpu", *device_types)))
        self.values = [setting.read(self.device_types) for setting in SETTINGS]

    def restore(self, undo: Undo) -> None:
        """Set every setting that has another value now, until `undo` runs."""
        for setting, value in zip(SETTINGS, self.values, strict=True):
            present = setting.read(self.device_types)
            if present != value:
                undo.add(partial(setting.write, present))
                setting.write(value)
