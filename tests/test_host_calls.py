"""How many Python calls of the library a step costs the host, where kernels are small."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import nn

import revnet

WIDTH = 8
ROOT = os.path.dirname(revnet.__file__)


def calls_of_a_pass(blocks: int, streams: Any) -> int:
    """Return how many functions of the library one forward pass calls, once it has settled."""
    pairs = [(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(blocks)]
    net = revnet.ReversibleSequence(pairs, streams=streams)
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    # The range monitor samples the first, second and fourth call.
    for _ in range(4):
        net(x)
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        # Comprehensions are functions until Python 3.11.
        inlined = frame.f_code.co_name in ("<listcomp>", "<dictcomp>", "<setcomp>")
        count += event == "call" and not inlined and frame.f_code.co_filename.startswith(ROOT)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        net(x)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(("streams", "most"), [("float", 24), ("fixed", 32)])
def test_calls_of_a_forward_step(streams: str, most: int) -> None:
    steps = 2 * (6 - 2)
    assert (calls_of_a_pass(6, streams) - calls_of_a_pass(2, streams)) / steps <= most
