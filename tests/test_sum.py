"""Sums of branches: each is a step of its own, and together they are the sum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import revnet
from cases import Attention, Mlp, Modulated, noted, randn
from oracle import stored_copy, weighted
from revnet import Reversible, ReversibleSequence, SequentialSequence, Step, Sum
from revnet._execution import EXECUTIONS
from test_tiles import assert_close, assert_equal, results

WIDTH, TOKENS = 8, 10


def pairs(depth: int = 2, dropout: float = 0.0) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(7)
    return [(Sum([Attention(WIDTH, dropout) for _ in range(3)]), Mlp(WIDTH)) for _ in range(depth)]


@pytest.mark.parametrize("execution", ["invert", "store", "checkpoint", "select"])
@pytest.mark.parametrize("tile", [{}, {"g": 4}])
@pytest.mark.parametrize("coupling", [None, revnet.Midpoint(0.5)])
def test_a_sum_equals_the_branch_that_adds(coupling: Any, tile: Any, execution: str):
    net = ReversibleSequence(pairs(), tile=tile, execution=execution, coupling=coupling).double()
    whole = ReversibleSequence(
        copy.deepcopy(list(net.blocks)), execution="store", coupling=coupling
    )
    for block in whole.blocks:
        block.f.register_forward_hook(lambda *_: None)
    assert not whole.blocks[0].f.divides
    x = randn(2, TOKENS, WIDTH)
    found = results(net, x)
    assert_close(found, results(whole, x))
    if coupling is None:
        assert_close(found, results(stored_copy(pairs()).double(), x))


def test_fixed_streams_have_the_bits_of_stored_parts():
    net = ReversibleSequence(pairs(dropout=0.3), tile={"g": 4}).bfloat16()
    x = randn(2, TOKENS, WIDTH).bfloat16()
    found = []
    for execution in EXECUTIONS:
        net.execution = execution
        found.append(results(net, x))
    for other in found[1:]:
        assert_equal(other, found[0])
    y = net.eval().run(x, x)
    assert_close(list(net.inverse(*y)), [x, x], 0.05)


def test_each_branch_is_a_step_with_its_own_activations():
    def flops(net: nn.Module) -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            loss = weighted(net(randn(2, TOKENS, WIDTH)))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        return forward.get_total_flops(), backward.get_total_flops()

    net = ReversibleSequence(pairs()).double()
    forward, backward = flops(net)
    net.execution = "store"
    _, stored = flops(net)
    assert backward - stored == forward > 0
    x = torch.randn(1, 512, WIDTH)
    wide = [(Sum([Mlp(WIDTH) for _ in range(8)]), nn.Linear(WIDTH, WIDTH))]
    divided = ReversibleSequence(wide)
    peak = revnet.measure_memory(lambda: divided(x)).peak_bytes
    wide[0][0].register_forward_hook(lambda *_: None)
    assert peak < 0.5 * revnet.measure_memory(lambda: divided(x)).peak_bytes


class Counts(Modulated):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        noted(self).append(revnet.replaying())
        out = super().forward(x, scale)
        return out, {"loss": out.square().sum()}


@pytest.mark.parametrize("divided", [True, False])
def test_keywords_reach_every_branch_and_extra_outputs_are_added_up(divided: bool):
    torch.manual_seed(0)
    parts = [Counts() for _ in range(3)]
    f = Sum(parts)
    if not divided:
        f.register_forward_hook(lambda *_: None)
    net = ReversibleSequence([(f, nn.Linear(WIDTH, WIDTH))], {"scale": (True, False)}).double()
    x = randn(1, TOKENS, WIDTH)
    scale = randn(TOKENS, 1, requires_grad=True)
    y, aux = net(x, scale=scale)
    assert list(aux) == ["block 0, branch f"]
    outs = [part(x, scale=scale)[0] for part in parts]
    torch.testing.assert_close(
        aux["block 0, branch f"]["loss"], sum(o.square().sum() for o in outs)
    )
    (weighted(y) + aux["block 0, branch f"]["loss"]).backward()
    expected = scale.grad
    scale.grad = None
    first = x + sum(outs)
    second = x + net.blocks[0].g(first)
    (weighted((first + second) / 2) + sum(o.square().sum() for o in outs)).backward()
    torch.testing.assert_close(scale.grad, expected)
    assert [noted(part)[:2] for part in parts] == [[False, False]] * 3


def test_the_signature_of_a_sum_is_that_of_its_branches():
    f = Sum([Modulated(WIDTH), Modulated(WIDTH)])
    net = ReversibleSequence([(f, nn.Linear(WIDTH, WIDTH))], "signature").double()
    x, scale = randn(1, TOKENS, WIDTH), randn(TOKENS, 1)
    first = x + f[0](x, scale=scale) + f[1](x, scale=scale)
    expected = (first + x + net.blocks[0].g(first)) / 2
    torch.testing.assert_close(net(x, scale=scale), expected)
    with pytest.raises(TypeError, match="no branch takes the keyword 'mask'"):
        net(x, mask=scale)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_where_a_sum_is_one_branch():
    x = randn(1, TOKENS, WIDTH)
    f = Sum([Mlp(WIDTH), Mlp(WIDTH)])
    twin = SequentialSequence([(f, nn.Identity())], execution="checkpoint").double()
    expected = x + f[0](x) + f[1](x)
    torch.testing.assert_close(twin(x), 2 * expected)
    program = Reversible([Step(f, 0, 1)]).double()
    torch.testing.assert_close(program(x, x)[0], expected)
    torch._dynamo.reset()
    net = ReversibleSequence([(f, nn.Identity())]).double()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch._dynamo.reset()


def test_errors_name_the_part():
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("a part")

    net = ReversibleSequence([(Sum([nn.Linear(8, 8), Fails(8, 8)]), nn.Linear(8, 8))])
    with pytest.raises(OSError, match="a part") as caught:
        net(torch.ones(1, 2, 8))
    assert "In block 0, branch f, part 1 of 2, Fails" in str(caught.value.__notes__)
    with pytest.raises(ValueError, match="at least one branch"):
        Sum([])
