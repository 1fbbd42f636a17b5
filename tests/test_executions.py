"""Every execution, and every mixture of them, gives the stored loop's gradients, for exactly the
work it promises.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from cases import CASES, Attention, Case, Mlp, build, named, randn, with_dropout
from oracle import (
    OperationLog,
    StoredSequence,
    assert_near,
    assert_same_gradients,
    assert_same_step,
    gradients_of,
    stored_copy,
    train_step,
    weighted,
)
from revnet import (
    Affine,
    Coupling,
    Reversible,
    ReversibleError,
    ReversibleSequence,
    SequentialSequence,
    Step,
    _execution,
    measure_memory,
    plan,
)

EXECUTIONS = ["store", "select", "checkpoint", "offload", "invert"]
SEVERAL = named(
    "mlp-L8-dropout", "attention-L8-dropout", "modulated-L4-keywords-dropout", "mixed-L6", "gate-L4"
)
# The branches whose matrix products are all that costs FLOPs, and whose every activation is asked
# for.
COUNTED = named(
    "linear-L8-2d", "mlp-L8-dropout", "attention-L8-dropout", "attention-L4-fused", "gate-L4"
)


def both(case: Case, **options: object) -> tuple[ReversibleSequence, StoredSequence]:
    """Returns the sequence and the stored loop over copies of the same branches."""
    pairs = case.pairs()
    oracle = stored_copy(pairs, case.route, **case.options)
    return ReversibleSequence(pairs, case.route, **case.options, **options), oracle


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_equals_the_stored_loop(case: Case, execution: str):
    net, oracle = both(case, execution=execution)
    expected = train_step(oracle, case.input(), **case.keywords())
    actual = train_step(net, case.input(), **case.keywords())
    assert torch.equal(actual.output, expected.output)
    assert_same_step(actual, expected)


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_any_mixture_per_step_equals_the_stored_loop(case: Case, data: st.DataObject):
    mixture = data.draw(
        st.lists(st.sampled_from(EXECUTIONS), min_size=2 * case.depth, max_size=2 * case.depth)
    )
    x = case.input(requires_grad=data.draw(st.booleans(), label="input needs a gradient"))
    net, oracle = both(case, execution=mixture)
    assert_same_step(
        train_step(net, x, **case.keywords()), train_step(oracle, x, **case.keywords())
    )


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_any_mixture_is_equal_in_every_bit_with_fixed_streams(
    dtype: torch.dtype, data: st.DataObject
):
    mixture = data.draw(st.lists(st.sampled_from(EXECUTIONS), min_size=8, max_size=8))
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 4, 8, dtype=dtype)
    stored = ReversibleSequence(copy.deepcopy(pairs), streams="fixed", execution="store")
    net = ReversibleSequence(pairs, streams="fixed", execution=mixture)
    x = randn(2, 6, 8, dtype=dtype, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(stored, x), tolerance=0.0)


class Damped(Coupling):
    """A constant factor, and an update that saves a tensor outside of the branch."""

    least_scale = Fraction(3, 4)

    def scale(self, out: object) -> Fraction:
        return self.least_scale

    def increment(self, out: Tensor) -> Tensor:
        return out.tanh()


@pytest.mark.parametrize("pattern", ["cccccc", "iicccc", "ciicic", "iccsci"])
@pytest.mark.parametrize("rule", [Damped(), Affine(limit=0.5)], ids=["Damped", "Affine"])
def test_checkpointed_steps_that_scale_are_equal_in_every_bit(rule: Coupling, pattern: str):
    """They keep what they read, alone, in runs, and beside steps that are undone."""
    width = 8 if isinstance(rule, Damped) else 16
    branches = [
        nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, width))
        for _ in pattern
    ]
    steps = [Step(fn, i % 2, (i + 1) % 2, rule) for i, fn in enumerate(branches)]
    net = Reversible(steps, streams="fixed", determinism_check="exact")
    found = []
    for names in (
        ["store"] * 6,
        [{"c": "checkpoint", "i": "invert"}.get(c, "store") for c in pattern],
    ):
        net.execution = names
        streams = [randn(3, 8, dtype=torch.float32, seed=i, requires_grad=True) for i in range(2)]
        torch.manual_seed(3)
        a, b = net(*streams)
        loss = (a.square() + b.cos()).sum()
        found.append(torch.autograd.grad(loss, [*streams, *net.parameters()], retain_graph=True))
        found.append(torch.autograd.grad(loss, [*streams, *net.parameters()]))
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))


@pytest.mark.parametrize("execution", [name for name in EXECUTIONS if name != "invert"])
def test_the_sequential_twin_equals_its_stored_self(execution: str):
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 4, 8)
    stored, net = (
        SequentialSequence(copy.deepcopy(pairs)),
        SequentialSequence(pairs, execution=execution),
    )
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(stored, x), tolerance=0.0)


@given(data=st.data())
@settings(max_examples=15)
def test_any_mixture_in_the_sequential_twin(data: st.DataObject):
    mixture = data.draw(st.lists(st.sampled_from(EXECUTIONS[:-1]), min_size=8, max_size=8))
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 4, 8)
    stored, net = (
        SequentialSequence(copy.deepcopy(pairs)),
        SequentialSequence(pairs, execution=mixture),
    )
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(stored, x), tolerance=0.0)


def test_the_sequential_twin_refuses_to_invert():
    with pytest.raises(ValueError, match="'invert' is not one of"):
        SequentialSequence(build([(Mlp, Mlp)], 8), execution="invert")


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("case", named("mlp-L8-dropout", "attention-L8-dropout"), ids=str)
def test_backward_twice_with_any_mixture(case: Case, data: st.DataObject):
    mixture = data.draw(
        st.lists(st.sampled_from(EXECUTIONS), min_size=2 * case.depth, max_size=2 * case.depth)
    )
    net, oracle = both(case, execution=mixture)
    found = []
    for module in (net, oracle):
        torch.manual_seed(0)
        loss = weighted(module(x := case.input()))
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found)


@given(data=st.data())
@settings(max_examples=15)
def test_double_backward_with_any_mixture(data: st.DataObject):
    case = named("mlp-L3-channels-last")[0]
    mixture = data.draw(st.lists(st.sampled_from(EXECUTIONS), min_size=6, max_size=6))
    net, oracle = both(case, execution=mixture)
    found = []
    for module in (net, oracle):
        x = case.input()
        (gradient,) = torch.autograd.grad(weighted(module(x)), x, create_graph=True)
        weighted(gradient).backward()
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found, tolerance=1e-11)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_of_one_parameter_alone(execution: str):
    case = named("attention-L8-dropout")[0]
    net, oracle = both(case, execution=execution)
    found = []
    for module in (net, oracle):
        torch.manual_seed(0)
        weight = module.blocks[2].f.qkv.weight
        found.append(torch.autograd.grad(weighted(module(case.input())), weight)[0])
    assert_near(*found)


class Explains(Mlp):
    """A branch that runs what it was given and wraps its errors, as libraries do that generate
    code.
    """

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception as error:
            raise ValueError("the generated code failed") from error


@pytest.mark.parametrize("execution", ["select", "checkpoint", "offload", "invert"])
def test_a_branch_that_catches_exceptions_is_replayed(execution: str):
    pairs = build([(Explains, Explains)] * 2, 8)
    net, x = ReversibleSequence(pairs, execution=execution), randn(2, 6, 8)
    assert_same_step(train_step(net, x), train_step(stored_copy(pairs), x))


class Gated(nn.Module):
    """Multiplies by a matrix product that is written to memory of the branch's own."""

    def __init__(self, width: int, empty: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.empty = empty

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scaled, gate = x * 0.5, x.new_empty(0) if self.empty else torch.empty_like(x)
            torch.mm(scaled, self.linear.weight, out=gate)
        return (self.linear(x * gate.tanh()) * scaled).tanh()


@pytest.mark.parametrize("empty", [False, True], ids=["as it is", "resized"])
def test_select_keeps_what_an_operation_writes_to_memory_it_is_given(empty: bool):
    pairs = [(Gated(4, empty).double(), Gated(4, empty).double()) for _ in range(2)]
    net = ReversibleSequence(pairs, execution="select")
    x = randn(3, 4, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(stored_copy(pairs), x))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_hooks_that_are_always_called_see_the_end_of_each_evaluation(execution: str):
    pairs, entered = build([(Mlp, Mlp)] * 2, 8), []
    for branch in (branch for pair in pairs for branch in pair):
        branch.register_forward_pre_hook(lambda module, args: entered.append(module))
        branch.register_forward_hook(
            lambda module, args, out: entered.remove(module), always_call=True
        )
    train_step(ReversibleSequence(pairs, execution=execution), randn(2, 6, 8))
    assert not entered


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_in_place_write_to_a_parameter_between_forward_and_backward_raises(execution: str):
    net, _ = both(named("mlp-L8")[0], execution=execution)
    loss = weighted(net(named("mlp-L8")[0].input()))
    with torch.no_grad():
        net.blocks[1].g.leave.weight.mul_(2)
    with pytest.raises((ReversibleError, RuntimeError), match=r"in.?place|modified"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("execution", [*EXECUTIONS, "mixed"])
def test_every_execution_is_equal_in_every_bit_on_cuda(execution: str, dtype: torch.dtype):
    pairs = build(
        [(partial(Attention, dropout=0.1, fused=True), with_dropout(Mlp, 0.1))] * 5, 64, dtype=dtype
    )
    pairs = [(f.cuda(), g.cuda()) for f, g in pairs]
    stored = ReversibleSequence(copy.deepcopy(pairs), streams="fixed", execution="store")
    mixture = EXECUTIONS * 2 if execution == "mixed" else execution
    net = ReversibleSequence(pairs, streams="fixed", execution=mixture)
    x = randn(2, 64, 64, dtype=dtype).cuda().requires_grad_()
    for _ in range(2):  # the second time, offloaded tensors come from the pool
        net.zero_grad()
        stored.zero_grad()
        assert_same_step(train_step(net, x), train_step(stored, x), tolerance=0.0)


# Work


def backward_flops(module: nn.Module, x: Tensor, given_: dict) -> int:
    """Returns the FLOPs of one backward."""
    torch.manual_seed(0)
    loss = weighted(module(x, **given_))
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def forward_flops(fn: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        fn(x)
    return counter.get_total_flops()


class TorchCheckpointed(StoredSequence):
    """The stored loop with torch's own early-stopping checkpoint around each branch."""

    def run(self, x1: Tensor, x2: Tensor, **given_: object) -> tuple[Tensor, Tensor]:
        for depth, block in enumerate(self.blocks):
            f_args, g_args = self.keywords(depth, 0, given_), self.keywords(depth, 1, given_)
            x1 = x1 + checkpoint(partial(block.f, **f_args), x2, use_reentrant=False)
            x2 = x2 + checkpoint(partial(block.g, **g_args), x1, use_reentrant=False)
        return x1, x2

    def forward(self, x: Tensor, **given_: object) -> Tensor:
        y1, y2 = self.run(x, x, **given_)
        return (y1 + y2) / 2


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_backward_flops_beyond_stored_execution_are_exact(case: Case, execution: str):
    net, oracle = both(case, execution=execution)
    stored = backward_flops(oracle, case.input(), case.keywords())
    extra = backward_flops(net, case.input(), case.keywords()) - stored
    if execution in ("store", "select"):
        expected = 0
    elif execution == "invert":
        expected = forward_flops(oracle, case.input())
    else:
        twin = TorchCheckpointed(copy.deepcopy([(b.f, b.g) for b in oracle.blocks]), case.route)
        expected = backward_flops(twin, case.input(), case.keywords()) - stored
    assert extra == expected


@given(data=st.data())
@settings(max_examples=15)
def test_the_flops_of_a_mixture_are_the_sum_over_its_steps(data: st.DataObject):
    mixture = data.draw(st.lists(st.sampled_from(EXECUTIONS), min_size=8, max_size=8))
    pairs = build([(Attention, Mlp)] * 4, 8)
    x = randn(2, 6, 8)
    extra: dict[tuple[int, str], int] = {}
    stored = backward_flops(ReversibleSequence(pairs, execution="store"), x, {})
    for step, execution in enumerate(mixture):
        # The other kind of branch everywhere else would add work of its own: stored steps add none.
        alone = ["store"] * 8
        alone[step] = execution
        extra[step, execution] = (
            backward_flops(ReversibleSequence(pairs, execution=alone), x, {}) - stored
        )
    assert backward_flops(ReversibleSequence(pairs, execution=mixture), x, {}) - stored == sum(
        extra.values()
    )


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_without_a_device_to_copy_from_offload_is_checkpoint(streams: str):
    x = randn(2, 6, 8, requires_grad=True)
    reports, steps = [], []
    for execution in ("checkpoint", "offload"):
        net = ReversibleSequence(
            build([(Attention, Mlp)] * 4, 8), streams=streams, execution=execution
        )
        steps.append(train_step(net, x))
        net.zero_grad()
        reports.append(measure_memory(net, x.detach()))
    assert_same_step(*steps, tolerance=0.0)
    assert reports[0] == reports[1]


# context_fn


def keeps_attention() -> object:
    """Keeps what attention's kernel returned, recomputes the rest."""

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = "scaled_dot_product" in str(op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_selective_policy_works_inside_every_execution(execution: str):
    case = named("attention-L4-fused")[0]
    net, oracle = both(case, execution=execution, context_fn=keeps_attention)
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))


@pytest.mark.parametrize("execution", ["checkpoint", "offload", "invert"])
def test_what_a_selective_policy_keeps_is_not_recomputed(execution: str):
    case = named("attention-L4-fused")[0]
    counts = []
    for options in ({}, {"context_fn": keeps_attention}):
        net, _ = both(case, execution=execution, **options)
        loss = weighted(net(case.input()))
        with OperationLog() as log:
            loss.backward()
        counts.append(
            sum("scaled_dot_product" in name and "backward" not in name for name in log.names)
        )
    assert counts == [4, 0]


# Compiled branches


# torch.compile itself reads the .grad of whatever is passed to a compiled function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_branch_stays_compiled_whatever_its_execution():
    pairs = build([(Attention, Mlp)] * 2, 8)
    oracle = stored_copy(pairs)
    for pair in pairs:
        for branch in pair:
            branch.compile(backend="aot_eager")
    net = ReversibleSequence(pairs)
    x = randn(2, 6, 8)
    expected = train_step(oracle, x)
    plan(net, x, "50%")
    for execution in ("invert", "select", "checkpoint", "store"):
        net.execution = execution
        net.zero_grad()
        with torch.profiler.profile() as profile:
            assert_same_step(train_step(net, x), expected)
        regions = [
            event.count
            for event in profile.key_averages()
            if event.key.startswith("Torch-Compiled Region")
        ]
        assert sum(regions) == (4 if execution in ("select", "store") else 8)


def test_a_new_execution_is_one_record(monkeypatch: pytest.MonkeyPatch):
    """Keeping results as well as the target: nothing else has to be told of it."""
    record = _execution.Execution("select target", keeps_results=True, keeps_target=True)
    monkeypatch.setitem(_execution.BY_NAME, record.name, record)
    monkeypatch.setattr(ReversibleSequence, "_allowed", tuple(_execution.BY_NAME))
    case = COUNTED[1]
    net, oracle = both(case, execution=record.name)
    expected = train_step(oracle, case.input(), **case.keywords())
    assert_same_step(train_step(net, case.input(), **case.keywords()), expected)
    kept = {}
    for name in (record.name, "select", "checkpoint"):
        net.execution = name
        kept[name] = measure_memory(net, case.input(), **case.keywords()).saved_bytes
    assert kept["checkpoint"] < kept["select"] < kept[record.name]
    # The planner measures it, and knows what it keeps.
    found = plan(net, case.input(), "100%", **case.keywords())
    assert found.peak_bytes > 0
