"""The MomentumNet of revlib's README (a 3 × 3 convolution per layer, momentum 0.99, 16 layers),
with right gradients.

revlib's default mode puts the gradients through the rule itself, not through its derivative, and is
11 to 22 % off. Here they are compared with a plain loop in float64.

Reference: Sander et al. 2021, arXiv:2102.07870; github.com/HomebrewNLP/revlib, "Coupling".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from common import compare, options
from torch import Tensor, nn

from revnet import Momentum, Reversible, Step


def momentum_net(channels: int, depth: int, gamma: float) -> Reversible:
    """Stream 0 is the velocity, stream 1 the state."""
    steps = []
    for _ in range(depth):
        steps.append(Step(nn.Conv2d(channels, channels, 3, padding=1), 0, 1, Momentum(gamma)))
        steps.append(Step(None, 1, 0))
    return Reversible(steps)


def plain_loop(net: Reversible, gamma: float, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    for step in net.steps:
        if step.fn is not None:
            v = gamma * v + (1 - gamma) * step.fn(x)
        else:
            x = x + v
    return v, x


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, gamma=0.99)
    # The rounding of products to ten bits would be all that a comparison with float64 sees.
    torch.backends.cudnn.allow_tf32 = False
    channels, depth, size, batch = (64, 16, 224, 16) if args.full else (8, 16, 12, 2)
    net = momentum_net(channels, depth, args.gamma).to(args.device)
    streams = [torch.randn(batch, channels, size, size, device=args.device) for _ in range(2)]
    weights = [torch.randn_like(stream) for stream in streams]

    def loss() -> Tensor:
        return sum((y * weight).sum() for y, weight in zip(net(*streams), weights, strict=True))

    print("float32, streams='auto': fixed here, as floats cannot undo the momentum step")
    ratios = compare(net, loss)
    net.zero_grad()
    loss().backward()
    exact = copy.deepcopy(net).double()
    exact.zero_grad()
    outputs = plain_loop(exact, args.gamma, *(stream.double() for stream in streams))
    sum((y * weight.double()).sum() for y, weight in zip(outputs, weights, strict=True)).backward()
    wrong = max(
        ((a.grad.double() - b.grad).norm() / b.grad.norm()).item()
        for a, b in zip(net.parameters(), exact.parameters(), strict=True)
    )
    print(f"largest relative error of a gradient against the plain loop in float64: {wrong:.1e}")
    return {"loop": wrong, **ratios}


if __name__ == "__main__":
    main()
