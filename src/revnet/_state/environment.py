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
        cache = torch.is_autocast_cache_enabled()
        return cache, [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in device_types
        ]

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

    PLACES = (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))

    @staticmethod
    def read(device_types: Sequence[str]) -> Any:
        new = [torch._C._get_fp32_precision_getter(*place) for place in MatmulPrecision.PLACES]
        try:
            return torch._C._get_float32_matmul_precision(), torch._C._get_cudnn_allow_tf32(), new
        except RuntimeError:
            return None, None, new

    @staticmethod
    def write(value: Any) -> None:
        matmul, convolutions, new = value
        present = MatmulPrecision.read(())
        if matmul is not None and matmul != present[0]:
            torch._C._set_float32_matmul_precision(matmul)
        if convolutions is not None and convolutions != present[1]:
            torch._C._set_cudnn_allow_tf32(convolutions)
        for place, precision in zip(MatmulPrecision.PLACES, new, strict=True):
            if torch._C._get_fp32_precision_getter(*place) != precision:
                torch._C._set_fp32_precision_setter(*place, precision)


class AttentionKernels:
    """The kernels that scaled_dot_product_attention may choose, as `sdpa_kernel` sets them."""

    KINDS = ("flash", "mem_efficient", "math", "cudnn", "overrideable")

    @staticmethod
    def read(device_types: Sequence[str]) -> Any:
        enabled = [getattr(torch._C, f"_get_{k}_sdp_enabled")() for k in AttentionKernels.KINDS]
        return enabled, torch._C._get_sdp_priority_order()

    @staticmethod
    def write(value: Any) -> None:
        enabled, order = value
        for kind, on in zip(AttentionKernels.KINDS, enabled, strict=True):
            getattr(torch._C, f"_set_sdp_use_{kind}")(on)
        torch._C._set_sdp_priority_order(order)


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
