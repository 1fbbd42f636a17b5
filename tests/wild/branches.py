"""Branches with state of their own, in the form in which real libraries write them.

Each maps (batch, tokens, 8) to the same shape.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import revnet

WIDTH = 8


def _rotate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _angles(tokens: int, x: Tensor) -> Tensor:
    rates = 1.0 / 100 ** (torch.arange(0, WIDTH, 2, dtype=x.dtype) / WIDTH)
    angles = torch.outer(torch.arange(tokens, dtype=x.dtype), rates)
    return torch.cat((angles, angles), -1)


class RotaryBuffers(nn.Module):
    """Position tables in buffers, and a number that says how many rows are filled."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cos", torch.zeros(32, WIDTH), persistent=False)
        self.register_buffer("sin", torch.zeros(32, WIDTH), persistent=False)
        self.filled = 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if tokens > self.filled:
            angles = _angles(tokens, x)
            self.cos[:tokens], self.sin[:tokens] = angles.cos(), angles.sin()
            self.filled = tokens
        h = self.enter(x)
        return h * self.cos[:tokens] + _rotate(h) * self.sin[:tokens]


class RotaryAttributes(nn.Module):
    """Position tables in plain attributes, made anew for longer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self._seq_len_cached: int | None = None
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self._seq_len_cached:
            self._seq_len_cached = x.shape[1]
            angles = _angles(x.shape[1], x)
            self._cos_cached, self._sin_cached = angles.cos()[None], angles.sin()[None]
        h = self.enter(x)
        return h * self._cos_cached + _rotate(h) * self._sin_cached


class RotaryScaled(nn.Module):
    """Positions whose base grows with the longest input so far."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.max_seq_len_cached = 4
        self.register_buffer("inv_freq", torch.ones(WIDTH // 2), persistent=False)
        self.original_inv_freq = self.inv_freq

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.max_seq_len_cached:
            self.max_seq_len_cached = x.shape[1]
            self.register_buffer("inv_freq", 1.0 / x.shape[1] ** torch.arange(WIDTH // 2).to(x))
        angles = torch.outer(torch.arange(x.shape[1]).to(x), self.inv_freq)
        angles = torch.cat((angles, angles), -1)
        h = self.enter(x)
        return h * angles.cos() + _rotate(h) * angles.sin()


class Alibi(nn.Module):
    """Attention whose linear biases and causal mask are kept for the longest input so far."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("bias", None, persistent=False)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if self.bias is None or self.bias.shape[-1] < tokens:
            places = torch.arange(tokens)
            self.bias = -0.5 * (places[:, None] - places).abs().to(x)
            self.mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        assert self.mask is not None
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / math.sqrt(WIDTH) + self.bias[:tokens, :tokens]
        return scores.masked_fill(~self.mask[:tokens, :tokens], -1e9).softmax(-1) @ v


class RelativePositions(nn.Module):
    """Biases read from a table, whose indices are kept in a dict by length."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(64, WIDTH)
        self.cache: dict[tuple[int, str], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = x.shape[1], x.device.type
        if key not in self.cache:
            self.cache[key] = torch.arange(x.shape[1]).flip(0)
        return self.enter(x).tanh() * self.table(self.cache[key])


class Lstm(nn.Module):
    """A recurrent layer that goes on from where the last call ended."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, (h, c) = self.cell(x, self.state)
        self.state = h.detach(), c.detach()
        return out


class GruStack(nn.Module):
    """Cells whose states stand in a list that each call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(WIDTH, WIDTH) for _ in range(2))
        self.hidden: list[Tensor | None] = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for token in x.unbind(1):
            for i, cell in enumerate(self.cells):
                token = cell(token, self.hidden[i])
                self.hidden[i] = token
            outputs.append(token)
        self.hidden = [None if h is None else h.detach() for h in self.hidden]
        return torch.stack(outputs, 1)


class KeyValueCache(nn.Module):
    """Attention that reads what earlier calls computed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.past: dict[str, Any] = {"length": 0}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.past["length"]:
            k, v = torch.cat((self.past["k"], k), 1), torch.cat((self.past["v"], v), 1)
        self.past.update(k=k.detach(), v=v.detach(), length=k.shape[1])
        return (q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v


class StreamingConvolution(nn.Module):
    """A causal convolution whose padding is the end of the last input."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv1d(WIDTH, WIDTH, 3)
        self.ends: deque[Tensor] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        end = self.ends[-1] if self.ends else x.new_zeros(x.shape[0], WIDTH, 2)
        self.ends.append(x[..., -2:].detach())
        return self.convolve(torch.cat((end, x), -1)).tanh().mT


class ActNorm(nn.Module):
    """Scale and shift that the first input determines."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if not self.initialized:
            with torch.no_grad():
                self.scale.data.copy_(1 / (x.std((0, 1)) + 1e-3))
                self.shift.data.copy_(-x.mean((0, 1)))
            self.initialized.fill_(True)
        return ((x + self.shift) * self.scale).tanh()


class Codebook(nn.Module):
    """Vector quantisation with a codebook of moving averages, written through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("codes", torch.randn(6, WIDTH))
        self.register_buffer("sizes", torch.ones(6))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        chosen = revnet.remember(torch.cdist(h.detach().flatten(0, 1), self.codes).argmin(-1))
        read = self.codes[chosen].view_as(h)
        if self.training:
            hot = F.one_hot(chosen, 6).to(x.dtype)
            self.sizes.data.mul_(0.8).add_(hot.sum(0), alpha=0.2)
            self.sums.data.mul_(0.8).add_(hot.T @ h.detach().flatten(0, 1), alpha=0.2)
            self.codes.data.copy_(self.sums / self.sizes[:, None])
        return self.leave(h * read)


class Router(nn.Module):
    """Two experts of four for each token; tokens that are alike tie, and loads are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("load", torch.zeros(4))
        self.last_route: Tensor | None = None
        with torch.no_grad():
            # The first two experts always tie.
            self.score.weight[1] = self.score.weight[0]
            self.score.bias[1] = self.score.bias[0]

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.score(x) - 0.05 * self.load).softmax(-1)
        chosen = revnet.remember(weights.topk(2).indices)
        weights = weights.gather(-1, chosen)
        with torch.no_grad():
            self.load += F.one_hot(chosen, 4).sum((0, 1, 2))
        self.last_route = chosen
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        places = chosen[..., None].expand(*chosen.shape, WIDTH)
        return (outputs.gather(-2, places) * weights[..., None]).sum(-2).tanh()


class Lora(nn.Module):
    """A linear layer with adapters, one of which the state selects by name."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down = nn.ModuleDict({name: nn.Linear(WIDTH, 2) for name in ("en", "de")})
        self.up = nn.ModuleDict({name: nn.Linear(2, WIDTH) for name in ("en", "de")})
        self.scaling = {"en": 1.0, "de": 2.0}
        self.active_adapters = ["en"]
        self.disabled = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.disabled:
            for name in self.active_adapters:
                out = out + self.scaling[name] * self.up[name](self.down[name](x).tanh())
        return out.tanh()


class Film(nn.Module):
    """A layer that a context modulates, which is set on it before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.context: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).tanh()
        return h * self.context["gamma"] + self.context["beta"] * h.square()


class Recorder(nn.Module):
    """Records its activations, as tools for interpretation do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.activations: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.enter(x).sin()
        self.activations.append(out.detach().mean())
        self.calls += 1
        return out * (1 + 0.1 * self.calls)


class Schedule(nn.Module):
    """Dropout and temperature that depend on how often the module was called."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.step, self.rate = 0, 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        self.rate = 0.5 / self.step
        return F.dropout(self.enter(x), self.rate, self.training).tanh() / self.step


class OwnNoise(nn.Module):
    """Noise from a generator of its own, as samplers of diffusion take one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return (self.enter(x) + 0.1 * noise).tanh()


class WrappedForward(nn.Module):
    """A forward that a function with state of its own wraps, as libraries that place weights do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        plain, seen = self.forward, {"calls": 0, "longest": 1}

        @functools.wraps(plain)
        def wrapped(x: Tensor) -> Tensor:
            seen["calls"] += 1
            seen["longest"] = max(seen["longest"], x.shape[1])
            return plain(x) * seen["longest"] / seen["calls"]

        self.forward = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return self.enter(x).tanh()


class ListedExperts(nn.Module):
    """Routes to experts in a plain list, with statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.experts = [nn.Sequential(RunningMean()), RunningMean()]

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outs = [expert((i + 1) * self.enter(x)) for i, expert in enumerate(self.experts)]
        return sum(weights[..., i, None] * out for i, out in enumerate(outs))


class RunningMean(nn.Module):
    """Subtracts the mean of all inputs so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean((0, 1)), 0.5)
        return (x - self.mean.clone()).tanh()


class RunningStatistics(nn.Module):
    """Batch norm that averages over all calls, and spectral norm's power iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.enter(x).tanh().mT).mT
