"""Branches in the form that real libraries give them, each against ordinary autograd.

None of them was written with reversible networks in mind: they cache, count, record and initialise
as their libraries do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revnet
from oracle import StoredSequence, assert_same_gradients, gradients_of, weighted
from revnet import ReversibleSequence

WIDTH, HEADS = 8, 2
EXECUTIONS = ("invert", "checkpoint", "select", "offload", "store")


class Rotary(nn.Module):
    """Attention with rotary positions; the tables grow with the longest sequence so far."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        frequencies = 1.0 / 10_000 ** (torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        if length > self._seq_len_cached:
            self._seq_len_cached = length
            angles = torch.outer(torch.arange(length, dtype=self.inv_freq.dtype), self.inv_freq)
            angles = torch.cat((angles, angles), -1)
            self._cos_cached, self._sin_cached = angles.cos(), angles.sin()
        assert self._cos_cached is not None
        assert self._sin_cached is not None
        return self._cos_cached[:length], self._sin_cached[:length]

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat((-two, one), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        tables = self._tables(length)
        q, k = self._rotate(q, *tables), self._rotate(k, *tables)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(x.shape)


class RotaryByKey(nn.Module):
    """Tables in a dict by length and dtype, and a scale that is kept beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.cache: dict[Any, Tensor] = {}
        self.hits = 0

    def forward(self, x: Tensor) -> Tensor:
        key = x.shape[-2], x.dtype
        if key in self.cache:
            self.hits += 1
        else:
            self.cache[key] = torch.arange(x.shape[-2], dtype=x.dtype)[:, None].div(7).cos()
        return (self.lin(x) * self.cache[key]).tanh()


class Alibi(nn.Module):
    """Attention with a bias table that is made again when a longer sequence comes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("bias", torch.empty(HEADS, 0, 0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.bias.shape[-1] < length:
            places = torch.arange(length)
            distance = (places[None] - places[:, None]).to(x.dtype)
            slopes = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)], dtype=x.dtype)
            mask = torch.full((length, length), -1e9, dtype=x.dtype).triu(1)
            self.bias = slopes[:, None, None] * distance + mask
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT + self.bias[:, :length, :length]
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


class CausalMask(nn.Module):
    """Position table in a large buffer that is filled on demand, with a count of valid rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.zeros(4096, WIDTH), persistent=False)
        self.filled = 0

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        if length > self.filled:
            rows = torch.arange(WIDTH * (length - self.filled), dtype=x.dtype).view(-1, WIDTH)
            with torch.no_grad():
                self.table[self.filled : length] = (rows + self.filled).sin()
            self.filled = length
        return self.lin(x) * self.table[:length].clone()


class Recurrent(nn.Module):
    """Truncated backpropagation: the state of the last batch, detached."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, cell)(WIDTH, WIDTH, batch_first=True)
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.rnn(x, self.hidden)
        self.hidden = (
            tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
        )
        return out


