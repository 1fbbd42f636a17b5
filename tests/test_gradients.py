"""Gradients equal those of the plain stored loop, in float64, in every way that autograd can be
asked for them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import (
    CASES,
    Attention,
    Bias,
    Case,
    Constant,
    Gate,
    InPlaceInside,
    Linear,
    Mlp,
    Modulated,
    ReadsSavedTwice,
    ReturnsInput,
    SavesInput,
    SavesNothing,
    SavesResult,
    both,
    build,
    every,
    named,
    noted,
    randn,
    with_dropout,
)
from oracle import (
    Results,
    assert_alike,
    assert_near,
    assert_same_gradients,
    assert_same_step,
    gradients_of,
    stored_copy,
    train_step,
    weighted,
)
from revnet import ReversibleBlock, ReversibleSequence, SequentialSequence

SEVERAL = named(
    "mlp-L8",
    "attention-L8-dropout",
    "modulated-L4-keywords",
    "saves-nothing-between-L4",
    "mixed-L6",
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_input_that_needs_no_gradient(case: Case):
    net, oracle = both(case)
    x = case.input(requires_grad=False)
    assert_same_step(
        train_step(net, x, **case.keywords()), train_step(oracle, x, **case.keywords())
    )


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_the_execution_can_be_switched_at_any_time(case: Case):
    net, oracle = both(case)
    expected = train_step(oracle, case.input(), **case.keywords())
    for execution in ("store", "invert", "store"):
        net.execution = execution
        net.zero_grad()
        assert_same_step(train_step(net, case.input(), **case.keywords()), expected)


def test_switching_between_forward_and_backward_changes_nothing():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    expected = train_step(oracle, case.input())
    for first, then in (("invert", "store"), ("store", "invert")):
        net.execution = first
        net.zero_grad()
        torch.manual_seed(0)
        out = net(x := case.input())
        net.execution = then
        weighted(out).backward()
        assert_near(x.grad, expected.gradients["x"])
        assert_same_gradients(
            gradients_of(net), {k: v for k, v in expected.gradients.items() if k != "x"}
        )


@pytest.mark.parametrize("which", ["y1", "y2", "both"])
def test_run_gives_both_streams(which: str):
    case = named("attention-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x1, x2 = (
            randn(2, 6, 8, seed=3, requires_grad=True),
            randn(2, 6, 8, seed=4, requires_grad=True),
        )
        y1, y2 = module.run(x1, x2)
        weighted(*{"y1": (y1,), "y2": (y2,), "both": (y1, y2)}[which]).backward()
        return {"y1": y1, "y2": y2, "x1": x1.grad, "x2": x2.grad}

    assert_alike(net, oracle, run)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x1", "x2"])
def test_run_when_one_stream_needs_no_gradient(needs: tuple[bool, bool]):
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x1 = randn(2, 6, 8, seed=3, requires_grad=needs[0])
        x2 = randn(2, 6, 8, seed=4, requires_grad=needs[1])
        weighted(*module.run(x1, x2)).backward()
        return {"x1": x1.grad, "x2": x2.grad}

    assert_alike(net, oracle, run)


def test_run_of_the_same_tensor_twice():
    case = named("mlp-L8")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        weighted(*module.run(x, x)).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


@pytest.mark.parametrize(
    "case", named("mlp-L8", "attention-L4-mask-rotary", "convolution-L3-nchw-chunk"), ids=str
)
def test_inverse_undoes_run_and_has_its_own_gradient(case: Case):
    net, oracle = both(case)
    shape = list(case.shape)
    if case.options.get("split") == "chunk":
        shape[case.options["dim"]] //= 2
    x1, x2 = randn(*shape, seed=3), randn(*shape, seed=4)
    back1, back2 = net.inverse(*net.run(x1, x2, **case.keywords()), **case.keywords())
    assert_near(back1, x1)
    assert_near(back2, x2)

    def run(module: nn.Module) -> Results:
        module.zero_grad()
        y1, y2 = x1.clone().requires_grad_(), x2.clone().requires_grad_()
        weighted(*module.inverse(y1, y2, **case.keywords())).backward()
        return {"y1": y1.grad, "y2": y2.grad}

    assert_alike(net, oracle, run)


def test_a_block_alone_is_one_step_of_the_loop_and_inverts():
    (f, g) = build([(Modulated, Modulated)], 8)[0]
    block, (f, g) = ReversibleBlock(f, g), copy.deepcopy((f, g))
    scale, shift = randn(8, seed=5), randn(8, seed=6)
    x1, x2 = randn(2, 6, 8, seed=3), randn(2, 6, 8, seed=4)
    y1, y2 = block(x1, x2, f_args={"scale": scale}, g_args={"shift": shift})
    expected1 = x1 + f(x2, scale=scale)
    assert_near(y1, expected1)
    assert_near(y2, x2 + g(expected1, shift=shift))
    back1, back2 = block.inverse(y1, y2, f_args={"scale": scale}, g_args={"shift": shift})
    assert_near(back1, x1)
    assert_near(back2, x2)
    weighted(y1, y2).backward()
    weighted(expected1, x2 + g(expected1, shift=shift)).backward()
    for actual, expected in zip(
        block.parameters(), [*f.parameters(), *g.parameters()], strict=True
    ):
        assert_near(actual.grad, expected.grad)


@pytest.mark.parametrize(
    "case", named("attention-L4-mask-rotary", "modulated-L4-keywords"), ids=str
)
def test_the_sequential_twin_is_the_plain_residual_loop(case: Case):
    pairs = case.pairs()
    twin, pairs = SequentialSequence(pairs, case.route), copy.deepcopy(pairs)
    given = case.keywords()
    x = case.input()
    weighted(twin(x, **given)).backward()
    out = expected = case.input()
    for depth, pair in enumerate(pairs):
        for place, branch in enumerate(pair):
            out = out + branch(
                out, **{k: v for k, v in given.items() if case.route[k][depth][place]}
            )
    weighted(out).backward()
    assert_near(x.grad, expected.grad)
    for actual, branch in zip(twin.layers, pairs, strict=True):
        for p, q in zip(actual.parameters(), nn.ModuleList(branch).parameters(), strict=True):
            assert_near(p.grad, q.grad)


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize(
    "to", [(True, False), (False, True), (True, True)], ids=["f", "g", "f-and-g"]
)
def test_gradients_of_keyword_tensors(to: tuple[bool, bool], leaf: bool):
    pairs = build([(with_dropout(Modulated), with_dropout(Modulated))] * 3, 8)
    route = {"scale": every(3, *to)}
    net, oracle = ReversibleSequence(pairs, route), stored_copy(pairs, route)

    def run(module: nn.Module) -> Results:
        x, source = randn(2, 6, 8, requires_grad=True), randn(2, 1, 8, seed=5, requires_grad=True)
        scale = source if leaf else source.exp()
        (weighted(module(x, scale=scale)) + scale.sum()).backward()
        return {"x": x.grad, "source": source.grad}

    assert_alike(net, oracle, run)


def test_a_keyword_that_depends_on_the_input():
    pairs = build([(Modulated, Modulated)] * 3, 8)
    route = {"scale": every(3, True, True), "shift": every(3, False, True)}
    net, oracle = ReversibleSequence(pairs, route), stored_copy(pairs, route)

    def run(module: nn.Module) -> Results:
        x = randn(2, 6, 8, requires_grad=True)
        weighted(module(x, scale=x.mean(1, keepdim=True), shift=x)).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


class ReadsAttribute(nn.Module):
    """Multiplies by a tensor that is neither parameter, buffer nor keyword, and that has a graph of
    its own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.gain: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.gain).sin() * self.gain


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "non-leaf"])
def test_gradients_of_tensors_that_a_branch_holds(leaf: bool):
    pairs = build([(ReadsAttribute, ReadsAttribute)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)

    def run(module: nn.Module) -> Results:
        x, source = randn(2, 6, 8, requires_grad=True), randn(8, seed=5, requires_grad=True)
        gain = source if leaf else source.tanh()
        for block in module.blocks:
            block.f.gain = block.g.gain = gain
        weighted(module(x)).backward()
        return {"x": x.grad, "source": source.grad}

    assert_alike(net, oracle, run)


GRADCHECK = [
    Case("mlp-L2", 2, ((Mlp, Mlp),), shape=(2, 2, 4)),
    Case("attention-L2", 2, ((Attention, SavesInput),), shape=(1, 3, 4)),
    Case(
        "gate-chunk-L2",
        2,
        ((Gate, SavesResult),),
        shape=(3, 4),
        options={"split": "chunk", "merge": "concat"},
    ),
    Case("nothing-bias-L2", 2, ((SavesNothing, Bias), (ReturnsInput, Linear)), shape=(2, 4)),
    Case(
        "modulated-L2",
        2,
        ((Modulated, Modulated),),
        shape=(2, 2, 3),
        route={"scale": every(2, True, True)},
        keywords=lambda: {"scale": randn(3, seed=5, requires_grad=True)},
    ),
]


@pytest.mark.parametrize("order", [1, 2], ids=["gradcheck", "gradgradcheck"])
@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_numerical_derivatives(case: Case, order: int):
    net = ReversibleSequence(case.pairs(), case.route, **case.options)
    names, values = zip(
        *((n, p.detach().requires_grad_()) for n, p in net.named_parameters()), strict=True
    )
    keywords = case.keywords()

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(keywords, rest, strict=False))
        parameters = dict(zip(names, rest[len(keywords) :], strict=True))
        return torch.func.functional_call(net, parameters, (x,), given)

    inputs = (case.input(), *keywords.values(), *values)
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(function, inputs, fast_mode=order == 2)


