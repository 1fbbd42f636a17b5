"""A grouped reversible graph network of 1,001 layers on a small graph.

The features are split into groups, one stream each. In a layer, the first group reads the sum of
the others, and every further group the one before it. The graph is a stochastic block model; the
task is to tell the communities apart.

Reference: Li et al. 2021, arXiv:2106.07476.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import compare, fit, options
from torch import Tensor, nn

from revnet import Reversible, Step


class Convolution(nn.Module):
    """Norm, ReLU, linear, and the mean over the neighbours; reads the sum of the groups it is
    given.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, *groups: Tensor, neighbours: Tensor) -> Tensor:
        x = self.dropout(self.norm(sum(groups)).relu())
        return neighbours @ self.linear(x)


class RevGnn(nn.Module):
    def __init__(self, features: int, width: int, groups: int, layers: int, classes: int) -> None:
        super().__init__()
        self.groups = groups
        self.enter = nn.Linear(features, groups * width)
        steps = []
        for _ in range(layers):
            for group in range(groups):
                source = tuple(range(1, groups)) if group == 0 else (group - 1,)
                steps.append(Step(Convolution(width), group, source))
        self.layers = Reversible(steps, args_route={"neighbours": [True] * len(steps)})
        self.leave = nn.Sequential(nn.LayerNorm(groups * width), nn.Linear(groups * width, classes))

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        # The dense matrix of a small graph; on a GPU, sums over edges are not deterministic by
        # default. A keyword, and no buffer of the branches: those a branch may write to, so that
        # each step would copy it.
        groups = self.layers(*self.enter(x).chunk(self.groups, -1), neighbours=neighbours)
        return self.leave(torch.cat(groups, -1))


def block_model(nodes: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised adjacency (nodes, nodes), noisy features (nodes, 16), communities (nodes,)."""
    truth = torch.arange(nodes) % classes
    likely = torch.where(truth[:, None] == truth, 0.15, 0.02)
    edges = (torch.rand(nodes, nodes) < likely).triu(1).float()
    edges = edges + edges.T + torch.eye(nodes)
    neighbours = edges / edges.sum(1, keepdim=True)
    features = torch.randn(classes, 16)[truth] + 3 * torch.randn(nodes, 16)
    return neighbours.to(device), features.to(device), truth.to(device)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0, layers=0)
    nodes, width, layers = (
        (2048, 64, args.layers or 1001) if args.full else (128, 16, args.layers or 16)
    )
    neighbours, features, truth = block_model(nodes, 4, args.device)
    model = RevGnn(16, width, 2, layers, 4).to(args.device)
    print(
        f"{layers} layers, {sum(p.numel() for p in model.parameters()):,} parameters, {nodes} nodes"
    )

    def loss() -> Tensor:
        return F.cross_entropy(model(features, neighbours), truth)

    first, last = fit(
        model, loss, args.steps or (8 if args.full else 25), 1e-4 if args.full else 3e-3
    )
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
