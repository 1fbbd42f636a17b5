"""torch.compile around torch.func.vmap of a sequence, which no graph can hold: it runs outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import grad, vmap

import cases
import oracle
import revnet

pytestmark = [
    # torch's own, from tracing any Function and any tensor with a history.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]


@pytest.fixture(params=["float", revnet.Fixed(37)], ids=["float", "fixed"])
def net(request: pytest.FixtureRequest) -> revnet.ReversibleSequence:
    pairs = [(cases.Mlp(8).double(), cases.Mlp(8).double()) for _ in range(2)]
    return revnet.ReversibleSequence(pairs, streams=request.param)


def transformed(net: revnet.ReversibleSequence, kind: str) -> Any:
    return vmap(net) if kind == "vmap" else vmap(grad(lambda x: net(x).sin().sum()))


@pytest.mark.parametrize("kind", ["vmap", "gradients per sample"])
def test_a_compiled_vmap_gives_what_an_eager_one_gives(
    net: revnet.ReversibleSequence, kind: str
) -> None:
    fn, x = transformed(net, kind), torch.randn(3, 2, 8, dtype=torch.float64)
    found, expected = torch.compile(fn, backend="aot_eager")(x), fn(x)
    oracle.assert_near(found, expected)
    if kind == "vmap":
        parameters = list(net.parameters())
        for one, other in zip(
            torch.autograd.grad(found.sin().sum(), parameters),
            torch.autograd.grad(expected.sin().sum(), parameters),
            strict=True,
        ):
            oracle.assert_near(one, other)


def test_one_graph_of_a_vmap_is_refused_with_its_reason(net: revnet.ReversibleSequence) -> None:
    fn = transformed(net, "gradients per sample")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"runs under torch\.func\.vmap"):
        torch.compile(fn, backend="aot_eager", fullgraph=True)(
            torch.randn(3, 2, 8, dtype=torch.float64)
        )