@pytest.mark.parametrize(
    "case",
    named(
        "mlp-L8",
        "mlp-L8-dropout",
        "attention-L8-dropout",
        "modulated-L4-keywords",
        "saves-nothing-between-L4",
    ),
    ids=str,
)
def test_a_gradient_penalty(case: Case):
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x, given = case.input(), case.keywords()
        (slope,) = torch.autograd.grad(weighted(module(x, **given)), x, create_graph=True)
        (slope.square().sum() - 1).square().backward()
        return {"x": x.grad, **{k: v.grad for k, v in given.items()}}

    assert_alike(net, oracle, run)


def test_a_third_derivative():
    case = named("saves-input-saves-result-L4")[0]
    net, oracle = both(case)
    found = []
    for module in (net, oracle):
        x = case.input()
        value = weighted(module(x))
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            value = weighted(slope)
        found.append(slope)
    assert_near(*found, tolerance=1e-11)


def test_the_loss_and_a_penalty_in_one_backward():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        loss = weighted(module(x))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


@pytest.mark.parametrize("order", ["one backward", "first then second", "second then first"])
def test_two_forwards_before_the_backward(order: str):
    case = named("attention-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        first, second = case.input(seed=1), case.input(seed=2)
        losses = [weighted(module(first)), weighted(module(second))]
        if order == "one backward":
            sum(losses).backward()
        else:
            for loss in losses if order.startswith("first") else reversed(losses):
                loss.backward()
        return {"first": first.grad, "second": second.grad}

    assert_alike(net, oracle, run)


def test_the_output_of_one_call_is_the_input_of_the_next():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        weighted(module(module(x))).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run, tolerance=1e-11)


