"""The network that the benchmarks run: pre-norm causal attention and a four times wider MLP, on two
streams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Pre-norm causal attention by torch's own kernel, heads of width 64 (or one), without
    biases.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.leave(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Norm, linear, GELU, linear, without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 4 * width, bias=False)
        self.leave = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.gelu(self.enter(self.norm(x))))


def branches(
    blocks: int,
    width: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[tuple[nn.Module, nn.Module]]:
    """Returns `blocks` pairs of branches with the same weights for the same seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        return [(Attention(width).to(dtype), Mlp(width).to(dtype)) for _ in range(blocks)]
