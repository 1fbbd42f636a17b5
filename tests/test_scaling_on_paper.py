"""The tables of docs/scaling.md are what its script prints, and its formulas give the measured
figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_on_paper as paper  # noqa: E402


def test_document_shows_the_table() -> None:
    assert paper.table() in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("tokens", "reversible", "checkpointed", "tolerance"),
    # One H100, bfloat16, width 2048, 24 layers, plain MLP, float streams.
    [(8192, 704 / 1024, 1473 / 1024, 0.15), (262144, 18.9, 42.9, 0.06)],
    ids=["8192", "262144"],
)
def test_formulas_give_measured_bytes(
    tokens: int, reversible: float, checkpointed: float, tolerance: float
) -> None:
    shape = paper.Shape("measured", 2048, 24, 8192, 0, gated=False)
    here = paper.Layout(1, 1)
    assert paper.reversible(shape, tokens, here, fixed=False) / paper.GIB == pytest.approx(
        reversible, rel=tolerance
    )
    assert paper.checkpointed(shape, tokens, here) / paper.GIB == pytest.approx(
        checkpointed, rel=tolerance
    )


@pytest.mark.parametrize(
    ("fixed", "reversible", "checkpointed"),
    [(True, 1152, 1825), (False, 1024, 1825)],
    ids=["fixed", "float"],
)
def test_formulas_give_measured_bytes_of_fsdp2(
    fixed: bool, reversible: int, checkpointed: int
) -> None:
    """Two H200, by block, 2 × 4096 tokens on each: MiB above weights, gradients and optimizer."""
    shape = paper.Shape("measured", 2048, 24, 8192, 24 * 12 * 2048**2, gated=False)
    here, mib = paper.Layout(1, 2), 2**20
    held = paper.reversible(shape, 8192, here, fixed) + paper.buffers(shape)
    assert held / mib == pytest.approx(reversible, rel=0.05)
    assert (paper.checkpointed(shape, 8192, here) + paper.buffers(shape)) / mib == pytest.approx(
        checkpointed, rel=0.05
    )
