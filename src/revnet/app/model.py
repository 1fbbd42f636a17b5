"""A decoder-only transformer on a reversible sequence: image tokens after captions, or bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet

PAD = 0
BUCKETS = 2**14
# Logits that exist at a time while the loss is computed: 64 MiB in float32.
LOGITS = 2**24


@dataclass(frozen=True)
class Shape:
    """The size of a `Transformer`.

    Args:
        depth: Blocks; each is one attention branch and one feed-forward branch.
        width: Features per token; a multiple of 4 times `heads`.
        heads: Attention heads.
        prefix_vocab: Different prefix (caption) tokens; id 0 is padding.
        prefix_length: Prefix tokens before the first predicted token, at least 1.
        vocab: Different predicted tokens.
        rows, columns: The grid of image tokens in raster order; a text of length n has n rows and 1
            column.
        dropout: Share of each branch's output that is dropped in training.
        ngrams: The most tokens, one and those before it, that are embedded together.
    """

    depth: int
    width: int
    heads: int
    prefix_vocab: int
    prefix_length: int
    vocab: int
    rows: int
    columns: int
    dropout: float = 0.0
    ngrams: int = 1

    @property
    def length(self) -> int:
        """Return the number of predicted tokens of one example."""
        return self.rows * self.columns

    @property
    def text(self) -> bool:
        """Return whether the tokens are a text, not an image."""
        return self.columns == 1


def rotary_table(shape: Shape) -> Tensor:
    """Return cosines and sines for each slot: (2, slots, width // heads), float32.

    Half of each head turns with the row and half with the column of a token. Prefix tokens stand on
    the diagonal before the image, and so do all tokens of a text, which makes this the ordinary
    one-dimensional embedding for text.

    Reference: Su et al. 2021, arXiv:2104.09864.
    """
    before = torch.arange(-shape.prefix_length, 0)
    token = torch.arange(shape.length)
    rows = torch.cat([before, token // shape.columns])
    columns = torch.cat([before, token if shape.text else token % shape.columns])
    pairs = shape.width // shape.heads // 2
    pair = torch.arange(pairs)
    frequencies = 10_000.0 ** -(pair / pairs) if shape.text else 100.0 ** -(pair // 2 * 2 / pairs)
    places = torch.stack([rows, columns], dim=1).float().repeat(1, pairs // 2)
    angles = (places * frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn x (batch, heads, slots, head width) by its slots' angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = table.unbind()
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class NGrams(nn.Embedding):
    """Embeddings of tokens, and by a hash of each with the one, two … before it.

    What a small model of bytes would spend its first blocks on is looked up instead.

    Reference: Pagnoni et al. 2024 (Byte Latent Transformer), arXiv:2412.09871.
    """

    def __init__(self, vocab: int, width: int, most: int) -> None:
        super().__init__(vocab, width)
        self.longer = nn.ModuleList(nn.Embedding(BUCKETS, width) for _ in range(most - 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (batch, n, width) for tokens (batch, n), int64."""
        x, code = super().forward(tokens), tokens
        for n, table in enumerate(self.longer, start=1):
            before = F.pad(tokens, (n, 0), value=-1)[:, : tokens.shape[1]]
            # Modulo a prime, which mixes all of them into the lower bits that choose the bucket.
            code = (code * 1_000_003 + before + 1) % (2**31 - 1)
            x = x + table(code % BUCKETS)
        return x


class Attention(nn.Module):
    """Pre-norm causal self-attention, the branch f."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        x: Tensor,
        rotary_pos_emb: Tensor,
        mask: Tensor | None = None,
        cache: dict[Any, Any] | None = None,
    ) -> Tensor:
        """Return (batch, slots, width).

        Args:
            x: (batch, slots, width).
            rotary_pos_emb: What `rotary_table` returns, for these slots.
            mask: bool, True where a query (row) may see a key (column); None is causal.
            cache: A dict, empty at first.

        The `cache` holds this layer's keys and values of earlier slots; those of x are appended.
        """
        batch, slots, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, slots, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotary_pos_emb), rotate(k, rotary_pos_emb)
        if cache is not None:
            if self in cache:
                k, v = (
                    torch.cat([old, new], dim=2)
                    for old, new in zip(cache[self], (k, v), strict=True)
                )
            cache[self] = k, v
        # One slot sees all that the cache holds; more than one after a cache come with a mask.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and slots > 1
        )
        return self.dropout(self.out(y.transpose(1, 2).reshape(batch, slots, width)))


class FeedForward(nn.Module):
    """Pre-norm multilayer perceptron, the branch g."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.hidden = nn.Linear(shape.width, 4 * shape.width)
        self.out = nn.Linear(4 * shape.width, shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, slots, width) for x (batch, slots, width)."""
        return self.dropout(self.out(F.gelu(self.hidden(self.norm(x)))))


class Transformer(nn.Module):
    """A network that predicts each token from the prefix and the tokens before it.

    Args:
        shape: The sizes.
        sequence_options: Keyword arguments of `revnet.ReversibleSequence`, such as `execution`.

    Reference: Ramesh et al. 2021 (DALL·E), arXiv:2102.12092; Gomez et al. 2017, arXiv:1707.04585.
    """

    rotary: Tensor

    def __init__(self, shape: Shape, **sequence_options: Any) -> None:
        super().__init__()
        self.shape = shape
        self.prefix_embedding = nn.Embedding(shape.prefix_vocab, shape.width)
        self.embedding = NGrams(shape.vocab, shape.width, shape.ngrams)
        only_attention = ((True, False),) * shape.depth
        self.layers = revnet.ReversibleSequence(
            [(Attention(shape), FeedForward(shape)) for _ in range(shape.depth)],
            args_route={
                "rotary_pos_emb": only_attention,
                "mask": only_attention,
                "cache": only_attention,
            },
            **sequence_options,
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if not shape.text:
            self.row = nn.Parameter(0.1 * torch.randn(shape.rows, 1, shape.width))
            self.column = nn.Parameter(0.1 * torch.randn(shape.columns, shape.width))
        self.register_buffer("rotary", rotary_table(shape), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Start with branches whose sum is of unit scale, and a head that gives equal odds.

        Combinations of tokens that have not been seen add nothing.
        """
        for name, parameter in self.named_parameters():
            if name == "head.weight" or ".longer." in name:
                nn.init.zeros_(parameter)
            elif "embedding" in name:
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith(("qkv.weight", "hidden.weight", "out.weight")):
                scale = math.sqrt(2 * self.shape.depth) if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=1 / (scale * math.sqrt(parameter.shape[1])))

    def embed(self, prefix: Tensor, tokens: Tensor, done: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of `layers`, less the first `done` slots, and its keyword arguments."""
        x = torch.cat([self.prefix_embedding(prefix), self.embedding(tokens)], dim=1)
        slots = x.shape[1]
        if not self.shape.text:
            # Rotation is relative: which token a slot predicts is added to what it reads.
            predicted = (self.row + self.column).flatten(0, 1)[: slots - prefix.shape[1] + 1]
            x = x + F.pad(predicted, (0, 0, slots - len(predicted), 0))
        mask = None
        if self.shape.prefix_length > 1 or 0 < done < slots - 1:
            key = torch.arange(slots, device=x.device)
            query = key[done:, None]
            seen = F.pad(prefix != PAD, (0, tokens.shape[1]), value=True)[:, None, None]
            # A padding slot sees itself: a row that sees nothing would be NaN.
            mask = (key <= query) & (seen | (key == query))
        return x[:, done:], {"rotary_pos_emb": self.rotary[:, done:slots], "mask": mask}

    def forward(
        self,
        prefix: Tensor,
        tokens: Tensor,
        cache: dict[Any, Any] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits of the token after each slot from the last prefix slot on, or their losses.

        Args:
            prefix: (batch, prefix_length), int64; padding first.
            tokens: (batch, n), int64, the first n tokens; n may be 0.
            cache: A dict, empty at first; only slots that it does not hold yet are computed.
            targets: (batch, m), int64, what each of these slots is to predict.

        Returns:
            (batch, m, vocab): m = n + 1, or with a filled cache the number of new slots. With
            `targets`, -ln p of each of them: (batch, m), float32.
        """
        done = 0
        if cache is not None:
            done = cache.get("slots", 0)
            cache["slots"] = prefix.shape[1] + tokens.shape[1]
        x, keywords = self.embed(prefix, tokens, done)
        start = max(prefix.shape[1] - 1 - done, 0)
        x = self.norm(self.layers(x, **keywords, cache=cache)[:, start:])
        return self.head(x) if targets is None else self._losses(x, targets)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Compute the losses so many tokens at a time that there are at most `LOGITS` logits."""
        # Autocast shares the cast of a parameter, and would add up the chunks' gradients in
        # bfloat16. It does not share that of a view.
        weight = self.head.weight.view_as(self.head.weight)
        size = max(1, LOGITS // len(weight))
        pieces = list(zip(x.flatten(0, 1).split(size), targets.flatten().split(size), strict=True))
        if len(pieces) == 1:
            return _cross_entropy(*pieces[0], weight).view(targets.shape)
        losses = [
            checkpoint(_cross_entropy, *piece, weight, use_reentrant=False) for piece in pieces
        ]
        return torch.cat(losses).view(targets.shape)


def _cross_entropy(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    # At least float32: in bfloat16 a loss has two or three digits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none")


def example_bits(model: nn.Module, prefix: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean of -log2 p(token) of each example: (batch,), float32."""
    return model(prefix, tokens[:, :-1], targets=tokens).mean(dim=1) / math.log(2)


def bits_per_token(model: nn.Module, prefix: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean of -log2 p(token) of a batch (batch, length): a scalar with a gradient."""
    return example_bits(model, prefix, tokens).mean()
