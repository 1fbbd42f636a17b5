"""A partially reversible 3-D U-Net: reversible blocks at each resolution, ordinary layers between
resolutions.

Activations of volumes are what limits such networks. Only the changes of resolution and the skip
connections keep theirs. The data are noisy volumes with bright ellipsoids, to be segmented.

Reference: Brügger et al. 2019, arXiv:1906.06148; Çiçek et al. 2016, arXiv:1606.06650.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from common import compare, fit, options
from torch import Tensor, nn

from revnet import ReversibleSequence


def branch(width: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(1, width), nn.ReLU(), nn.Conv3d(width, width, 3, padding=1))


def level(width: int, depth: int) -> ReversibleSequence:
    blocks = [(branch(width // 2), branch(width // 2)) for _ in range(depth)]
    return ReversibleSequence(blocks, split="chunk", merge="concat", dim=1)


class UNet3d(nn.Module):
    def __init__(self, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, widths[0], 1)
        self.encoder = nn.ModuleList(level(width, depth) for width in widths)
        self.decoder = nn.ModuleList(level(width, 1) for width in widths[:-1])
        self.down = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairwise(widths))
        self.head = nn.Conv3d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder[0](self.stem(x))
        skips = []
        for down, encode in zip(self.down, list(self.encoder)[1:], strict=True):
            skips.append(x)
            x = encode(down(F.max_pool3d(x, 2)))
        for up, decode in zip(reversed(self.up), reversed(self.decoder), strict=True):
            # Nearest-neighbour upsampling in plain copies is deterministic on every device.
            wide = up(x)
            for dim in (2, 3, 4):
                wide = wide.repeat_interleave(2, dim)
            x = decode(wide + skips.pop())
        return self.head(x)


def volumes(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Noisy volumes (count, 1, size, size, size), and where their two ellipsoids are."""
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    centers = torch.rand(count, 2, 1, 1, 1, 3) - 0.5
    radii = 0.2 + 0.3 * torch.rand(count, 2, 1, 1, 1, 3)
    inside = (((grid - centers) / radii).square().sum(-1) < 1).any(1)
    truth = inside[:, None].float()
    return (truth + 0.7 * torch.randn_like(truth)).to(device), truth.to(device)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0)
    widths, depth, size, batch = ((32, 64, 128, 256), 4, 96, 1) if args.full else ((8, 16), 6, 8, 2)
    x, truth = volumes(batch, size, args.device)
    model = UNet3d(widths, depth).to(args.device)

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), truth)

    first, last = fit(model, loss, args.steps or (20 if args.full else 15), 3e-3)
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
