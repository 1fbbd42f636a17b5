"""Stages of an i-RevNet: squeezes between reversible blocks, so that the image comes back from the
features.

A squeeze moves pixels into channels (pixel-unshuffle). It only moves elements, so it acts on the
integers of fixed streams as on floats: nothing is kept for it, and the gradients are those of
stored execution in every bit.

Reference: Jacobsen et al. 2018, arXiv:1802.07088.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import compare, digits, fit, options
from torch import Tensor, nn

from revnet import Bijection, Reversible, Step


def branch(width: int) -> nn.Module:
    inner = max(4, width // 2)
    return nn.Sequential(
        nn.Conv2d(width, inner, 3, padding=1),
        nn.GroupNorm(1, inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, width, 3, padding=1),
    )


def stages(width: int, blocks: Sequence[int]) -> list[Step]:
    """Before each stage, both streams are squeezed; then blocks update them in turn."""
    squeeze = Bijection(nn.PixelUnshuffle(2), nn.PixelShuffle(2), rearranges=True)
    steps = []
    for count in blocks:
        width *= 4
        steps += [Step(None, stream, coupling=squeeze) for stream in (0, 1)]
        steps += [Step(branch(width), i % 2, (i + 1) % 2) for i in range(2 * count)]
    return steps


class IRevNet(nn.Module):
    """Two copies of the image as streams; the classifier reads the mean over the pixels of both."""

    def __init__(self, channels: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.body = Reversible(stages(channels, blocks), streams="fixed")
        self.head = nn.Linear(2 * channels * 4 ** len(blocks), 10)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.cat(self.body(x, x), 1)
        return self.head(features.mean((2, 3)))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0)
    channels, size, blocks, batch = (3, 32, (6, 16, 6), 128) if args.full else (1, 8, (3, 3), 64)
    images, classes = digits(args.device, size, channels)
    model = IRevNet(channels, blocks).to(args.device)

    def loss() -> Tensor:
        return F.cross_entropy(model(images[:batch]), classes[:batch])

    first, last = fit(model, loss, args.steps or (50 if args.full else 20), 2e-3)
    with torch.no_grad():
        x = images[:batch]
        back, _ = model.body.inverse(*model.body(x, x))
    error = ((back - x).norm() / x.norm()).item()
    print(f"image from its features, by the inverse in float32: relative error {error:.1e}")
    return {"first": first, "last": last, "inverse": error, **compare(model, loss)}


if __name__ == "__main__":
    main()
