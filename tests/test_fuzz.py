"""Random programs: float streams against a plain loop, fixed streams against stored steps and
against a loop over integers.

`make fuzz` runs them for as long as one likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from oracle import assert_near
from programs import ADDING, Integers, ProgramSpec, build, plain, programs, run

# So many in each test, unless the profile asks for more.
EXAMPLES = 100


def fuzz(check: Callable[[ProgramSpec], None], strategy: Any) -> int:
    """Run a check on random programs; return on how many."""
    ran = 0

    @settings(max_examples=max(EXAMPLES, settings.default.max_examples))
    @given(strategy)
    def each(spec: ProgramSpec) -> None:
        nonlocal ran
        ran += 1
        check(spec)

    each()
    return ran


def float_like_the_loop(spec: ProgramSpec) -> None:
    found = run(spec, *build(spec, torch.float64, streams="float"), torch.float64)
    expected = run(spec, *plain(spec, torch.float64), torch.float64)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Affine rules multiply; gradients of many calls add up.
        assert_near(found[name], value, name, 1e-9)


def fixed_like_stored(spec: ProgramSpec) -> None:
    for dtype in (torch.float32, torch.float64):
        found = run(spec, *build(spec, dtype, streams="fixed"), dtype)
        expected = run(spec, *build(spec, dtype, "store", streams="fixed"), dtype)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = found[name] is None if value is None else torch.equal(found[name], value)
            assert same, f"{name}, {dtype}: {found[name]} where stored steps have {value}"


def test_float_programs(record_property: Callable[[str, Any], None]) -> None:
    ran = fuzz(float_like_the_loop, programs())
    record_property("programs", ran)
    assert ran >= EXAMPLES


def test_fixed_programs(record_property: Callable[[str, Any], None]) -> None:
    ran = fuzz(fixed_like_stored, programs(executions=("invert", "checkpoint", "select")))
    record_property("programs", ran)
    assert ran >= EXAMPLES


def fixed_like_integers(spec: ProgramSpec) -> None:
    for dtype, rounding in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        found = run(spec, *build(spec, dtype, streams="fixed"), dtype)
        expected = run(spec, *plain(spec, dtype, Integers), dtype)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("out"):
                assert torch.equal(found[name], value), f"{name}, {dtype}"
            # The graphs add up gradients in their own orders.
            assert_near(found[name], value, name, rounding)


def test_fixed_programs_on_integers(record_property: Callable[[str, Any], None]) -> None:
    ran = fuzz(fixed_like_integers, programs(couplings=ADDING))
    record_property("programs", ran)
    assert ran >= EXAMPLES


@pytest.mark.parametrize("backward", ["plain", "retained"])
def test_the_loop_is_not_the_library(backward: str) -> None:
    """The oracle is a loop of its own: no module of it belongs to revnet."""
    spec = ProgramSpec(2, "tensor", (0,), (), (), backward, 0)
    net, _ = plain(spec, torch.float64)
    assert not any(type(module).__module__.startswith("revnet") for module in net.modules())
