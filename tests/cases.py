"""Shared branches and cases: what the tests run a sequence on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle import StoredSequence, stored_copy
from revnet import ReversibleSequence

# Torch's own, from tracing any Function and any tensor with a history, and from inductor's
# imports.
COMPILER_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
]

# What torch itself does not do here is said in the docs, and expected in the tests.
OLD_TORCH = torch.__version__ < "2.12"

_noted: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def noted(module: nn.Module) -> list[Any]:
    """Return a list for what a module notes in each evaluation.

    It lies outside of the module, because a replay leaves no trace in the module itself.
    """
    return _noted.setdefault(module, [])


class Mlp(nn.Module):
    """Norm, linear, GELU, dropout, linear."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.dropout(F.gelu(self.enter(self.norm(x)))))


class Attention(nn.Module):
    """Causal attention over (batch, tokens, width), with everything a decoder routes to it."""

    def __init__(
        self, width: int, dropout: float = 0.0, *, fused: bool = False, heads: int = 2
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.fused = heads, dropout, fused
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, rotary: Tensor | None = None
    ) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        if rotary is not None:
            q, k = q * rotary.cos(), k * rotary.cos()
        # Made anew in each call: a leaf that did not exist before it, like a dropout mask.
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            allowed = allowed & mask[:, None, None, :]
        rate = self.dropout if self.training else 0.0
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=rate)
        else:
            # A factor would be saved as a number of eight bytes, which no hook sees and the exact
            # tests would count.
            scores = (q @ k.mT).masked_fill(~allowed, -1e9)
            mixed = F.dropout(scores.softmax(-1), rate) @ v
        return self.leave(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Convolution(nn.Module):
    """Convolution, optional batch norm, GELU over (batch, channels, height, width)."""

    def __init__(self, width: int, *, norm: bool = False) -> None:
        super().__init__()
        # Before a batch norm a bias has no gradient but rounding noise.
        self.convolve = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.convolve(x)))


class Modulated(nn.Module):
    """A linear branch whose input and output are modulated by keyword tensors."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        if scale is not None:
            x = x * scale
        out = self.dropout(self.linear(x).sin())
        return out if shift is None else out + shift.tanh() * out


class Gate(nn.Module):
    """Gated products: one tensor is saved by several operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x * x.sigmoid() * x.cos()) * self.gate(x).sigmoid()


class InPlaceInside(nn.Module):
    """In-place activations on the branch's own tensors are allowed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mul_(0.5)


class SavesInput(nn.Module):
    """sin saves its input: the stream itself."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class SavesResult(nn.Module):
    """tanh saves its result: the branch's own output."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class SavesNothing(nn.Module):
    """Linear without a parameter: no tensor is saved, so nothing ever asks for this step's
    state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class ReturnsInput(nn.Identity):
    """The output is the stream itself, the same tensor object."""


class Constant(nn.Module):
    """The output does not depend on the input, and needs no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 0.25)


class Detached(nn.Module):
    """A branch with parameters that is computed without a graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Bias(nn.Module):
    """A parameter, expanded: needs a gradient, ignores the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.sin().expand_as(x)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, 3 * x * x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Reads what it saved twice: each read unpacks anew.
        _, first = ctx.saved_tensors
        x, _ = ctx.saved_tensors
        return grad * (first + 3 * x * x) / 2


class ReadsSavedTwice(nn.Module):
    """A custom Function whose backward reads its saved tensors twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(self.linear(x).tanh())


class Force(nn.Module):
    """Differentiates inside its own forward, as energy-based models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.linear(x).tanh().square().sum(), x, create_graph=True)[0]


class Unused(nn.Module):
    """One of its two layers takes no part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).tanh()


class Linear(nn.Linear):
    """A bare linear branch: what it saves depends on the strides of its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)


def with_dropout(branch: type[nn.Module], rate: float = 0.3) -> Callable[[int], nn.Module]:
    """Returns a maker of `branch` that drops at `rate`."""
    return lambda width: branch(width, dropout=rate)


def fused(width: int) -> nn.Module:
    """Attention by torch's own kernel."""
    return Attention(width, fused=True)


def normed(width: int) -> nn.Module:
    """A convolution with batch norm."""
    return Convolution(width, norm=True)


Maker = Callable[[int], nn.Module]
Pairs = list[tuple[nn.Module, nn.Module]]


