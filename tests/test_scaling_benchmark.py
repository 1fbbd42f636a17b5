"""The scaling benchmark finds where memory ends, and a rank that fails does not leave the others
waiting.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scaling


def fails_on_one(error: BaseException) -> Iterator[str]:
    """One row, and then a collective that one rank never enters."""
    yield "a row"
    if dist.get_rank() == 1:
        raise error
    dist.all_reduce(torch.ones(1))
    yield "never"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("NCCL error: Failed to CUDA calloc: out of memory"), "out of memory"),
        (ValueError("size 32 against 16"), "failed: ValueError: size 32 against 16"),
    ],
    ids=["memory", "other"],
)
def test_a_failing_rank_ends_the_others(error: BaseException, said: str) -> None:
    start = time.monotonic()
    rows, failure = scaling.on_ranks(2, 200, fails_on_one, "cpu", error)
    assert (rows, failure) == (["a row"], said)
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_search_brackets_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks, 5 MiB each: the largest size that fits, and one close above it that does not."""
    options = argparse.Namespace(
        gpus=[2],
        methods=[scaling.FLOAT, scaling.CHECKPOINT],
        width=32,
        blocks=8,
        tokens=None,
        batch=1,
        device="cpu",
        memory=0.005,
        seconds=60.0,
        out=None,
    )
    scaling.report_length(options, scaling.Report(options))
    ends = re.findall(
        r"\*\*([a-z ]+)\*\* \| \*\*([\d,]+) fit, not ([\d,]+)\*\*", capsys.readouterr().out
    )
    found = {
        method: (int(fits.replace(",", "")), int(fails.replace(",", "")))
        for method, fits, fails in ends
    }
    assert found.keys() == {scaling.FLOAT, scaling.CHECKPOINT}
    for fits, fails in found.values():
        assert fits < fails < 1.15 * fits
    assert found[scaling.FLOAT][0] > 1.3 * found[scaling.CHECKPOINT][0]
