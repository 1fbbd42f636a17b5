"""A decoder for long contexts: heads in groups, the MLP in tiles, the loss in chunks.

Attention is a sum over heads, so that groups of heads are additive steps on the same streams, and
the activations of one group live at a time. The MLP runs on some tokens at a time, and so does the
loss.

Reference: Ainslie et al. 2023, arXiv:2305.13245 (groups of queries that share keys and values).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import compare, fit, options
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet import Reversible, Step


class HeadGroup(nn.Module):
    """Some heads of a causal attention: their part of its output."""

    def __init__(self, width: int, heads: int, kv_heads: int, size: int) -> None:
        super().__init__()
        self.sizes = (heads * size, kv_heads * size, kv_heads * size)
        self.size = size
        self.norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.leave = nn.Linear(heads * size, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        parts = self.qkv(self.norm(x)).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        q, k = rotated(q, *turn), rotated(k, *turn)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.leave(mixed.transpose(1, 2).flatten(2))


def turns(tokens: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of rotary positions, (tokens, size / 2) each, arXiv:2104.09864."""
    frequency = 10000.0 ** -torch.arange(0, 1, 2 / size, device=like.device)
    angle = torch.arange(tokens, device=like.device)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Mlp(nn.Module):
    """SwiGLU, arXiv:2002.05202."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.enter = nn.Linear(width, 2 * hidden, bias=False)
        self.leave = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.enter(self.norm(x)).chunk(2, -1)
        return self.leave(F.silu(gate) * value)


class LongContext(nn.Module):
    """A language model whose memory grows with the streams of its tokens alone."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        kv_heads: int,
        groups: int,
        hidden: int,
        tile: int,
        chunk: int,
    ) -> None:
        super().__init__()
        if kv_heads % groups:
            raise ValueError(f"{kv_heads} heads of keys and values are not {groups} equal groups")
        self.embed = nn.Embedding(vocabulary, width)
        steps: list[Step] = []
        for _ in range(depth):
            for _ in range(groups):
                group = HeadGroup(width, heads // groups, kv_heads // groups, width // heads)
                steps.append(Step(group, 0, 1, kwargs={"turn": "turn"}))
            steps.append(Step(Mlp(width, hidden), 1, 0, tile=tile))
        self.steps = Reversible(steps)
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.size, self.chunk = width // heads, chunk

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of the next token; `tokens` is (batch, tokens + 1)."""
        x = self.embed(tokens[:, :-1])
        return self.loss(self.trunk(x, turns(x.shape[1], self.size, x)), tokens[:, 1:])

    def trunk(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        a, b = self.steps(x, x, turn=turn)
        return a + b

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        low = hidden.dtype is torch.bfloat16
        if hidden.is_cuda and low and importlib.util.find_spec("liger_kernel") is not None:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
            return fused(self.head.weight, self.norm(hidden), targets)
        # In at least float32, so that the gradients of the chunks are added up in it.
        high = torch.promote_types(hidden.dtype, torch.float32)
        gain, weight = self.norm.weight.to(high), self.head.weight.to(high)
        total = hidden.new_zeros((), dtype=high)
        pairs = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        for part, wanted in pairs:
            total = total + checkpoint(self.piece, part, gain, weight, wanted, use_reentrant=False)
        return total / targets.numel()

    def piece(self, hidden: Tensor, gain: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden = F.layer_norm(hidden, gain.shape, gain.to(hidden.dtype), eps=self.norm.eps)
        logits = F.linear(hidden, weight.to(hidden.dtype))
        high = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(high), targets, reduction="sum")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, steps=0, tokens=0)
    if args.full:  # 1.2 billion parameters
        model = LongContext(32768, 2048, 24, 16, 16, 8, 5504, 4096, 4096)
        # Stored execution, which it is compared with, does not fit a GPU at many more tokens.
        tokens, steps, rate = args.tokens or 16384, args.steps or 1, 1e-4
    else:
        model = LongContext(64, 32, 3, 4, 2, 2, 96, 32, 64)
        tokens, steps, rate = args.tokens or 160, args.steps or 20, 3e-3
    model = model.to(args.device, torch.bfloat16)
    text = torch.randint(64, (1, tokens // 2 + 1)).repeat(1, 2)[:, : tokens + 1].to(args.device)
    first, last = fit(model, lambda: model(text), steps, rate)
    return {"first": first, "last": last, **compare(model, lambda: model(text))}


if __name__ == "__main__":
    main()
