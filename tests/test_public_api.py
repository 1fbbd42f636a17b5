"""The names and signatures that users write against."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

import revnet
from cases import Linear, Mlp, build, randn
from oracle import assert_near, stored_copy

SIGNATURES: dict[str, dict[str, object]] = {
    "ReversibleSequence": {
        "blocks": ...,
        "args_route": {},
        "layer_dropout": 0.0,
        "split": "copy",
        "merge": "mean",
        "dim": -1,
        "execution": "invert",
        "preserve_rng_state": True,
        "determinism_check": "default",
        "context_fn": None,
    },
    "SequentialSequence": {"layers": ..., "args_route": {}, "layer_dropout": 0.0},
    "ReversibleBlock": {"f": ..., "g": ...},
    "Deterministic": {"net": ...},
    "route_args": {"router": ..., "args": ..., "depth": ...},
}
METHODS: dict[tuple[str, str], dict[str, object]] = {
    ("ReversibleSequence", "forward"): {"x": ..., "taps": None},
    ("ReversibleSequence", "run"): {"x1": ..., "x2": ...},
    ("ReversibleSequence", "inverse"): {"y1": ..., "y2": ...},
    ("SequentialSequence", "forward"): {"x": ..., "taps": None},
    ("ReversibleBlock", "forward"): {"x1": ..., "x2": ..., "f_args": {}, "g_args": {}},
    ("ReversibleBlock", "inverse"): {"y1": ..., "y2": ..., "f_args": {}, "g_args": {}},
}


def parameters(function: Callable) -> dict[str, object]:
    """Returns name and default of each named parameter, in order."""
    return {
        name: ... if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and name != "self"
    }


@pytest.mark.parametrize("name", SIGNATURES)
def test_constructors_take_what_they_promise(name: str):
    actual = parameters(getattr(revnet, name))
    # Later issues may add parameters behind a default, never change these or their order.
    assert [key for key in actual if key in SIGNATURES[name]] == list(SIGNATURES[name])
    assert {key: actual[key] for key in SIGNATURES[name]} == SIGNATURES[name]
    assert all(actual[key] is not ... for key in actual if key not in SIGNATURES[name])


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_methods_take_what_they_promise(name: str, method: str):
    assert parameters(getattr(getattr(revnet, name), method)) == METHODS[name, method]


def test_sequences_take_keywords():
    for method in (
        revnet.ReversibleSequence.forward,
        revnet.ReversibleSequence.run,
        revnet.ReversibleSequence.inverse,
        revnet.SequentialSequence.forward,
    ):
        assert any(
            p.kind is inspect.Parameter.VAR_KEYWORD
            for p in inspect.signature(method).parameters.values()
        )


def test_the_options_of_a_reversible_sequence_are_given_by_name():
    with pytest.raises(TypeError):
        revnet.ReversibleSequence([(nn.Linear(2, 2), nn.Linear(2, 2))], {}, 0.5)


def test_measure_memory_takes_a_function_and_its_arguments_and_reports_three_figures():
    def fn(a: torch.Tensor, *, b: torch.Tensor) -> torch.Tensor:
        return a + b

    report = revnet.measure_memory(fn, torch.ones(3), b=torch.ones(3))
    assert [report.saved_bytes, report.peak_bytes, report.grad_bytes] == [0, 12, 0]


def test_reversible_error_is_a_runtime_error():
    assert issubclass(revnet.ReversibleError, RuntimeError)


@pytest.mark.parametrize("sequence", [revnet.ReversibleSequence, revnet.SequentialSequence])
def test_blocks_may_be_any_iterable_of_pairs(sequence: type):
    pairs = build([(Linear, Mlp)] * 3, 8)
    x = randn(2, 6, 8)
    expected = sequence(pairs)(x)
    for blocks in (
        tuple(pairs),
        iter(pairs),
        (pair for pair in pairs),
        [list(pair) for pair in pairs],
        nn.ModuleList([nn.ModuleList(pair) for pair in pairs]),
    ):
        assert torch.equal(sequence(blocks)(x), expected)


def test_defaults_are_the_classic_definition():
    pairs = build([(Linear, Mlp)] * 3, 8)
    x = randn(2, 6, 8)
    x1 = x2 = x
    for f, g in pairs:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    assert_near(revnet.ReversibleSequence(pairs)(x), torch.stack((x1, x2)).mean(0))


@pytest.mark.parametrize("merge", ["mean", "sum", "concat"])
@pytest.mark.parametrize("split", ["copy", "chunk"])
def test_split_and_merge(split: str, merge: str):
    pairs = build([(Linear, Mlp)] * 3, 4 if split == "chunk" else 8)
    x = randn(2, 6, 8)
    net = revnet.ReversibleSequence(pairs, split=split, merge=merge)
    y1, y2 = net.run(*((x, x) if split == "copy" else (x[..., :4], x[..., 4:])))
    expected = {"mean": (y1 + y2) / 2, "sum": y1 + y2, "concat": torch.cat((y1, y2), -1)}[merge]
    assert_near(net(x), expected)
    assert_near(net(x), stored_copy(pairs, split=split, merge=merge)(x))


def test_a_sequence_shows_its_settings():
    net = revnet.ReversibleSequence(build([(Linear, Linear)], 4), split="chunk", merge="sum")
    assert all(text in repr(net) for text in ("chunk", "sum", "invert", "ReversibleBlock"))
