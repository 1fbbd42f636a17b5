"""Every example runs at its toy size, learns, keeps less for backward than stored execution, and
has its gradients.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import revnet

EXAMPLES = Path(__file__).parent.parent / "examples"
# Per example: the largest share of stored memory that inverted execution keeps, and the largest
# error of a gradient: zero with fixed streams.
EXPECTED = {
    "equilibrium": (0.2, 0.0),
    "finetune": (0.1, 0.0),
    "glow": (0.1, 0.0),
    "irevnet_stage": (0.3, 0.0),
    "long_context": (0.2, 0.0),
    "momentum_net": (0.5, 0.0),
    "rev_gnn": (0.4, 1e-4),
    "rev_vit": (0.2, 0.0),
    "revnet_cnn": (0.5, 1e-3),
    "unet3d": (0.5, 1e-4),
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*EXPECTED, "common"}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # Uninitialised memory filled with NaN is for the tests of the library; here it costs time
    # alone.
    torch.use_deterministic_algorithms(False)
    monkeypatch.delitem(sys.modules, "common", raising=False)
    example = importlib.import_module(name)
    plot = tmp_path / "flow.png"
    result = example.main(["--plot", str(plot)] if name == "glow" else [])
    assert plot.exists() == (name == "glow")
    share, error = EXPECTED[name]
    assert result["saved"] <= share
    assert result["error"] <= error
    if "first" in result:
        assert result["last"] < 0.9 * result["first"]
    assert result.get("inverse", 0) < 1e-5
    assert result.get("loop", 0) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(4, 4, 2), (8, 4, 4), (6, 2, 2)])
def test_groups_of_heads_are_the_attention(
    heads: int, kv_heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    example = importlib.import_module("long_context")
    size, width, tokens = 4, 24, 7
    torch.manual_seed(0)
    whole = example.HeadGroup(width, heads, kv_heads, size).double()
    parts = [
        example.HeadGroup(width, heads // groups, kv_heads // groups, size).double()
        for _ in range(groups)
    ]
    names = ("q", "k", "v")
    given = dict(zip(names, whole.qkv.weight.split(whole.sizes), strict=True))
    with torch.no_grad():
        for i, part in enumerate(parts):
            rows = [given[name].chunk(groups)[i] for name in names]
            part.qkv.weight.copy_(torch.cat(rows))
            part.leave.weight.copy_(whole.leave.weight.chunk(groups, 1)[i])
    turn = {"turn": example.turns(tokens, size, torch.empty(0, dtype=torch.float64))}
    net = revnet.Reversible([revnet.Step(part, 0, 1, constants=turn) for part in parts])
    one = revnet.Reversible([revnet.Step(whole, 0, 1, constants=turn)])
    x, z = torch.randn(2, 2, tokens, width, dtype=torch.float64).requires_grad_()
    found = []
    for program in (net, one):
        y, _ = program(x, z)
        inputs = torch.autograd.grad(y.sin().sum(), (x, z, *program.parameters()))
        found.append([y, *inputs])
    assert torch.allclose(found[0][0], found[1][0], rtol=0, atol=1e-12)
    assert torch.allclose(found[0][2], found[1][2], rtol=0, atol=1e-12)
    # Of the weights, the last of all: each group has its columns of the output's.
    leave = torch.cat([found[0][3 + 3 * i + 2] for i in range(groups)], 1)
    assert torch.allclose(leave, found[1][-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path):
    assert len(path.read_text().splitlines()) < 150
