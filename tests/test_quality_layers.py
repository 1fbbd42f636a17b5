"""The program's network in another form has the same weights, and all of them take part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality_layers

from revnet.app import model

SHAPE = model.Shape(
    depth=4, width=16, heads=2, prefix_vocab=8, prefix_length=2, vocab=9, rows=3, columns=2
)


def network(form: str) -> model.Transformer:
    torch.manual_seed(0)
    with quality_layers.in_the_form_of(lambda *args, **kw: quality_layers.body(form, *args, **kw)):
        return model.Transformer(SHAPE)


@pytest.mark.parametrize("form", quality_layers.FORMS)
def test_a_form_has_the_weights_of_the_program(form: str) -> None:
    torch.manual_seed(0)
    program, net = model.Transformer(SHAPE), network(form)
    sums = [
        sorted(p.detach().double().sum().item() for p in each.parameters())
        for each in (program, net)
    ]
    assert sums[0] == sums[1]
    x, keywords = net.embed(torch.randint(1, 8, (3, 2)), torch.randint(9, (3, 5)))
    y = net.layers(x, **keywords)
    y.sin().sum().backward()
    assert all(p.grad is not None for p in net.layers.parameters())
    assert torch.equal(y, program.layers(x, **keywords)) == (form == "branch")


def test_the_ordinary_form_is_the_plain_network() -> None:
    net = network("ordinary")
    x, keywords = net.embed(torch.randint(1, 8, (3, 2)), torch.randint(9, (3, 5)))
    y = x
    for layer in net.layers.layers:
        y = y + layer.attention(y, **keywords)
        y = y + layer.mlp(y)
    torch.testing.assert_close(net.layers(x, **keywords), y)