def test_gradient_accumulation():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    for module in (net, oracle):
        torch.manual_seed(0)
        for seed in range(3):
            weighted(module(case.input(seed=seed, requires_grad=False))).backward()
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


@pytest.mark.parametrize("then", ["eval", "train", "as it was"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", named("mlp-L8-dropout", "convolution-L3-batchnorm"), ids=str)
def test_the_mode_may_change_between_forward_and_backward(case: Case, training: bool, then: str):
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        module.train(training)
        x = case.input()
        loss = weighted(module(x))
        module.train({"eval": False, "train": True}.get(then, training))
        flags = [m.training for m in module.modules()]
        loss.backward()
        assert [m.training for m in module.modules()] == flags
        return {"x": x.grad, **{k: b.clone() for k, b in module.named_buffers()}}

    assert_alike(net, oracle, run)


def test_one_branch_in_eval_mode_while_the_rest_trains():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    for module in (net, oracle):
        module.blocks[2].f.eval()
        module.blocks[5].g.dropout.eval()
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))


@pytest.mark.parametrize("x_needs", [True, False], ids=["x-grad", "x-none"])
@pytest.mark.parametrize("frozen", ["f", "g", "first", "last", "all but one bias"])
def test_frozen_branches(frozen: str, x_needs: bool):
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    for module in (net, oracle):
        for name, parameter in module.named_parameters():
            _, depth, branch, *_ = name.split(".")
            freeze = {
                "f": branch == "f",
                "g": branch == "g",
                "first": int(depth) < 4,
                "last": int(depth) >= 4,
                "all but one bias": name != "blocks.5.f.leave.bias",
            }[frozen]
            parameter.requires_grad_(not freeze)
    x = case.input(requires_grad=x_needs)
    assert_same_step(train_step(net, x), train_step(oracle, x))


