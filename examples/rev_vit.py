"""A reversible vision transformer: attention and MLP as the two branches of each block.

Reference: Mangalam et al. 2022, arXiv:2302.04869; Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import compare, digits, fit, options
from torch import Tensor, nn

from revnet import ReversibleSequence


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.leave(mixed.transpose(1, 2).reshape(batch, tokens, width))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


class RevViT(nn.Module):
    def __init__(
        self, channels: int, size: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = ReversibleSequence(
            [(Attention(width, heads), mlp(width)) for _ in range(depth)], merge="concat"
        )
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(tokens).mean(1))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0)
    if args.full:  # ViT-B/16
        channels, size, patch, width, depth, heads, batch = 3, 224, 16, 768, 12, 12, 64
    else:
        channels, size, patch, width, depth, heads, batch = 1, 8, 2, 32, 6, 4, 64
    images, classes = (rows[:batch].to(args.device) for rows in digits("cpu"))
    images = F.interpolate(images, size=(size, size)).expand(-1, channels, -1, -1)
    model = RevViT(channels, size, patch, width, depth, heads).to(args.device)

    def loss() -> Tensor:
        # The matrix products are those of bfloat16, and the streams therefore fixed: see
        # `streams="auto"`.
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16):
            return F.cross_entropy(model(images).float(), classes)

    first, last = fit(
        model, loss, args.steps or (50 if args.full else 30), 3e-4 if args.full else 1e-3
    )
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