class ActNorm(nn.Module):
    """Scale and shift that the first batch initialises, before any pass with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.log_scale = nn.Parameter(torch.zeros(WIDTH))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        if not self.initialized:
            with torch.no_grad():
                self.shift.copy_(-x.mean((0, 1)))
                self.log_scale.copy_(-x.std((0, 1)).log())
                self.initialized.fill_(True)
        return ((x + self.shift) * self.log_scale.exp()).tanh()


class VectorQuantizer(nn.Module):
    """Codes that move by an exponential average, written by `.data`; dead ones are redrawn."""

    def __init__(self, codes: int = 80) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("embed", torch.randn(WIDTH, codes))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", self.embed.clone())
        self.last_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        z = self.lin(x)
        flat = z.detach().flatten(0, -2)
        distance = flat.square().sum(1, True) - 2 * flat @ self.embed + self.embed.square().sum(0)
        index = revnet.remember(distance.argmin(-1))
        onehot = F.one_hot(index, self.embed.shape[1]).to(z.dtype)
        quantized = F.embedding(index, self.embed.mT.clone()).view_as(z)
        if self.training:
            self.cluster_size.data.mul_(0.9).add_(onehot.sum(0), alpha=0.1)
            self.embed_avg.data.mul_(0.9).add_(flat.mT @ onehot, alpha=0.1)
            sizes = (self.cluster_size + 1e-5) / (self.cluster_size.sum() + 1e-5)
            self.embed.data.copy_(self.embed_avg / sizes[None].clamp_min(1e-3))
            if torch.rand(()) < 0.5:
                place = torch.randint(flat.shape[0], (1,))
                self.embed.data[:, 0] = flat[place[0]]
        self.last_loss = (quantized - z.detach()).square().mean()
        return z + (quantized - z).detach() + 0.1 * (z - quantized).sin()


class Router(nn.Module):
    """Top-2 of experts whose scores tie, with noise and a running load."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))
        self.register_buffer("load", torch.zeros(experts))
        with torch.no_grad():
            # Two experts with one score each: rounding decides between them.
            self.gate.weight[1], self.gate.bias[1] = self.gate.weight[0], self.gate.bias[0]
            self.gate.weight[3], self.gate.bias[3] = self.gate.weight[2], self.gate.bias[2]

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        if self.training:
            scores = scores + 1e-3 * torch.randn_like(scores).round()
        chosen = revnet.remember(scores.detach().topk(2, -1).indices)
        weights = scores.gather(-1, chosen).softmax(-1)
        self.load += F.one_hot(chosen, len(self.experts)).sum((0, 1, 2))
        out = torch.stack([expert(x) for expert in self.experts], -2)
        picked = out.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (weights[..., None] * picked).sum(-2).tanh()


class Lora(nn.Module):
    """Adapters by name, one of which is switched on by an attribute; merged in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down = nn.ParameterDict({n: nn.Parameter(torch.randn(2, WIDTH)) for n in "ab"})
        self.up = nn.ParameterDict({n: nn.Parameter(torch.randn(WIDTH, 2)) for n in "ab"})
        self.active: list[str] = ["a"]
        self.scaling = {"a": 0.5, "b": 2.0}
        self.disabled = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.disabled:
            for name in self.active:
                out = out + self.scaling[name] * (x @ self.down[name].mT) @ self.up[name].mT
        return out.tanh()


class Film(nn.Module):
    """Reads scale and shift that the model put there."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.context: Any = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.context["film"]
        return (self.lin(x) * scale + shift).tanh()


class Recorder(nn.Module):
    """Keeps activations in a list, their names in a set, and reads the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.activations: list[Tensor] = []
        self.names: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        out = self.lin(x).tanh()
        if self.activations and self.activations[-1].shape == out.shape:
            out = out + 0.1 * self.activations[-1]
        self.names.add(f"call {len(self.activations)}")
        self.activations.append(out.detach())
        return out / len(self.names)


class SpectralNorm(nn.Module):
    """One power iteration per call in training, as torch's own parametrization does."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).tanh()


class DropPath(nn.Module):
    """Whole samples dropped at a rate that a schedule moves."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.rate, self.step = nn.Linear(WIDTH, WIDTH), 0.1, 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        keep = 1 - min(0.5, self.rate * self.step)
        mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(keep)
        return self.lin(x).tanh() * mask / keep


class KeyValueCache(nn.Module):
    """Attends to what earlier calls left."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.past: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        keys = torch.cat([*(key for key, _ in self.past), k], 1)
        values = torch.cat([*(value for _, value in self.past), v], 1)
        self.past.append((k.detach(), v.detach()))
        return (q @ keys.mT / WIDTH**0.5).softmax(-1) @ values


