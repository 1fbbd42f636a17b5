"""One layer applied hundreds of times: a deep-equilibrium-style network trained by exact
backpropagation.

Two states relax towards the fixed point z = f(z, x) in turn:

    y = (1 - b) y + b f(z, x)
    z = (1 - b) z + b f(y, x)

Each line is a momentum step with gamma = 1 - b. Undoing it in floats would divide rounding errors
by 1 - b hundreds of times; the fixed streams remember one bit per element and step for b = 1/2, and
undo it in every bit.

With --full, 300 applications to 1,024 × 1,024 states, twelve times forward and backward: on a GPU
these wait for the host, a few milliseconds per application. --applications 1000 takes three times
as long.

Reference: McCallum et al. 2025, arXiv:2509.12917; Bai et al. 2019, arXiv:1909.01377.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from common import compare, digits, fit, options
from torch import Tensor, nn

from revnet import Momentum, Reversible, Step


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return self.norm((0.5 * self.linear(state) + x).relu())


class Equilibrium(nn.Module):
    def __init__(self, features: int, width: int, applications: int, gamma: float) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        layer = Layer(width)
        turn = [Step(layer, 0, 1, Momentum(gamma)), Step(layer, 1, 0, Momentum(gamma))]
        self.relax = Reversible(
            turn * (applications // 2), args_route={"x": [True] * applications}, streams="fixed"
        )
        self.leave = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images.flatten(1))
        _, z = self.relax(x.new_zeros(x.shape), x.new_zeros(x.shape), x=x)
        return self.leave(z)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0, applications=0)
    width, batch = (1024, 1024) if args.full else (32, 64)
    applications = args.applications or (300 if args.full else 40)
    images, classes = digits(args.device)
    model = Equilibrium(64, width, applications, gamma=0.5).to(args.device)
    print(f"{applications} applications of one layer")

    def loss() -> Tensor:
        return F.cross_entropy(model(images[:batch]), classes[:batch])

    first, last = fit(
        model, loss, args.steps or (4 if args.full else 10), 1e-3 if args.full else 1e-2
    )
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
