"""A normalising flow on two-dimensional data: affine couplings trained by exact likelihood, sampled
by the inverse.

The two coordinates are the two streams. A coupling returns its log-determinant as the step's extra
output.

Reference: Dinh et al. 2017, arXiv:1605.08803; Kingma and Dhariwal 2018, arXiv:1807.03039.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from common import compare, fit, options
from torch import Tensor, nn

from revnet import Affine, Reversible, Step


class Flow(nn.Module):
    """Maps points (n, 2) to normally distributed ones."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        steps = []
        for i in range(depth):
            branch = nn.Sequential(
                nn.Linear(1, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2),
            )
            # The flow starts as the identity.
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
            steps.append(Step(branch, i % 2, (i + 1) % 2, Affine(limit=1.0, log_det=True)))
        self.steps = Reversible(steps, streams="fixed")

    def log_likelihood(self, points: Tensor) -> Tensor:
        *coordinates, extra = self.steps(*points.chunk(2, -1))
        z = torch.cat(coordinates, -1)
        log_det = torch.stack([step["log_det"] for step in extra.values()]).sum(0)
        return log_det - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, count: int, device: str) -> Tensor:
        return torch.cat(self.steps.inverse(*torch.randn(2, count, 1, device=device)), -1)


def plot(points: Tensor, samples: Tensor, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(7, 3.5), sharex=True, sharey=True)
    for axis, name, rows in zip(axes, ("data", "samples"), (points, samples), strict=True):
        axis.scatter(*rows.cpu().T, s=2)
        axis.set(title=name, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0, plot=None)
    from sklearn.datasets import make_moons

    points = torch.tensor(
        make_moons(4096 if args.full else 512, noise=0.06, random_state=0)[0], dtype=torch.float32
    )
    points = ((points - points.mean(0)) / points.std(0)).to(args.device)
    model = Flow(128, 12).to(args.device) if args.full else Flow(32, 8).to(args.device)

    def loss() -> Tensor:
        return -model.log_likelihood(points).mean()

    first, last = fit(
        model, loss, args.steps or (500 if args.full else 60), 3e-3 if args.full else 5e-3
    )
    samples = model.sample(2000, args.device)
    if args.plot:
        plot(points, samples, args.plot)
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