class QueueOfNegatives(nn.Module):
    """A ring of keys in a buffer with a pointer, as in contrastive learning."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("queue", F.normalize(torch.randn(WIDTH, 64), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        z = self.lin(x)
        logits = F.normalize(z, dim=-1) @ self.queue.clone().detach()
        with torch.no_grad():
            keys = F.normalize(z.detach().flatten(0, 1), dim=-1)
            place = int(self.queue_ptr)
            at = torch.arange(place, place + len(keys)) % 64
            self.queue[:, at] = keys.mT
            self.queue_ptr[0] = (place + len(keys)) % 64
        return z.tanh() + logits.softmax(-1) @ self.queue.mT.clone().detach()


def _nothing(net: Any, part: int, x: Tensor) -> None:
    pass


def _switch(net: Any, part: int, x: Tensor) -> None:
    for block in net.blocks:
        block.f.active[:] = ["b"] if part else ["a"]
        block.f.scaling["b"] = 2.0 - part
        block.f.disabled = part == 2


def _context(net: Any, part: int, x: Tensor) -> None:
    film = net.encoder(x.mean(1, keepdim=True)).chunk(2, -1)
    for block in net.blocks:
        block.f.context = {"film": film}


def _lengths(part: int) -> int:
    # A longer one, then a shorter one.
    return (3, 6, 2)[part]


Case = tuple[Callable[[], nn.Module], Callable[[Any, int, Tensor], None]]
CASES: dict[str, Case] = {
    "rotary": (Rotary, _nothing),
    "rotary by key": (RotaryByKey, _nothing),
    "alibi": (Alibi, _nothing),
    "filled table": (CausalMask, _nothing),
    "gru": (lambda: Recurrent("GRU"), _nothing),
    "lstm": (lambda: Recurrent("LSTM"), _nothing),
    "actnorm": (ActNorm, _nothing),
    "codebook": (VectorQuantizer, _nothing),
    "small codebook": (lambda: VectorQuantizer(5), _nothing),
    "router": (Router, _nothing),
    "lora": (Lora, _switch),
    "film": (Film, _context),
    "recorder": (Recorder, _nothing),
    "spectral norm": (SpectralNorm, _nothing),
    "drop path": (DropPath, _nothing),
    "key-value cache": (KeyValueCache, _nothing),
    "queue": (QueueOfNegatives, _nothing),
}


def _train(name: str, kind: Any, wrap: Callable[[Any], Any] = lambda net: net, **options: Any):
    """Return what two steps of three micro-batches leave."""
    branch, prepare = CASES[name]
    torch.manual_seed(0)
    net = kind([(branch(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)], **options)
    net.encoder = nn.Linear(WIDTH, 2 * WIDTH)
    net = net.double()
    called = wrap(net)
    if name == "actnorm":
        with torch.no_grad():
            net(torch.randn(2, 4, WIDTH, dtype=torch.float64))
    found: dict[str, Tensor | None] = {}
    for step in range(2):
        losses = []
        for part in range(3):
            x = torch.randn(2, _lengths(part), WIDTH, dtype=torch.float64)
            prepare(net, part, x)
            losses.append(weighted(called(x)))
        found[f"loss {step}"] = torch.stack(losses).detach()
        torch.stack(losses).sum().backward()
        found |= {f"{step} {name}": grad for name, grad in gradients_of(net).items()}
        found |= {f"{step} {name}": value.clone() for name, value in net.named_buffers()}
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0 if p.grad is None else 1e-2 * p.grad)
    found["generator"] = torch.get_rng_state()
    return found


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", CASES)
def test_like_ordinary_autograd(name: str, execution: str) -> None:
    found = _train(name, ReversibleSequence, execution=execution)
    assert_same_gradients(found, _train(name, StoredSequence), 1e-9)


@pytest.mark.parametrize("execution", ["invert", "checkpoint", "select"])
@pytest.mark.parametrize("name", CASES)
def test_fixed_like_stored(name: str, execution: str) -> None:
    found = _train(name, ReversibleSequence, execution=execution, streams="fixed")
    expected = _train(name, ReversibleSequence, execution="store", streams="fixed")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] is None if value is None else torch.equal(found[key], value), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    """Compiled, a sequence falls back to eager where a branch has state, or is right itself."""
    found = _train(name, ReversibleSequence, lambda net: torch.compile(net, backend="aot_eager"))
    assert_same_gradients(found, _train(name, StoredSequence), 1e-9)
