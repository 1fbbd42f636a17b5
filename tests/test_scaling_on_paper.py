"""The tables of docs/scaling.md are what its script prints, and its formulas give the measured
figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_on_paper as paper  # noqa: E402


def test_document_shows_the_table() -> None:
    assert paper.table() in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("held", "measured"),
    # One H100, bfloat16, 2 × 4096 tokens (time_vs_depth_h100_2026-11-22, eager-2048), in MiB. A
    # two-stream network under checkpointing keeps two tensors per block, as one of twice as many
    # layers keeps one.
    [
        (lambda shape, here: paper.reversible(shape, 8192, here, fixed=False), 608.1),
        (lambda shape, here: paper.reversible(shape, 8192, here), 736.1),
        (lambda shape, here: paper.checkpointed(replace(shape, layers=48), 8192, here), 2177),
    ],
    ids=["float", "fixed", "checkpointed"],
)
def test_formulas_give_measured_bytes(
    held: Callable[[paper.Shape, paper.Layout], float], measured: float
) -> None:
    shape = paper.Shape("measured", 2048, 24, 8192, 0, gated=False)
    assert held(shape, paper.Layout(1, 1)) / 2**20 == pytest.approx(measured, rel=0.02)


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


def test_the_widest_moment_by_kind() -> None:
    x = torch.randn(256, 256, dtype=torch.bfloat16)
    unit = x.nbytes

    def step() -> None:
        gathered = torch.empty(256 * 256, dtype=torch.bfloat16)
        product = x @ x
        gradient = x.t() @ product
        reduced = gradient.float()
        gathered.untyped_storage().resize_(0)  # as FSDP2 frees it
        del reduced, product
        torch.empty(8, 256, 256, dtype=torch.bfloat16)
        del gradient

    # At the end eight streams and the gradient; the moment before was five units wide.
    assert paper.widest(step) == [8 * unit, unit, 0, 0]
