"""A sequence inside, and around, everything else that changes how autograd saves and recomputes."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from cases import (
    Attention,
    Case,
    Linear,
    Mlp,
    SavesNothing,
    both,
    build,
    named,
    randn,
    with_dropout,
)
from oracle import (
    Results,
    StoredSequence,
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

NESTED = named(
    "mlp-L8",
    "attention-L8-dropout",
    "saves-nothing-between-L4",
    "shared-L4-dropout",
    "convolution-L3-batchnorm",
)


def _checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)


def _checkpointed_by_reentry(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=True)


def _checkpointed_to_the_end(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False, early_stop=False)


def _checkpointed_twice(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: checkpoint(module, x, use_reentrant=False), x, use_reentrant=False)


def _saved_on_cpu(module: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return module(x)


def _saved_elsewhere(module: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        return module(x)


def _checkpointed_on_cpu(module: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return checkpoint(module, x, use_reentrant=False)


AROUND = [
    _checkpointed,
    _checkpointed_by_reentry,
    _checkpointed_to_the_end,
    _checkpointed_twice,
    _saved_on_cpu,
    _saved_elsewhere,
    _checkpointed_on_cpu,
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("case", NESTED, ids=str)
def test_a_sequence_inside(case: Case, around: Callable):
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        # The oracle is the loop alone; batch norm would be updated twice by a checkpoint around it.
        x = case.input()
        out = around(module, x) if module is net else module(x)
        weighted(out).backward()
        return {"x": x.grad, "out": out.detach()}

    assert_alike(net, oracle, run)


@pytest.mark.parametrize(
    "around", [_checkpointed, _checkpointed_to_the_end, _saved_on_cpu, _saved_elsewhere]
)
def test_a_sequence_inside_is_right_for_partial_and_repeated_gradients(around: Callable):
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        loss = weighted(around(module, x) if module is net else module(x))
        middle = module.blocks[4].g.enter.weight
        part = torch.autograd.grad(loss, middle, retain_graph=True)[0]
        again = torch.autograd.grad(loss, [x, module.blocks[0].f.leave.weight], retain_graph=True)
        loss.backward()
        return {"part": part, "x1": again[0], "w": again[1], "x": x.grad}

    assert_alike(net, oracle, run)


@pytest.mark.parametrize("around", [_checkpointed, _saved_on_cpu])
def test_a_gradient_penalty_through_a_sequence_inside(around: Callable):
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        loss = weighted(around(module, x) if module is net else module(x))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.square().sum().backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


class Around(nn.Module):
    """A branch that runs its inner module in some surrounding."""

    def __init__(self, inner: nn.Module, around: Callable) -> None:
        super().__init__()
        self.inner, self.around = inner, around

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.inner, x)


@pytest.mark.parametrize("around", [a for a in AROUND if a is not _checkpointed_by_reentry])
@pytest.mark.parametrize(
    "branch",
    [Mlp, with_dropout(Mlp), with_dropout(Attention), SavesNothing],
    ids=["mlp", "dropout", "attention", "nothing"],
)
def test_inside_a_branch(branch: Callable, around: Callable):
    pairs = build([(branch, branch)] * 3, 8)
    oracle = stored_copy(pairs)
    net = ReversibleSequence(
        [(Around(f, around), Mlp(8).double() if False else Around(g, around)) for f, g in pairs]
    )
    x = randn(2, 6, 8, requires_grad=True)
    actual, expected = train_step(net, x), train_step(oracle, x)
    renamed = {name.replace("inner.", ""): grad for name, grad in actual.gradients.items()}
    assert_same_step(actual._replace(gradients=renamed), expected)


def test_reentrant_checkpoint_inside_a_branch_is_right_or_raises():
    """It calls backward inside backward, on a graph that a replay has thrown away."""
    pairs = build([(Mlp, with_dropout(Mlp))] * 3, 8)
    oracle = stored_copy(pairs)
    net = ReversibleSequence([(Around(f, _checkpointed_by_reentry), g) for f, g in pairs])
    x = randn(2, 6, 8, requires_grad=True)
    expected = train_step(oracle, x)
    try:
        actual = train_step(net, x)
    except RuntimeError:
        return
    renamed = {name.replace("inner.", ""): grad for name, grad in actual.gradients.items()}
    assert_same_step(actual._replace(gradients=renamed), expected)


INNER = {
    "sequence": lambda pairs: ReversibleSequence(pairs),
    "chunked": lambda pairs: ReversibleSequence(pairs, split="chunk", merge="concat"),
    "stored": lambda pairs: ReversibleSequence(pairs, execution="store"),
    "sequential": lambda pairs: SequentialSequence(pairs),
}


class StoredSequential(nn.Module):
    """The oracle of the sequential twin."""

    def __init__(self, pairs: list) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList(pair) for pair in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for branch in itertools.chain.from_iterable(self.layers):
            x = x + branch(x)
        return x


STORED = {
    "sequence": lambda pairs: StoredSequence(pairs),
    "chunked": lambda pairs: StoredSequence(pairs, split="chunk", merge="concat"),
    "stored": lambda pairs: StoredSequence(pairs),
    "sequential": StoredSequential,
}


@pytest.mark.parametrize(
    "around", [None, _checkpointed, _saved_on_cpu], ids=["alone", "in-checkpoint", "on-cpu"]
)
@pytest.mark.parametrize("kind", INNER)
def test_a_sequence_as_a_branch_of_another(kind: str, around: Callable | None):
    found = []
    for inner, outer in ((INNER[kind], ReversibleSequence), (STORED[kind], StoredSequence)):
        makers = [(with_dropout(Mlp), Mlp)] * 2
        pairs = [
            (
                inner(build(makers, 4 if kind == "chunked" else 8, seed=i)),
                build([(Linear, Linear)], 8, seed=i)[0][1],
            )
            for i in range(3)
        ]
        module = outer(pairs)
        x = randn(2, 6, 8, requires_grad=True)
        torch.manual_seed(0)
        out = module(x) if around is None or outer is StoredSequence else around(module, x)
        weighted(out).backward()
        found.append(
            {"x": x.grad, "out": out.detach(), "rng": torch.get_rng_state()} | gradients_of(module)
        )
    assert_same_gradients(*found)


def test_three_deep():
    """A sequence in a checkpoint in a branch of a sequence in a branch of a sequence."""
    found = []
    for kind in (ReversibleSequence, StoredSequence):
        around = _checkpointed if kind is ReversibleSequence else lambda module, x: module(x)

        def inner(seed: int, kind=kind) -> nn.Module:
            return kind(build([(with_dropout(Mlp), Mlp)] * 2, 8, seed=seed))

        middle = [kind([(Around(inner(i), around), inner(i + 10))] * 1) for i in range(2)]
        net = kind([(middle[0], inner(20)), (inner(21), middle[1])])
        x = randn(2, 3, 8, requires_grad=True)
        torch.manual_seed(0)
        weighted(net(x)).backward()
        found.append({"x": x.grad, **gradients_of(net)})
    assert_same_gradients(*found, tolerance=1e-11)


def test_two_sequences_in_a_row_and_other_layers_between():
    found = []
    for kind in (ReversibleSequence, StoredSequence):
        first, second = (kind(build([(with_dropout(Mlp), Mlp)] * 3, 8, seed=i)) for i in range(2))
        between = build([(Linear, Linear)], 8, seed=5)[0][0]
        x = randn(2, 6, 8, requires_grad=True)
        torch.manual_seed(0)
        hidden = first(x)
        weighted(second(between(hidden).tanh()) + hidden).backward()
        found.append(
            {
                "x": x.grad,
                **gradients_of(first),
                **{f"2 {k}": v for k, v in gradients_of(second).items()},
            }
        )
    assert_same_gradients(*found)


def test_blocks_alone_in_a_row():
    pairs = build([(with_dropout(Mlp), Mlp)] * 3, 8)
    blocks, oracle = [ReversibleBlock(f, g) for f, g in pairs], stored_copy(pairs)
    found = []
    for module in (blocks, oracle):
        x1, x2 = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, seed=2, requires_grad=True)
        torch.manual_seed(0)
        if module is oracle:
            y1, y2 = module.run(x1, x2)
        else:
            y1, y2 = functools.reduce(lambda streams, block: block(*streams), blocks, (x1, x2))
        weighted(y1, y2).backward()
        found.append({"x1": x1.grad, "x2": x2.grad})
    assert_same_gradients(*found)


def test_a_sequence_that_reads_the_hidden_state_of_another_as_keyword():
    """An encoder's output, itself rebuilt in backward, routed to every branch of a decoder."""
    found = []
    for kind in (ReversibleSequence, StoredSequence):

        class Cross(Linear):
            def forward(self, x: Tensor, context: Tensor) -> Tensor:
                return super().forward(x * context.mean(1, keepdim=True)).tanh()

        encoder = kind(build([(with_dropout(Mlp), Mlp)] * 3, 8))
        decoder = kind(build([(Cross, Mlp)] * 3, 8, seed=1), {"context": ((True, False),) * 3})
        source, target = (
            randn(2, 5, 8, requires_grad=True),
            randn(2, 6, 8, seed=2, requires_grad=True),
        )
        torch.manual_seed(0)
        weighted(decoder(target, context=encoder(source))).backward()
        found.append({"source": source.grad, "target": target.grad, **gradients_of(encoder)})
        found[-1] |= {f"decoder {name}": grad for name, grad in gradients_of(decoder).items()}
    assert_same_gradients(*found)