def test_nothing_needs_a_gradient():
    case = named("mlp-L8")[0]
    net, _ = both(case)
    net.requires_grad_(False)
    assert not net(case.input(requires_grad=False)).requires_grad
    x = case.input()
    weighted(net(x)).backward()
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())


def test_freezing_between_forward_and_backward_is_as_in_the_stored_loop():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    found = []
    for module in (net, oracle):
        x = case.input()
        torch.manual_seed(0)
        loss = weighted(module(x))
        module.blocks[3].requires_grad_(False)
        grads = torch.autograd.grad(
            loss, [x, module.blocks[0].f.enter.weight, module.blocks[6].g.norm.weight]
        )
        found.append(dict(enumerate(grads)))
    assert_same_gradients(*found)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_autograd_grad_of_any_subset_touches_no_grad(case: Case):
    net, oracle = both(case)
    losses, leaves = [], []
    for module in (net, oracle):
        x, given = case.input(), case.keywords()
        torch.manual_seed(0)
        losses.append(weighted(module(x, **given)))
        leaves.append({"x": x, **dict(module.named_parameters())})
    names = list(leaves[0])
    subsets = [[name] for name in names[:: max(1, len(names) // 8)]] + [
        names[-3:],
        names[::5],
        names,
    ]
    for subset in subsets:
        actual, expected = (
            torch.autograd.grad(
                loss, [tensors[n] for n in subset], retain_graph=True, allow_unused=True
            )
            for loss, tensors in zip(losses, leaves, strict=True)
        )
        assert_same_gradients(
            dict(zip(subset, actual, strict=True)), dict(zip(subset, expected, strict=True))
        )
    assert all(tensor.grad is None for tensor in leaves[0].values())


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_backward_twice_with_retain_graph(case: Case):
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x, given = case.input(), case.keywords()
        loss = weighted(module(x, **given))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


def test_a_second_backward_without_retain_graph_raises_as_stored_execution_does():
    case = named("mlp-L8")[0]
    net, oracle = both(case)
    for module in (net, oracle):
        loss = weighted(module(case.input()))
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_several_backwards_from_several_losses_of_one_output():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        out = module(x)
        out[:, 0].sum().backward(retain_graph=True)
        weighted(out).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


def _fill_slice(t: Tensor) -> Tensor:
    t[:, 0].fill_(3)
    return t


INPLACE = {
    "mul": lambda t: t.mul_(2),
    "add": lambda t: t.add_(1),
    "zero": lambda t: t.zero_(),
    "relu": torch.relu_,
    "slice": _fill_slice,
}


@pytest.mark.parametrize("operation", INPLACE)
@pytest.mark.parametrize(
    "options", [{}, {"merge": "sum"}, {"merge": "concat"}], ids=["mean", "sum", "concat"]
)
@pytest.mark.parametrize(
    "case", named("mlp-L8", "saves-result-saves-nothing-L4", "linear-L1"), ids=str
)
def test_in_place_on_the_output_of_forward_is_right_or_raises(
    case: Case, options: dict, operation: str
):
    pairs = case.pairs()
    net, oracle = ReversibleSequence(pairs, **options), stored_copy(pairs, **options)
    change = INPLACE[operation]
    x, expected = case.input(), case.input()
    weighted(change(oracle(expected).clone())).backward()
    out = net(x)
    change(out)
    try:
        weighted(out).backward()
    except RuntimeError:
        return
    assert_near(x.grad, expected.grad)
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


@pytest.mark.parametrize("operation", INPLACE)
@pytest.mark.parametrize("which", [0, 1], ids=["y1", "y2"])
@pytest.mark.parametrize(
    "case", named("mlp-L8", "saves-result-saves-nothing-L4", "linear-L1"), ids=str
)
def test_in_place_on_an_output_of_run_is_right_or_raises(case: Case, which: int, operation: str):
    net, oracle = both(case)
    change = INPLACE[operation]
    found = []
    for module in (oracle, net):
        x = case.input()
        ys = list(module.run(x, x * 2))
        if module is oracle:
            ys[which] = change(ys[which].clone())
        else:
            change(ys[which])
        try:
            weighted(*ys).backward()
        except RuntimeError:
            assert module is net
            return
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*reversed(found))


@pytest.mark.parametrize("which", [0, 1], ids=["y1", "y2"])
def test_in_place_under_no_grad_on_an_output_of_run_is_right_or_raises(which: int):
    case = named("mlp-L8")[0]
    net, oracle = both(case)
    x, expected = case.input(), case.input()
    weighted(*oracle.run(expected, expected * 2)).backward()
    ys = net.run(x, x * 2)
    loss = weighted(*(y.clone() for y in ys))
    with torch.no_grad():
        ys[which].zero_()
    try:
        loss.backward()
    except RuntimeError:
        return
    assert_near(x.grad, expected.grad)
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


@pytest.mark.parametrize(
    "case", named("mlp-L8", "linear-L1", "saves-nothing-L3", "mlp-L4-chunk-concat"), ids=str
)
def test_the_input_is_readable_and_unchanged_afterwards(case: Case):
    net, _ = both(case)
    x = case.input()
    before = x.detach().clone()
    out = net(x)
    assert torch.equal(x, before)
    weighted(out).backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("case", named("mlp-L8", "saves-nothing-between-L4", "linear-L1"), ids=str)
def test_changing_the_input_in_place_before_backward_is_right_or_raises(case: Case):
    net, oracle = both(case)
    expected = case.input(requires_grad=False)
    weighted(oracle(expected)).backward()
    x = case.input(requires_grad=False)
    loss = weighted(net(x))
    x.zero_()
    try:
        loss.backward()
    except RuntimeError:
        return
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


def test_the_input_may_have_been_made_by_other_operations():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        hidden = x.exp()
        weighted(module(hidden).sin() + hidden).backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


class Fails(Exception):
    """Stands for whatever may go wrong in a branch."""


class FailsOnce(Mlp):
    """Raises in the evaluations for which True is planned: a list that replays share."""

    def forward(self, x: Tensor) -> Tensor:
        if noted(self) and noted(self).pop(0):
            raise Fails
        return super().forward(x)


@pytest.mark.parametrize("place", [(0, "f"), (1, "g"), (3, "g")], ids=["first", "middle", "last"])
def test_an_exception_in_a_replay_and_then_a_second_try(place: tuple[int, str]):
    pairs = build([(with_dropout(FailsOnce), with_dropout(FailsOnce))] * 4, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x, expected = (randn(2, 6, 8, requires_grad=True) for _ in range(2))
    torch.manual_seed(0)
    wanted = torch.autograd.grad(weighted(oracle(expected)), [expected, *oracle.parameters()])
    torch.manual_seed(0)
    noted(getattr(net.blocks[place[0]], place[1])).extend([False, True])
    loss = weighted(net(x))
    state, flags = torch.get_rng_state(), [m.training for m in net.modules()]
    with pytest.raises(Fails):
        torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == flags
    found = torch.autograd.grad(loss, [x, *net.parameters()])
    assert_same_gradients(dict(enumerate(found)), dict(enumerate(wanted)))
    net.zero_grad()
    oracle.zero_grad()
    assert_same_step(
        train_step(net, randn(2, 6, 8, seed=5)), train_step(oracle, randn(2, 6, 8, seed=5))
    )


def test_an_exception_in_a_forward_and_then_a_second_try():
    pairs = build([(FailsOnce, with_dropout(Mlp))] * 4, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    noted(net.blocks[2].f).append(True)
    with pytest.raises(Fails):
        net(randn(2, 6, 8, requires_grad=True))
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))


def _node(out: Tensor, kind: str) -> torch.autograd.graph.Node:
    waiting, seen = [out.grad_fn], set()
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        if type(node).__name__ == kind:
            return node
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    raise AssertionError(f"no {kind} in the graph")


def test_saved_tensors_can_be_read_outside_backward_and_twice():
    pairs = build([(SavesInput, Mlp), (SavesResult, Linear), (SavesInput, Linear)], 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x, expected = (randn(2, 6, 8, requires_grad=True) for _ in range(2))
    loss, wanted = weighted(net(x)), weighted(oracle(expected))
    for kind, attribute in (("SinBackward0", "_saved_self"), ("TanhBackward0", "_saved_result")):
        for _ in range(2):
            actual = getattr(_node(loss, kind), attribute)
            assert_near(actual.detach(), getattr(_node(wanted, kind), attribute).detach())
    loss.backward()
    wanted.backward()
    assert_near(x.grad, expected.grad)
    assert_same_gradients(gradients_of(net), gradients_of(oracle))


def test_a_gradient_that_is_asked_for_from_inside_a_hook_of_the_same_backward():
    """A second backward, of another graph through the same sequence, runs while the first is under
    way.
    """
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        first, second = case.input(seed=1), case.input(seed=2)
        other = weighted(module(second))
        loss = weighted(module(first))
        inner: list[Tensor] = []
        first.register_hook(
            lambda _, other=other, second=second, inner=inner: inner.extend(
                torch.autograd.grad(other, second)
            )
        )
        loss.backward()
        return {"first": first.grad, "inner": inner[0]}

    assert_alike(net, oracle, run)


MAKERS = {
    "linear": Linear,
    "mlp": Mlp,
    "mlp-dropout": with_dropout(Mlp),
    "attention": Attention,
    "attention-dropout": with_dropout(Attention),
    "modulated": Modulated,
    "modulated-dropout": with_dropout(Modulated),
    "gate": Gate,
    "in-place": InPlaceInside,
    "sin": SavesInput,
    "tanh": SavesResult,
    "flip": SavesNothing,
    "identity": ReturnsInput,
    "constant": Constant,
    "bias": Bias,
    "twice": ReadsSavedTwice,
}


@st.composite
def networks(draw: st.DrawFn) -> tuple[list, dict, dict, dict]:
    """Draws branches (some shared), routes for those that take keywords, options and what needs a
    gradient.
    """
    depth = draw(st.integers(1, 5))
    kinds = draw(
        st.lists(st.tuples(*[st.sampled_from(sorted(MAKERS))] * 2), min_size=depth, max_size=depth)
    )
    pairs = build([(MAKERS[f], MAKERS[g]) for f, g in kinds], 4, seed=draw(st.integers(0, 3)))
    for at in draw(st.lists(st.integers(1, depth), max_size=2)):
        if at < depth:
            pairs[at], kinds[at] = pairs[at - 1], kinds[at - 1]
    takes = [tuple(kind.startswith("modulated") for kind in pair) for pair in kinds]
    route = {
        key: tuple((f and draw(st.booleans()), g and draw(st.booleans())) for f, g in takes)
        for key in draw(st.sets(st.sampled_from(["scale", "shift"])))
    }
    options = draw(
        st.fixed_dictionaries(
            {
                "split": st.sampled_from(["copy", "chunk"]),
                "merge": st.sampled_from(["mean", "sum", "concat"]),
            }
        )
    )
    needs = draw(st.fixed_dictionaries({key: st.booleans() for key in ("x", *sorted(route))}))
    frozen = draw(st.sets(st.integers(0, 2 * depth - 1)))
    for place in frozen:
        pairs[place // 2][place % 2].requires_grad_(False)
    return pairs, route, options, needs


@given(networks(), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_any_mix_equals_the_stored_loop(network: tuple, batch: int, tokens: int, training: bool):
    pairs, route, options, needs = network
    net, oracle = ReversibleSequence(pairs, route, **options), stored_copy(pairs, route, **options)
    net.train(training)
    oracle.train(training)
    width = 8 if options["split"] == "chunk" else 4
    x = randn(batch, tokens, width, requires_grad=needs["x"])
    shapes = {"scale": (batch, 1, 4), "shift": (tokens, 4)}
    given_ = {key: randn(*shapes[key], seed=5, requires_grad=needs[key]) for key in sorted(route)}
    # Up to ten steps of any kind amplify the rounding of the rebuilt streams.
    assert_same_step(train_step(net, x, **given_), train_step(oracle, x, **given_), tolerance=1e-10)


@given(
    kinds=st.lists(
        st.sampled_from(["mlp", "mlp-dropout", "tanh", "flip", "identity", "sin", "linear"]),
        min_size=2,
        max_size=8,
    ),
    asked=st.lists(
        st.tuples(
            st.integers(0, 1), st.sets(st.integers(0, 30), min_size=1, max_size=4), st.booleans()
        ),
        min_size=1,
        max_size=6,
    ),
    which=st.sampled_from(["y1", "y2", "both"]),
)
def test_any_order_of_partial_gradients_of_two_calls(kinds: list, asked: list, which: str):
    """Walks that start, stop, start again and interleave must all find the right state."""
    pairs = build(
        [(MAKERS[f], MAKERS[g]) for f, g in zip(kinds[::2], kinds[1::2], strict=False)], 4
    )
    answers = []
    for module in (ReversibleSequence(pairs), stored_copy(pairs)):
        torch.manual_seed(0)
        calls = []
        for seed in range(2):
            x1, x2 = (randn(2, 3, 4, seed=2 * seed + i, requires_grad=True) for i in range(2))
            ys = module.run(x1, x2)
            loss = weighted(*{"y1": ys[:1], "y2": ys[1:], "both": ys}[which])
            calls.append((loss, [x1, x2, *module.parameters()]))
        found = []
        for call, places, create in asked:
            loss, leaves = calls[call]
            chosen = [leaves[place % len(leaves)] for place in sorted(places)]
            grads = torch.autograd.grad(
                loss, chosen, retain_graph=True, create_graph=create, allow_unused=True
            )
            found += [None if grad is None else grad.detach() for grad in grads]
            if create and any(grad is not None and grad.requires_grad for grad in grads):
                penalty = sum(
                    grad.square().sum() for grad in grads if grad is not None and grad.requires_grad
                )
                found += torch.autograd.grad(
                    penalty, leaves[:2], retain_graph=True, allow_unused=True
                )
        sum(loss for loss, _ in calls).backward()
        found += [leaf.grad for _, leaves in calls for leaf in leaves]
        answers.append({str(place): grad for place, grad in enumerate(found)})
    assert_same_gradients(*answers, tolerance=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_on_cuda_equals_the_stored_loop(case: Case):
    pairs = [(f.cuda(), g.cuda()) for f, g in case.pairs()]
    net, oracle = (
        ReversibleSequence(pairs, case.route, **case.options),
        stored_copy(pairs, case.route, **case.options),
    )
    x = case.input().detach().cuda().requires_grad_()
    given_ = {
        k: v.detach().cuda().requires_grad_(v.requires_grad) for k, v in case.keywords().items()
    }
    actual, expected = train_step(net, x, **given_), train_step(oracle, x, **given_)
    # Convolutions and attention accumulate with atomics on CUDA: not bit for bit, but far below any
    # real error.
    assert_same_step(actual, expected, tolerance=1e-10)
