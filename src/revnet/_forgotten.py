"""Extra outputs that a branch returns without being meant to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._streams.monitor import is_fake


def attention_weights(aux: Mapping[str, Any], stream: Any) -> str:
    """Return a warning if a branch returned its attention weights beside its output, else "".

    `nn.MultiheadAttention` and many others do, unless asked not to. A caller who does not expect
    them gets a tuple, and a quadratic tensor per block that stays. Weights that are wanted come
    in a dict, by which they are told from those of an accident.

    Args:
        aux: extra outputs by step.
        stream: one that the steps have updated.
    """
    for step, extra in aux.items():
        if isinstance(stream, Tensor) and _is_attention(extra, stream):
            return (
                f"{step} returned attention weights, {tuple(extra.shape)}, beside its output. "
                f"They are handed to the caller as an extra output of each block, and stay in "
                f"memory. If that is no intention, return the output alone (nn.MultiheadAttention: "
                f"need_weights=False and [0]). If it is, return them in a dict, as in "
                f"`return out, {{'weights': weights}}`, and this warning is not given."
            )
    return ""


def _is_attention(extra: Any, stream: Tensor) -> bool:
    """Check for a tensor (…, tokens, tokens) of rows that sum to one, on average after dropout."""
    if not isinstance(extra, Tensor) or not extra.is_floating_point() or extra.ndim < 2:
        return False
    tokens = extra.shape[-1]
    if extra.shape[-2] != tokens or tokens not in stream.shape or tokens < 2 or is_fake(extra):
        return False
    with torch.no_grad():
        rows = extra.detach().float().sum(-1)
        return bool((extra >= 0).all() & ((rows.mean() - 1).abs() < 0.25))