def build(
    makers: list[tuple[Maker, Maker]],
    width: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Pairs:
    """Returns one `(f, g)` pair per pair of makers, with every parameter away from its special
    initial value.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = [(f(width).to(dtype), g(width).to(dtype)) for f, g in makers]
        with torch.no_grad():
            for branch in (branch for pair in pairs for branch in pair):
                for parameter in branch.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return pairs


def randn(
    *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> Tensor:
    """Returns normal numbers that do not depend on, nor move, the global generator."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_(requires_grad)


@dataclass(frozen=True)
class Case:
    """One network and its input. `makers` are repeated until `depth` blocks are made."""

    name: str
    depth: int
    makers: tuple[tuple[Maker, Maker], ...]
    shape: tuple[int, ...] = (2, 6, 8)
    options: Mapping[str, Any] = field(default_factory=dict)
    route: Mapping[str, tuple[tuple[bool, bool], ...]] = field(default_factory=dict)
    keywords: Callable[[], dict[str, Any]] = dict
    shared: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def width(self) -> int:
        """The width that a branch sees."""
        size = self.shape[self.options.get("dim", -1)]
        return size // 2 if self.options.get("split") == "chunk" else size

    def pairs(self, *, seed: int = 0) -> Pairs:
        """Returns fresh branches, the same for the same seed."""
        if self.shared:
            return build(list(self.makers), self.width, seed=seed) * (
                self.depth // len(self.makers)
            )
        return build(
            [self.makers[i % len(self.makers)] for i in range(self.depth)], self.width, seed=seed
        )

    def input(self, *, seed: int = 1, requires_grad: bool = True) -> Tensor:
        """Returns the input, float64."""
        return randn(*self.shape, seed=seed, requires_grad=requires_grad)


def every(depth: int, to_f: bool, to_g: bool) -> tuple[tuple[bool, bool], ...]:
    """Returns the route that is the same in each block."""
    return ((to_f, to_g),) * depth


def _decoder_keywords() -> dict[str, Any]:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return {"mask": mask, "rotary": randn(6, 4, seed=7)}


def _modulation() -> dict[str, Any]:
    return {
        "scale": randn(2, 1, 8, seed=8, requires_grad=True),
        "shift": randn(6, 8, seed=9, requires_grad=True),
    }


_CHUNKED = {"split": "chunk", "merge": "concat"}
_CHANNELS = {"split": "chunk", "merge": "concat", "dim": 1}

CASES: list[Case] = [
    Case("linear-L1", 1, ((Linear, Linear),)),
    Case("linear-L8-2d", 8, ((Linear, Linear),), shape=(5, 8)),
    Case("mlp-L8", 8, ((Mlp, Mlp),)),
    Case("mlp-L8-dropout", 8, ((with_dropout(Mlp), with_dropout(Mlp)),)),
    Case("mlp-L3-channels-last", 3, ((Mlp, Mlp),), shape=(2, 3, 4, 8)),
    Case("mlp-L4-chunk-concat", 4, ((Mlp, Mlp),), options=_CHUNKED),
    Case("mlp-L4-chunk-sum", 4, ((Mlp, Mlp),), options={"split": "chunk", "merge": "sum"}),
    Case(
        "linear-L4-chunk-mean", 4, ((Linear, Linear),), options={"split": "chunk", "merge": "mean"}
    ),
    Case("linear-L3-copy-concat", 3, ((Linear, Linear),), options={"merge": "concat"}),
    Case("attention-L4", 4, ((Attention, Mlp),)),
    Case("attention-L8-dropout", 8, ((with_dropout(Attention), with_dropout(Mlp)),)),
    Case("attention-L4-fused", 4, ((fused, Mlp),)),
    Case(
        "attention-L4-mask-rotary",
        4,
        ((Attention, Mlp),),
        route={
            "mask": every(4, True, False),
            "rotary": ((True, False), (False, False), (True, False), (True, False)),
        },
        keywords=_decoder_keywords,
    ),
    Case(
        "modulated-L4-keywords",
        4,
        ((Modulated, Modulated),),
        route={
            "scale": every(4, True, True),
            "shift": ((True, False), (False, True), (True, True), (False, False)),
        },
        keywords=_modulation,
    ),
    Case(
        "modulated-L4-keywords-dropout",
        4,
        ((with_dropout(Modulated), with_dropout(Modulated)),),
        route={"scale": every(4, False, True), "shift": every(4, True, True)},
        keywords=_modulation,
    ),
    Case(
        "convolution-L3-nchw-chunk",
        3,
        ((Convolution, Convolution),),
        shape=(2, 6, 4, 4),
        options=_CHANNELS,
    ),
    Case(
        "convolution-L3-nchw-copy",
        3,
        ((Convolution, Convolution),),
        shape=(2, 4, 4, 4),
        options={"dim": 1},
    ),
    Case("convolution-L3-batchnorm", 3, ((normed, normed),), shape=(3, 6, 4, 4), options=_CHANNELS),
    Case("gate-L4", 4, ((Gate, Gate),)),
    Case("in-place-inside-L4", 4, ((InPlaceInside, InPlaceInside),)),
    Case("saves-input-saves-result-L4", 4, ((SavesInput, SavesResult),)),
    Case("saves-result-saves-nothing-L4", 4, ((SavesResult, SavesNothing),)),
    Case("saves-nothing-L3", 3, ((SavesNothing, ReturnsInput),)),
    Case("saves-nothing-between-L4", 4, ((Linear, SavesNothing), (ReturnsInput, Mlp))),
    Case("constant-detached-L4", 4, ((Constant, Mlp), (Detached, Linear))),
    Case("bias-L3", 3, ((Bias, Mlp),)),
    Case("reads-saved-twice-L3", 3, ((ReadsSavedTwice, Mlp),)),
    Case("force-L3", 3, ((Force, Mlp),)),
    Case("force-L3-chunk", 3, ((with_dropout(Mlp), Force),), options=_CHUNKED),
    Case("unused-L3", 3, ((Unused, Unused),)),
    Case("shared-L4", 4, ((Mlp, Gate),), shared=True),
    Case("shared-L4-dropout", 4, ((with_dropout(Mlp), with_dropout(Mlp)),), shared=True),
    Case(
        "mixed-L6",
        6,
        ((fused, Mlp), (SavesNothing, Gate), (with_dropout(Attention), InPlaceInside)),
    ),
]

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}


def named(*names: str) -> list[Case]:
    """Returns the cases of those names."""
    return [BY_NAME[name] for name in names]


def both(case: Case, **options: Any) -> tuple[ReversibleSequence, StoredSequence]:
    """Returns the sequence and the stored loop over copies of the same branches."""
    pairs = case.pairs()
    oracle = stored_copy(pairs, case.route, **case.options)
    return ReversibleSequence(pairs, case.route, **case.options, **options), oracle
