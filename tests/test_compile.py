"""torch.compile around a sequence is right, traced or broken at it; torch.export takes the plain
loop.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cases import Attention, Linear, Mlp, build, randn
from oracle import (
    OperationLog,
    assert_near,
    assert_same_gradients,
    gradients_of,
    stored_copy,
    weighted,
)
from revnet import Additive, Fixed, Momentum, Reversible, ReversibleSequence, Step

# torch.compile itself reads the .grad of whatever crosses a graph break, and makes Function
# objects, in any model.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Model(nn.Module):
    """Layers around a sequence, as in any real model."""

    def __init__(self, body: nn.Module, seed: int = 5) -> None:
        super().__init__()
        (self.enter, self.leave) = build([(Linear, Linear)], 8, seed=seed)[0]
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.body(self.enter(x).tanh()))


def models(makers: list) -> tuple[Model, Model]:
    pairs = build(makers, 8)
    return Model(ReversibleSequence(pairs, merge="sum")), Model(stored_copy(pairs, merge="sum"))


def test_branches_compiled_for_any_length_are_not_compiled_again():
    pairs = build([(Attention, Mlp)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    for block in net.blocks:
        block.f.compile(backend="aot_eager", dynamic=True)
        block.g.compile(backend="aot_eager", dynamic=True)
    before = counters["stats"]["unique_graphs"]
    for length in range(4, 16):
        found = []
        for module in (net, oracle):
            module.zero_grad()
            x = randn(2, length, 8, seed=length, requires_grad=True)
            weighted(module(x)).backward()
            found.append({"x": x.grad, **gradients_of(module)})
        assert_same_gradients(*found)
    assert counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_gradients_of_the_plain_one(backend: str):
    model, oracle = models([(Attention, Mlp)] * 3)
    compiled = torch.compile(model, backend=backend)
    for seed in range(3):
        found = []
        for module, call in ((model, compiled), (oracle, oracle)):
            module.zero_grad()
            x = randn(2, 6, 8, seed=seed, requires_grad=True)
            out = call(x)
            weighted(out).backward()
            found.append({"x": x.grad, "out": out.detach(), **gradients_of(module)})
        assert_same_gradients(*found)


def test_a_compiled_sequence_and_compiled_branches_are_right():
    pairs = build([(Mlp, Mlp)] * 2, 8)
    oracle = stored_copy(pairs)
    x, expected = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, requires_grad=True)
    weighted(oracle(expected)).backward()
    net = ReversibleSequence(pairs)
    for call in (torch.compile(net, backend="aot_eager"), net):
        net.zero_grad()
        x.grad = None
        weighted(call(x)).backward()
        assert_near(x.grad, expected.grad)
        assert_same_gradients(gradients_of(net), gradients_of(oracle))
        for block in net.blocks:
            block.f.compile(backend="aot_eager")


def test_what_a_compiled_model_keeps_does_not_grow_with_depth():
    """The activations inside the sequence are still rebuilt: each branch runs again in backward."""
    model, _ = models([(Mlp, Mlp)] * 3)
    compiled = torch.compile(model, backend="aot_eager")
    times: list[int] = []
    for block in model.body.blocks:
        block.f.register_forward_hook(lambda *_: times.append(1))
    loss = weighted(compiled(randn(2, 6, 8, requires_grad=True)))
    assert len(times) == 3
    loss.backward()
    assert len(times) == 6


def _without_gradients(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad(), OperationLog() as log:
        model(x)
    return log.names


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_takes_the_plain_loop(strict: bool, training: bool):
    model, oracle = models([(Attention, Mlp)] * 3)
    model.train(training)
    oracle.train(training)
    x = randn(2, 6, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=strict)
        plain = torch.export.export(oracle, (x,), strict=strict)
        assert_near(exported.module()(x), oracle(x))

    def calls(program: torch.export.ExportedProgram) -> list[str]:
        # The oracle casts also where there is nothing to cast.
        casts = ("aten.to.dtype", "aten._assert_tensor_metadata.default")
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        return [name for name in names if name not in casts]

    assert calls(exported) == calls(plain)


def test_export_with_gradients_enabled_takes_the_plain_loop_too():
    model, oracle = models([(Mlp, Mlp)] * 2)
    x = randn(2, 6, 8)
    exported = torch.export.export(model.eval(), (x,))
    assert_near(exported.module()(x), oracle.eval()(x))


def test_export_with_a_dynamic_batch():
    model, oracle = models([(Mlp, Mlp)] * 2)
    with torch.no_grad():
        exported = torch.export.export(
            model, (randn(2, 6, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        x = randn(5, 6, 8, seed=2)
        assert_near(exported.module()(x), oracle(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_program_of_fixed_streams_can_be_trained(strict: bool):
    couplings = [Additive(), Momentum(0.9)] * 2
    steps = [Step(nn.Linear(8, 8).double(), i % 2, (i + 1) % 2, c) for i, c in enumerate(couplings)]
    net, x = Reversible(steps, streams=Fixed(37)), randn(2, 8, requires_grad=True)
    exported = torch.export.export(net, (x.detach(), x.detach()), strict=strict).module()
    expected, found = weighted(*net(x, x)), weighted(*exported(x, x))
    assert torch.equal(found, expected)
    parameters = [dict(net.named_parameters())[name] for name, _ in exported.named_parameters()]
    gradients = torch.autograd.grad(found, [x, *exported.parameters()])
    for actual, wanted in zip(
        gradients, torch.autograd.grad(expected, [x, *parameters]), strict=True
    ):
        assert_near(actual, wanted)


@pytest.mark.parametrize("execution", ["store", "invert"])
def test_hooks_on_a_block_run_where_nothing_is_evaluated_again(execution: str):
    net = ReversibleSequence(
        [(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)], execution=execution
    )
    net.blocks[0].register_forward_hook(lambda block, args, out: tuple(2 * y for y in out))
    x = torch.randn(2, 4)
    with torch.set_grad_enabled(execution == "store"):
        torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))


def test_hooks_for_backward_on_a_block_run_where_nothing_is_evaluated_again():
    net = ReversibleSequence(
        [(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)], execution="store"
    )
    net.blocks[0].register_full_backward_hook(lambda block, grads, _: (2 * grads[0], *grads[1:]))
    x, found = torch.randn(2, 4), []
    for run in (net, torch.compile(net, backend="eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
