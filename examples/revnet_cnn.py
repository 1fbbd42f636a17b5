"""A RevNet-110 or -164 on images: residual stages that are reversible, with ordinary downsampling
between them.

The paper's networks for 32 × 32 images (Gomez et al. 2017, arXiv:1707.04585), in batches of 100 as
there. memcnn (van de Leemput et al. 2019, doi:10.21105/joss.01576, table 3) publishes 810.7 MB of
activations for the ordinary ResNet-110, of half the width and twice the blocks, and 85.7 MB for its
RevNet-110.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from common import compare, digits, fit, options
from torch import Tensor, nn

from revnet import ReversibleSequence


def activated(width: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)
    return [nn.BatchNorm2d(width), nn.ReLU(inplace=True), convolution]


def branch(width: int, bottleneck: bool) -> nn.Module:
    if not bottleneck:
        return nn.Sequential(*activated(width, width, 3), *activated(width, width, 3))
    inner = width // 4
    return nn.Sequential(
        *activated(width, inner, 1), *activated(inner, inner, 3), *activated(inner, width, 1)
    )


class RevNet(nn.Sequential):
    """Stem, three reversible stages of `units` blocks each, and a classifier."""

    def __init__(
        self,
        units: int,
        bottleneck: bool,
        widths: Sequence[int],
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)]
        for stage, width in enumerate(widths):
            if stage:
                layers += activated(widths[stage - 1], width, 3, stride=2)
            blocks = [
                (branch(width // 2, bottleneck), branch(width // 2, bottleneck))
                for _ in range(units)
            ]
            layers.append(ReversibleSequence(blocks, split="chunk", merge="concat", dim=1))
        head = [
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        super().__init__(*layers, *head, nn.Linear(widths[-1], classes))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, depth=110, steps=0)
    if args.full:
        bottleneck = args.depth == 164
        units = (args.depth - 2) // (18 if bottleneck else 12)
        model = RevNet(units, bottleneck, (128, 256, 512) if bottleneck else (32, 64, 128))
        images, classes, batch = *digits(args.device, size=32, channels=3), 100
    else:
        model = RevNet(3, False, (8, 16, 16), channels=1)
        images, classes, batch = *digits(args.device), 32
    model.to(args.device)
    place = 0

    def loss() -> Tensor:
        nonlocal place
        rows = slice(place, place + batch)
        place = (place + batch) % (len(images) - batch)
        return F.cross_entropy(model(images[rows]), classes[rows])

    first, last = fit(model, loss, args.steps or (50 if args.full else 40), 1e-2)

    def fixed_batch() -> Tensor:
        return F.cross_entropy(model(images[:batch]), classes[:batch])

    found = compare(model, fixed_batch)
    if args.full:
        kept = ", ".join(
            f"{found[name] / 1e6:.1f} MB" for name in ("stored_bytes", "inverted_bytes")
        )
        print(
            f"kept for backward, stored and inverted: {kept} (memcnn, at depth 110: 810.7 and 85.7)"
        )
    return {"first": first, "last": last, **found}


if __name__ == "__main__":
    main()
