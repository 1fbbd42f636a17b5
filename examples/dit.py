"""A reversible diffusion transformer (DiT) with adaLN-zero, on handwritten digits.

Time and class condition every branch: a vector `c` scales and shifts what the branch reads and
gates what it adds. It is a keyword tensor, to which gradients flow. The network learns the velocity
from noise to images (rectified flow); the sampler is Euler's rule with guidance.

Reference: Peebles and Xie 2023, arXiv:2212.09748; Liu et al. 2023, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from common import compare, digits, fit, options
from torch import Tensor, nn

from revnet import ReversibleSequence

CLASSES = 10
SHAPES = {False: (1, 8, 8), True: (4, 32, 32)}  # Of digits; of the latents of DiT-B/2, --full.


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.leave(mixed.transpose(1, 2).reshape(batch, tokens, width))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class AdaptiveNorm(nn.Module):
    """Run `inner` on normalised tokens that `c` scales and shifts, and gate what it returns.

    The gates are zero at first, so that every block begins as the identity.
    """

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.inner = inner
        self.condition = nn.Linear(width, 3 * width)
        for parameter in self.condition.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.condition(F.silu(c))[:, None].chunk(3, -1)
        return gate * self.inner(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Maps noisy images (n, channels, size, size), times (n,) and classes (n,) to velocities."""

    def __init__(self, channels: int, size: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch, self.width = patch, width
        self.enter = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        # The last class stands for none, which guidance needs.
        self.classes = nn.Embedding(CLASSES + 1, width)
        blocks = [
            (AdaptiveNorm(width, Attention(width, heads)), AdaptiveNorm(width, mlp(width)))
            for _ in range(depth)
        ]
        self.blocks = ReversibleSequence(blocks, {"c": (True, True)}, streams="fixed")
        self.last = AdaptiveNorm(width, nn.Identity())
        self.leave = nn.Linear(width, channels * patch**2)

    def forward(self, images: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        steps = torch.arange(self.width // 2, device=times.device) / (self.width // 2)
        angles = 1000 * times[:, None] * torch.exp(-math.log(10_000) * steps)
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.classes(classes)
        tokens = F.unfold(images, self.patch, stride=self.patch).mT
        x = self.blocks(self.enter(tokens) + self.position, c=c)
        out = self.leave(x + self.last(x, c))
        return F.fold(out.mT, images.shape[-1], self.patch, stride=self.patch)


@torch.no_grad()
def sample(model: DiT, classes: Tensor, shape: Sequence[int], steps: int = 10) -> Tensor:
    """Return images of these classes: Euler steps from noise, pushed away from no class."""
    x = torch.randn(len(classes), *shape, device=classes.device)
    for time in torch.arange(steps, device=classes.device)[:, None] / steps:
        time = time.expand(len(classes))
        without = model(x, time, torch.full_like(classes, CLASSES))
        x = x + (without + 2 * (model(x, time, classes) - without)) / steps
    return x


def setup(full: bool, device: str, batch: int = 0) -> tuple[DiT, Callable[[DiT], Tensor]]:
    """Return the network and its loss."""
    channels, size, _ = SHAPES[full]
    images, classes = (rows[: batch or 32] for rows in digits(device, size, channels))
    images, noise = 2 * images - 1, torch.randn_like(images)
    times, known = torch.rand(2, len(images), device=device)
    classes = classes.where(known > 0.1, CLASSES)
    mixed = torch.lerp(noise, images, times[:, None, None, None])

    def loss(model: DiT) -> Tensor:
        return F.mse_loss(model(mixed, times, classes), images - noise)

    sizes = (768, 12, 12) if full else (32, 4, 4)
    return DiT(channels, size, 2, *sizes).to(device), loss


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0)
    model, loss_of = setup(args.full, args.device)
    loss = partial(loss_of, model)
    first, last = fit(model, loss, args.steps or (50 if args.full else 20), 2e-3)
    made = sample(model, torch.arange(CLASSES, device=args.device), SHAPES[args.full])
    print(f"one sample per class: mean {made.mean():.2f}, deviation {made.std():.2f}")
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
