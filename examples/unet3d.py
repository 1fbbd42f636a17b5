"""An invertible 3-D U-Net with convolutions and batch norm: two streams at every resolution.

The encoder adds to the streams of the next resolution, the decoder adds back to the finer ones,
which are the skip connections. Every level is a module of its own that hands its streams on, and
nothing is kept between neighbours. The data are noisy volumes with bright ellipsoids, to be
segmented. With --full, volumes of 128³ in batches of 2.

Reference: Etmann et al. 2020, arXiv:2005.05220; Çiçek et al. 2016, arXiv:1606.06650.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import compare, fit, options
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet import Reversible, Step


def branch(enter: int, leave: int, stride: int = 1) -> nn.Sequential:
    """Batch norm, ReLU, convolution; with stride 2 to half the resolution."""
    convolution = nn.Conv3d(enter, leave, 3, stride, padding=1, bias=False)
    return nn.Sequential(nn.BatchNorm3d(enter), nn.ReLU(), convolution)


def upwards(enter: int, leave: int) -> nn.Sequential:
    """Batch norm, ReLU, and a transposed convolution to twice the resolution."""
    convolution = nn.ConvTranspose3d(enter, leave, 2, stride=2, bias=False)
    return nn.Sequential(nn.BatchNorm3d(enter), nn.ReLU(), convolution)


class UNet3d(nn.Module):
    """Streams 2i and 2i + 1 are those of level i.

    Args:
        widths: channels of each stream, per level.
        depth: blocks per level, on the way down and on the way up.
        channels_last: hold the streams in `torch.channels_last_3d`.
    """

    def __init__(self, widths: Sequence[int], depth: int, channels_last: bool = True) -> None:
        super().__init__()
        self.widths, self.checkpointed = widths, False
        self.format = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.stem = nn.Conv3d(1, 2 * widths[0], 3, padding=1, bias=False)
        down, up = [], []
        for i, width in enumerate(widths):
            level = [Step(branch(width, width), 2 * i + j, 2 * i + 1 - j) for j in (0, 1) * depth]
            if i + 1 < len(widths):
                wide = widths[i + 1]
                level += [Step(branch(width, wide, 2), 2 * i + 2 + j, 2 * i + j) for j in (0, 1)]
            down.append(Reversible(level))
        for i in reversed(range(len(widths) - 1)):
            width, wide = widths[i : i + 2]
            level = [Step(upwards(wide, width), 2 * i + j, 2 * i + 2 + j) for j in (0, 1)]
            level += [Step(branch(width, width), 2 * i + j, 2 * i + 1 - j) for j in (0, 1) * depth]
            up.append(Reversible(level))
        self.levels = nn.ModuleList([*down, *up])
        self.head = nn.Sequential(
            nn.BatchNorm3d(2 * widths[0]), nn.ReLU(), nn.Conv3d(2 * widths[0], 1, 1)
        )

    def streams(self, x: Tensor) -> list[Tensor]:
        """Return the first streams; those of coarser levels begin at zero."""
        first = self.stem(x.contiguous(memory_format=self.format))
        streams = [part.contiguous(memory_format=self.format) for part in first.chunk(2, 1)]
        for i, width in enumerate(self.widths[1:], 1):
            shape = (len(x), width, *(size >> i for size in x.shape[2:]))
            streams += [first.new_zeros(shape).to(memory_format=self.format) for _ in (0, 1)]
        return streams

    def forward(self, x: Tensor) -> Tensor:
        streams: Any = self.streams(x)
        for level in self.levels:
            if self.checkpointed:
                streams = checkpoint(level, *streams, use_reentrant=False)
            else:
                streams = level(*streams)
        return self.head(torch.cat(streams[:2], 1))


def volumes(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Noisy volumes (count, 1, size, size, size), and where their two ellipsoids are."""
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    centers = torch.rand(count, 2, 1, 1, 1, 3) - 0.5
    radii = 0.2 + 0.3 * torch.rand(count, 2, 1, 1, 1, 3)
    inside = (((grid - centers) / radii).square().sum(-1) < 1).any(1)
    truth = inside[:, None].float()
    return (truth + 0.7 * torch.randn_like(truth)).to(device), truth.to(device)


def setup(full: bool, device: str, batch: int = 0) -> tuple[UNet3d, Callable[[UNet3d], Tensor]]:
    """Return the network and its loss."""
    widths, depth, size = ((16, 32, 64, 128), 4, 128) if full else ((4, 8), 4, 8)
    x, truth = volumes(batch or 2, size, device)

    def loss(model: UNet3d) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x).float(), truth)

    return UNet3d(widths, depth).to(device), loss


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0)
    model, loss_of = setup(args.full, args.device)

    def loss() -> Tensor:
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16):
            return loss_of(model)

    def checkpointed() -> Tensor:
        model.checkpointed = True
        try:
            return loss()
        finally:
            model.checkpointed = False

    first, last = fit(model, loss, args.steps or (20 if args.full else 15), 3e-3)
    others = {"checkpoint per level": checkpointed}
    return {"first": first, "last": last, **compare(model, loss, others)}


if __name__ == "__main__":
    main()
