"""Whether torch may compute products of float32 in TF32 or bfloat16, as its settings are now.

`cuda_matmul` says it of products of matrices, `cuda_conv` of convolutions and `cuda_rnn` of
recurrent layers; so do `cpu_matmul` and the others for the CPU. They are attributes of a module,
computed when they are read, because graphs of torch.compile guard such attributes: they are
compiled anew when a setting changes.
"""

from __future__ import annotations

from functools import partial

import torch

# The device types that have such settings, and what these are called in torch.
DEVICES = {"cuda": "cuda", "cpu": "mkldnn"}
# What holds for the backend or for all is in the answers. Attributes such as `allow_tf32` raise
# once the newer `fp32_precision` was set.
_SWITCHES = {
    f"{device}_{operation}": partial(torch._C._get_fp32_precision_getter, backend, operation)
    for device, backend in DEVICES.items()
    for operation in ("matmul", "conv", "rnn")
}
_FULL = ("none", "ieee")


def __getattr__(name: str) -> bool:
    switch = _SWITCHES.get(name)
    if switch is None:
        raise AttributeError(name)
    return switch() not in _FULL
