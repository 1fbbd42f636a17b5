"""Mistakes in a branch are found before training, or said once while it runs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cases
from revnet import Reversible, ReversibleBlock, ReversibleError, ReversibleSequence, Step
from revnet.testing import check_branch

WIDTH, TOKENS = 8, 6


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, TOKENS, WIDTH, dtype=dtype)


class Branch(nn.Module):
    """A branch made of a function of its layers and its input."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.group, self.gain = nn.GroupNorm(1, TOKENS), nn.Parameter(torch.full((WIDTH,), 0.1))
        self.run = run

    def mlp(self, x: Tensor) -> Tensor:
        return self.leave(F.gelu(self.enter(x)))

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.run(self, x, **kwargs)


RIGHT: dict[str, Callable[..., Any]] = {
    "prenorm": lambda m, x: m.mlp(m.norm(x)),
    "no-norm": lambda m, x: m.mlp(x),
    "norm-last": lambda m, x: m.norm(m.mlp(x)),
    "norm-alone": lambda m, x: m.norm(x),
    "scale-and-bias": lambda m, x: x * m.gain + m.gain,
    "position": lambda m, x: m.mlp(x + torch.ones(WIDTH, dtype=x.dtype)),
    "bias-after-norm": lambda m, x: m.rms(x) + m.gain,
    "gate": lambda m, x: x * m.mlp(x).sigmoid(),
    "layer-scale": lambda m, x: m.gain * m.mlp(m.norm(x)),
    "sum-of-two": lambda m, x: m.mlp(x) + m.norm(m.mlp(m.rms(x))),
    "residual-before-weights": lambda m, x: m.leave(torch.cat((x + m.mlp(x), x), -1)),
    "identity": lambda m, x: x,
    "elementwise": lambda m, x: x.sin() + x.tanh(),
    "activations": lambda m, x: F.relu(x.tanh() + m.mlp(x).relu()),
    "dropout": lambda m, x: F.dropout(m.mlp(x), 0.5),
    "aux": lambda m, x: (m.mlp(x), x.sum()),
    "constant": lambda m, x: torch.full_like(x, 0.25),
    "shifted": lambda m, x: m.mlp(x.roll(1, -2)),
}
RESIDUAL: dict[str, Callable[..., Any]] = {
    "prenorm": lambda m, x: x + m.mlp(m.norm(x)),
    "the-other-way": lambda m, x: m.mlp(m.norm(x)) + x,
    "postnorm": lambda m, x: m.norm(x + m.mlp(x)),
    "post-rms": lambda m, x: m.rms(x + m.mlp(x)),
    "post-group": lambda m, x: m.group(x + m.mlp(x)),
    "of-the-normed": lambda m, x: (lambda y: y + m.mlp(y))(m.norm(x)),
    "dropout": lambda m, x: x + F.dropout(m.mlp(x), 0.1),
    "layer-scale": lambda m, x: x + m.gain * m.mlp(x),
    "zero-gain": lambda m, x: x + 0 * m.mlp(x),
    "scaled": lambda m, x: (x + m.mlp(x)) / 2**0.5,
    "post-activation": lambda m, x: F.relu(x + m.mlp(x), inplace=True),
    "post-gelu": lambda m, x: F.gelu(m.norm(x + m.mlp(x))),
    "subtracted": lambda m, x: x - m.mlp(x),
    "reshaped": lambda m, x: (x.flatten(1) + m.mlp(x).flatten(1)).view_as(x),
    "transposed": lambda m, x: (x.mT + m.mlp(x).mT).mT,
    "cast": lambda m, x: (x.double() + m.mlp(x).double()).to(x.dtype),
    "two-layers": lambda m, x: (lambda y: y + m.mlp(y))(x + m.mlp(x)),
    "aux": lambda m, x: (x + m.mlp(x), x.sum()),
    "in-the-update": lambda m, x: m.mlp(x).add_(x),
}


@pytest.mark.parametrize("run", RIGHT.values(), ids=RIGHT)
def test_a_right_branch_passes(run: Callable[..., Any]):
    branch, streams = Branch(run), [x(), x(torch.float64), x(torch.bfloat16), 1e5 * x()]
    state = torch.get_rng_state()
    for stream in streams:
        assert check_branch(branch.to(stream.dtype), stream) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in branch.parameters())


@pytest.mark.parametrize("run", RESIDUAL.values(), ids=RESIDUAL)
def test_a_residual_of_its_own_is_found(run: Callable[..., Any]):
    with pytest.raises(ReversibleError, match=r"Branch adds its input .* f\(x\) in place of x \+"):
        check_branch(Branch(run), x())


@pytest.mark.parametrize("maker", [cases.Mlp, cases.Attention, cases.Gate, cases.InPlaceInside])
def test_the_branches_of_other_tests_pass(maker: Any):
    check_branch(maker(WIDTH), x())


def test_layers_of_torch_have_a_residual():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    with pytest.raises(ReversibleError, match="TransformerEncoderLayer adds its input"):
        check_branch(layer, x())
    attention = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)
    with pytest.raises(ReversibleError, match="adds its input"):
        check_branch(attention, x())


def test_a_residual_is_seen_inside_a_compiled_branch():
    branch = Branch(RESIDUAL["prenorm"])
    branch.compile(backend="eager")
    with pytest.raises(ReversibleError, match="adds its input"):
        check_branch(branch, x())
    branch = Branch(RIGHT["prenorm"])
    branch.compile(backend="eager")
    check_branch(branch, x())


