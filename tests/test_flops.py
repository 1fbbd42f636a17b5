"""Work, exactly: backward does the stored loop's backward and one more forward, no more and no
less.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cases import BY_NAME, CASES, Attention, Case, Mlp, build, randn, with_dropout
from oracle import OperationLog, stored_copy, weighted
from revnet import ReversibleSequence


def flops(module: nn.Module, x: Tensor, given: dict) -> tuple[int, int]:
    """Returns the FLOPs of one forward and of its backward."""
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as forward:
        loss = weighted(module(x, **given))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


# Where a branch saves nothing, or its gradient is not wanted, less than a whole forward has to be
# repeated.
COUNTED = [
    case
    for case in CASES
    if case.name.startswith(
        ("linear", "mlp", "attention", "modulated", "convolution", "gate", "in-place", "shared")
    )
]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_backward_repeats_exactly_the_forward(case: Case):
    pairs = case.pairs()
    oracle = stored_copy(pairs, case.route, **case.options)
    net = ReversibleSequence(pairs, case.route, **case.options)
    stored_forward, stored_backward = flops(oracle, case.input(), case.keywords())
    forward, backward = flops(net, case.input(), case.keywords())
    assert forward == stored_forward > 0
    assert backward - stored_backward == forward


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_store_does_exactly_the_work_of_the_stored_loop(case: Case):
    pairs = case.pairs()
    oracle = stored_copy(pairs, case.route, **case.options)
    net = ReversibleSequence(pairs, case.route, execution="store", **case.options)
    assert flops(net, case.input(), case.keywords()) == flops(oracle, case.input(), case.keywords())


def test_each_further_backward_repeats_at_most_one_forward():
    case = BY_NAME["mlp-L8"]
    pairs = case.pairs()
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    forward, stored = flops(oracle, case.input(), {})
    loss = weighted(net(case.input()))
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            loss.backward(retain_graph=True)
        assert stored < counter.get_total_flops() <= stored + forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients_it_is_operation_by_operation_the_plain_loop(
    training: bool, mode: object
):
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 3, 8)
    net, oracle = ReversibleSequence(pairs).train(training), stored_copy(pairs).train(training)
    x1, x2 = randn(2, 6, 8, seed=3), randn(2, 6, 8, seed=4)
    logs = []
    for module in (net, oracle):
        with mode(), OperationLog() as log:
            module.run(x1, x2)
        # Asking for the dtype that a tensor has computes nothing, but inference mode lists it.
        logs.append([name for name in log.names if name != "aten.to.dtype"])
    assert logs[0] == logs[1]


def test_the_forward_does_operation_by_operation_the_plain_loop():
    """Recording may detach and view, which is free, but computes nothing."""
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x1, x2 = randn(2, 6, 8, seed=3), randn(2, 6, 8, seed=4)
    logs = []
    # The comparison is that of the generator's states, which says whether a branch drew.
    free = ("aten.detach", "aten.view", "aten.alias", "aten.empty", "aten.equal")
    for module in (net, oracle):
        with OperationLog() as log:
            module.run(x1, x2)
        logs.append([name for name in log.names if not name.startswith(free)])
    assert logs[0] == logs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_backward_repeats_exactly_the_forward_on_cuda(dtype: torch.dtype, dropout: float):
    def attention(width: int) -> nn.Module:
        return Attention(width, dropout, fused=True)

    pairs = build([(attention, with_dropout(Mlp, dropout))] * 4, 64, dtype=dtype)
    pairs = [(f.cuda(), g.cuda()) for f, g in pairs]
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x = randn(2, 64, 64, dtype=dtype).cuda().requires_grad_()
    stored_forward, stored_backward = flops(oracle, x, {})
    forward, backward = flops(net, x, {})
    assert forward == stored_forward > 0
    assert backward - stored_backward == forward
