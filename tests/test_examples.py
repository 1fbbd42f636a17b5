"""Every example runs at its toy size, learns, keeps less for backward than stored execution, and
has its gradients.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
# Per example: the largest share of stored memory that inverted execution keeps, and the largest
# error of a gradient: zero with fixed streams.
EXPECTED = {
    "equilibrium": (0.2, 0.0),
    "finetune": (0.1, 0.0),
    "glow": (0.1, 0.0),
    "irevnet_stage": (0.3, 0.0),
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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path):
    assert len(path.read_text().splitlines()) < 150