class Calls(nn.Module):
    """Another result in each call; a replay finds such a number as it was, though."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin() * self.calls


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m, x: m.mlp(x) * random.random(), "gives another result when it is called again"),
        (lambda m, x: m.mlp(x.mul_(2)), "Branch changed its input in place"),
        (lambda m, x: m.mlp(x.abs().relu_() + x.mul_(1)), "Branch changed its input in place"),
        (lambda m, x: m.enter(x), r"returns \(2, 6, 16\) on cpu for \(2, 6, 8\) on cpu"),
        (lambda m, x: m.mlp(x)[:, :1], r"returns \(2, 1, 8\)"),
        (lambda m, x: m.mlp(x).double(), r"returns torch.float64 for torch.float32"),
        (lambda m, x: [m.mlp(x)], "returns list: a branch returns a tensor, or a pair"),
        (lambda m, x: (m.mlp(x), 1, 2), "returns tuple"),
        (lambda m, x: None, "returns NoneType"),
    ],
)
def test_other_mistakes_are_named(run: Callable[..., Any], match: str):
    with pytest.raises(ReversibleError, match=match):
        check_branch(Branch(run), x())


def test_state_that_replays_restore_is_no_mistake():
    branch = Calls()
    check_branch(branch, x())
    assert branch.calls == 0


def test_keywords_are_passed_and_checked():
    branch = Branch(lambda m, x, scale, name: m.mlp(x) * scale)
    scale = torch.rand(WIDTH, requires_grad=True)
    check_branch(branch, x(), scale=scale, name="some")
    branch = Branch(lambda m, x, scale: m.mlp(x) * scale.mul_(2))
    with pytest.raises(ReversibleError, match="Branch changed a keyword in place"):
        check_branch(branch, x(), scale=torch.rand(WIDTH))


def test_autocast_may_return_its_own_dtype():
    with torch.autocast("cpu"):
        check_branch(Branch(RIGHT["prenorm"]), x())
    check_branch(Branch(RIGHT["prenorm"]).to("meta"), x().to("meta"))


def test_a_nested_sequence_is_a_residual():
    inner = ReversibleSequence([(cases.Mlp(WIDTH), cases.Mlp(WIDTH))])
    with pytest.raises(ReversibleError, match="ReversibleSequence adds its input"):
        check_branch(inner, x())


# --- extra outputs that nobody asked for


class Attention(nn.Module):
    """Returns whatever nn.MultiheadAttention does."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Any:
        return self.mix(x, x, x, **self.options)


class Named(Attention):
    def forward(self, x: Tensor) -> Any:
        out, weights = super().forward(x)
        return out, {"weights": weights}


def sequence(make: Callable[[], nn.Module]) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([(make(), cases.Mlp(WIDTH)) for _ in range(2)])


@pytest.mark.parametrize(
    "options", [{}, {"average_attn_weights": False}, {"dropout": 0.3}], ids=str
)
def test_attention_weights_are_pointed_out_once(options: dict[str, Any]):
    net = sequence(lambda: Attention(**options))
    with pytest.warns(UserWarning, match=r"block 0, branch f returned attention weights") as said:
        y, aux = net(x())
    assert said[0].filename == __file__
    assert len(said) == 1
    assert len(aux) == 2
    net(x())
    with pytest.warns(UserWarning, match="step 0 returned attention weights"):
        Reversible([Step(Attention())])(x(), x())
    del y


class Returns(nn.Module):
    def __init__(self, aux: Any) -> None:
        super().__init__()
        self.aux = aux

    def forward(self, x: Tensor) -> Any:
        return x.sin(), self.aux


DOCUMENTED: dict[str, Any] = {
    "loss": torch.tensor(1.0),
    "probabilities": torch.full((2, TOKENS, 4), 0.25),
    "counts": torch.ones(TOKENS, TOKENS, dtype=torch.long),
    "hidden": torch.ones(2, TOKENS, WIDTH),
    "scores": torch.linspace(-1, 1, TOKENS**2).view(TOKENS, TOKENS),
    "dict": {"weights": torch.full((2, TOKENS, TOKENS), 1 / TOKENS)},
    "text": "nothing",
}


@pytest.mark.parametrize("aux", DOCUMENTED.values(), ids=DOCUMENTED)
def test_no_other_extra_output_is_pointed_out(aux: Any):
    _, found = sequence(lambda: Returns(aux))(x())
    assert len(found) == 2


def test_attention_weights_in_a_dict_and_none_at_all_are_silent():
    _, aux = sequence(Named)(x())
    assert aux["block 1, branch f"]["weights"].shape == (2, TOKENS, TOKENS)
    assert sequence(lambda: Attention(need_weights=False))(x()).shape == x().shape


def test_a_block_alone_says_that_it_drops_extra_outputs():
    block = ReversibleBlock(Returns({"a": 1}), cases.Mlp(WIDTH))
    with pytest.warns(UserWarning, match=r"branch f returned \(update, aux\).*aux is dropped"):
        block(x(), x())
    block(x(), x())
    net = ReversibleSequence([block])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x())
        net[0].register_forward_hook(lambda *_: None)
        assert len(net(x())[1]) == 1
