"""A reversible language model whose MLPs are mixtures of experts, on the bytes of these examples.

A router sends each token to the best two of its experts. Float streams come back with rounding
errors, which may tip that choice: `revnet.remember_outputs` lets the replay repeat what the router
returned. Each mixture returns a loss that balances its experts as an extra output, to which
gradients flow.

Reference: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2022, arXiv:2101.03961.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import compare, fit, options
from torch import Tensor, nn

import revnet


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.leave(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Router(nn.Module):
    """Choose `top` experts per token.

    Returns:
        Their weights and numbers, (tokens, top), and the loss that is least, 1, where all experts
        get as many tokens.
    """

    def __init__(self, width: int, experts: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.scores = nn.Linear(width, experts, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probability = self.scores(tokens).float().softmax(-1)
        weight, chosen = probability.topk(self.top, -1)
        share = F.one_hot(chosen, probability.shape[-1]).float().mean((0, 1))
        balance = probability.shape[-1] * (share * probability.mean(0)).sum()
        return weight / weight.sum(-1, keepdim=True), chosen, balance


class Mixture(nn.Module):
    def __init__(self, width: int, experts: int, top: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = Router(width, experts, top)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(experts)
        )
        revnet.remember_outputs(self.router)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.norm(x).flatten(0, 1)
        weight, chosen, balance = self.router(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            update = expert(tokens[rows]) * weight[rows, place, None]
            out = out.index_add(0, rows, update.to(out.dtype))
        return out.view_as(x), {"balance": balance}


class LanguageModel(nn.Module):
    """Maps bytes (batch, tokens) to scores of the next byte, and returns the balance as well."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int, experts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        blocks = [(Attention(width, heads), Mixture(width, experts, 2)) for _ in range(depth)]
        self.blocks = revnet.ReversibleSequence(blocks, streams="float")
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        x, aux = self.blocks.with_aux(self.embed(text) + self.position)
        balance = torch.stack([extra["balance"] for extra in aux.values()]).mean()
        return self.head(x), balance


def setup(
    full: bool, device: str, batch: int = 0
) -> tuple[LanguageModel, Callable[[LanguageModel], Tensor]]:
    """Return the network and its loss."""
    tokens, *sizes = (1024, 768, 12, 12, 8) if full else (32, 32, 4, 4, 4)
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    text = torch.tensor(list(source), device=device)
    starts = torch.randint(len(text) - tokens, (batch or 8, 1), device=device)
    chunk = text[starts + torch.arange(tokens + 1, device=device)]

    def loss(model: LanguageModel) -> Tensor:
        scores, balance = model(chunk[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), chunk[:, 1:].flatten()) + 0.01 * balance

    return LanguageModel(tokens, *sizes).to(device), loss


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0)
    model, loss_of = setup(args.full, args.device)
    loss = partial(loss_of, model)
    first, last = fit(model, loss, args.steps or (50 if args.full else 20), 3e-3)
    return {"first": first, "last": last, **compare(model, loss)}


if __name__ == "__main__":
    main()