@pytest.mark.parametrize("case", NESTED, ids=str)
def test_anomaly_mode(case: Case):
    net, oracle = both(case)
    expected = train_step(oracle, case.input())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            actual = train_step(net, case.input())
    assert_same_step(actual, expected)


def test_anomaly_mode_finds_the_nan_of_a_branch():
    class Nan(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 0).sqrt()

    net = ReversibleSequence(build([(Mlp, Nan)] * 2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            torch.autograd.detect_anomaly(),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            net(randn(2, 6, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", NESTED, ids=str)
def test_modes_without_gradients(case: Case, training: bool, mode: Callable):
    net, oracle = both(case)
    net.train(training)
    oracle.train(training)
    found = []
    for module in (net, oracle):
        torch.manual_seed(0)
        with mode():
            out = module(case.input())
        assert not out.requires_grad
        assert out.is_inference() == (mode is torch.inference_mode)
        found.append(
            {"out": out.clone(), "rng": torch.get_rng_state(), **dict(module.named_buffers())}
        )
    assert_same_gradients(*found)
    net.train()
    oracle.train()
    assert_same_step(train_step(net, case.input()), train_step(oracle, case.input()))


def test_gradients_switched_on_inside_no_grad_and_off_inside_a_step():
    case = named("mlp-L8-dropout")[0]
    net, oracle = both(case)

    def run(module: nn.Module) -> Results:
        x = case.input()
        with torch.no_grad(), torch.enable_grad():
            loss = weighted(module(x))
        with torch.no_grad():
            loss.backward()
        return {"x": x.grad}

    assert_alike(net, oracle, run)


def test_a_default_dtype_or_device_set_in_between_changes_nothing():
    case = named("attention-L8-dropout")[0]
    net, oracle = both(case)
    expected = train_step(oracle, case.input())
    torch.manual_seed(0)
    loss = weighted(net(x := case.input()))
    torch.set_default_dtype(torch.float16)
    try:
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_near(x.grad, expected.gradients["x"])
