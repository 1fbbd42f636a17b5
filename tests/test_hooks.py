"""Module and tensor hooks, copies and pickles: a sequence is an ordinary module."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from cases import Case, Linear, Mlp, both, build, named, randn, with_dropout
from oracle import (
    assert_near,
    assert_same_gradients,
    assert_same_step,
    gradients_of,
    stored_copy,
    train_step,
    weighted,
)
from revnet import ReversibleSequence

HOOKED = named(
    "mlp-L8-dropout", "mlp-L4-chunk-concat", "attention-L8-dropout", "saves-nothing-between-L4"
)


def branches(module: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{i}.{name}": getattr(block, name)
        for i, block in enumerate(module.blocks)
        for name in ("f", "g")
    }


@pytest.mark.parametrize("case", HOOKED, ids=str)
def test_full_backward_hooks_fire_once_with_the_plain_loops_gradients(case: Case):
    found = []
    for module in both(case):
        seen: dict[str, Tensor | None] = {}
        times: Counter[str] = Counter()

        def after(name: str, grad_input: tuple, grad_output: tuple, seen=seen, times=times) -> None:
            times[f"{name} after"] += 1
            seen[f"{name} input"], seen[f"{name} output"] = grad_input[0], grad_output[0]

        def before(name: str, grad_output: tuple, seen=seen, times=times) -> None:
            times[f"{name} before"] += 1
            seen[f"{name} before"] = grad_output[0]

        for name, branch in branches(module).items():
            branch.register_full_backward_hook(
                lambda _, i, o, name=name, after=after: after(name, i, o)
            )
            branch.register_full_backward_pre_hook(
                lambda _, o, name=name, before=before: before(name, o)
            )
        train_step(module, case.input(), **case.keywords())
        assert set(times.values()) == {1}
        found.append((seen, times))
    (actual, actual_times), (expected, expected_times) = found
    assert actual_times == expected_times
    assert_same_gradients(actual, expected)


def test_a_full_backward_hook_may_change_the_gradient():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    for module in (net, oracle):
        for branch in branches(module).values():
            branch.register_full_backward_hook(lambda _, grads, __: (grads[0] * 1.5,))
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))


@pytest.mark.parametrize("case", named("mlp-L8-dropout", "attention-L8-dropout"), ids=str)
def test_forward_hooks_fire_once_per_evaluation_with_the_same_effect(case: Case):
    net, oracle = both(case)
    times: Counter[str] = Counter()
    for module in (net, oracle):
        for name, branch in branches(module).items():

            def before(_: nn.Module, args: tuple, name: str = name) -> tuple:
                times[f"{name} before"] += 1
                return (args[0] * 0.5, *args[1:])

            def after(_: nn.Module, __: tuple, out: Tensor, name: str = name) -> Tensor:
                times[f"{name} after"] += 1
                return out.sin()

            branch.register_forward_pre_hook(before)
            branch.register_forward_hook(after)
    expected = train_step(oracle, case.input())
    assert set(times.values()) == {1}
    times.clear()
    actual = train_step(net, case.input())
    assert set(times.values()) == {2}
    assert_same_step(actual, expected)


def test_forward_hooks_with_keywords_see_them_in_the_replay_too():
    case = named("modulated-L4-keywords")[0]
    net, oracle = both(case)
    for module in (net, oracle):
        for branch in branches(module).values():
            branch.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {k: v * 2 for k, v in kwargs.items()}),
                with_kwargs=True,
            )
    outcome = train_step(net, case.input(), **case.keywords())
    assert_same_step(outcome, train_step(oracle, case.input(), **case.keywords()))


def test_hooks_inside_a_branch_and_on_its_tensors():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    times: Counter[str] = Counter()
    for module in (net, oracle):
        kind = type(module).__name__

        def notch(grad: Tensor, kind: str = kind) -> Tensor:
            times[f"{kind} tensor"] += 1
            return grad * 2

        for branch in branches(module).values():
            branch.enter.register_forward_hook(
                lambda _, __, out, notch=notch: out.register_hook(notch) and None
            )
            branch.leave.register_full_backward_hook(
                lambda *_, kind=kind: times.update([f"{kind} module"])
            )
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))
    assert times["ReversibleSequence tensor"] == times["StoredSequence tensor"] == 16
    assert times["ReversibleSequence module"] == times["StoredSequence module"] == 16


def test_hooks_on_blocks_and_on_the_sequence_fire_once():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    times: Counter[str] = Counter()
    for name, module in {
        "net": net,
        **{f"block {i}": block for i, block in enumerate(net.blocks)},
    }.items():
        module.register_forward_pre_hook(
            lambda *_, name=name: times.update([f"{name} forward pre"])
        )
        module.register_forward_hook(lambda *_, name=name: times.update([f"{name} forward"]))
        module.register_full_backward_pre_hook(
            lambda *_, name=name: times.update([f"{name} backward pre"])
        )
        module.register_full_backward_hook(lambda *_, name=name: times.update([f"{name} backward"]))
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))
    assert len(times) == 4 * 9
    assert set(times.values()) == {1}


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_parameter_hooks_fire_once(kind: str):
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)
    times: Counter[str] = Counter()
    for name, parameter in net.named_parameters():
        getattr(parameter, kind)(lambda *_, name=name: times.update([name]))
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))
    assert times == {name: 1 for name, _ in net.named_parameters()}


def test_an_optimizer_step_in_the_backward_of_each_parameter():
    """Post-accumulate hooks that step at once and free the gradient: the usual trick to save
    gradient memory.
    """
    case = named("mlp-L8")[0]
    net, oracle = both(case)
    for parameter in net.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1)
    for seed in range(3):
        weighted(net(case.input(seed=seed))).backward()
        optimizer.zero_grad()
        weighted(oracle(case.input(seed=seed))).backward()
        optimizer.step()
    for (name, actual), expected in zip(net.named_parameters(), oracle.parameters(), strict=True):
        assert_near(actual.detach(), expected.detach(), name, 1e-11)


def _by_deepcopy(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def _by_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def _by_torch_save(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _by_state_dict(net: nn.Module) -> nn.Module:
    case = named("mlp-L4-chunk-concat")[0]
    fresh = ReversibleSequence(case.pairs(seed=5), case.route, **case.options)
    fresh.load_state_dict(net.state_dict(), strict=True)
    return fresh


@pytest.mark.parametrize("when", ["before", "after backward", "between"])
@pytest.mark.parametrize("copied", [_by_deepcopy, _by_pickle, _by_torch_save, _by_state_dict])
def test_a_copy_computes_the_same(copied: object, when: str):
    case = named("mlp-L4-chunk-concat")[0]
    net, oracle = both(case)
    expected = train_step(oracle, case.input())
    if when == "after backward":
        train_step(net, case.input())
    loss = weighted(net(x := case.input())) if when == "between" else None
    twin = copied(net)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
    twin.zero_grad()
    assert_same_step(train_step(twin, case.input()), expected)
    if loss is not None:
        loss.backward()
        assert_near(x.grad, expected.gradients["x"])
        assert_same_gradients(
            gradients_of(net), {k: v for k, v in expected.gradients.items() if k != "x"}
        )


@pytest.mark.parametrize("copied", [_by_deepcopy, _by_pickle])
def test_a_copy_keeps_its_settings_and_what_is_shared(copied: object):
    pairs = build([(with_dropout(Mlp), Linear)], 8) * 2
    net = copied(
        ReversibleSequence(pairs, {"a": ((True, True),) * 2}, merge="sum", execution="store").eval()
    )
    assert net.execution == "store"
    assert not net.training
    assert net.blocks[0].f is net.blocks[1].f
    x = randn(2, 3, 8)
    assert_near(net(x), stored_copy(pairs, merge="sum").eval()(x))


def test_casting_and_moving_a_sequence_is_as_for_any_module():
    net = ReversibleSequence(build([(Mlp, Mlp)], 8)).to(torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net(torch.randn(2, 3, 8)).dtype == torch.float32
    assert {p.device.type for p in copy.deepcopy(net).to("meta").parameters()} == {"meta"}
