"""Memory, to the byte: what stays does not depend on depth, and nothing stays for longer than it
must.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cases import (
    Attention,
    Case,
    Convolution,
    Gate,
    Linear,
    Mlp,
    Modulated,
    SavesNothing,
    build,
    every,
    named,
    normed,
    randn,
    with_dropout,
)
from oracle import stored_copy, weighted
from revnet import ReversibleSequence, measure_memory

DEPTHS = (4, 16, 64)
RNG_STATE = torch.get_rng_state().nbytes

pytestmark = pytest.mark.usefixtures("no_collector")


def kept(net: nn.Module, x: Tensor, **given: object) -> int:
    """Returns the bytes kept for backward, and leaves gradients as they are."""
    return measure_memory(lambda: net(x, **given)).saved_bytes


def test_the_state_of_the_cpu_generator_has_the_size_that_is_counted_below():
    assert RNG_STATE == 5056


QUIET: dict[str, tuple[Callable, Callable]] = {
    "linear": (Linear, Linear),
    "mlp": (Mlp, Mlp),
    "attention": (Attention, Mlp),
    "gate": (Gate, SavesNothing),
}


@pytest.mark.parametrize("needs", [True, False], ids=["x-grad", "x-none"])
@pytest.mark.parametrize(
    "options", [{}, {"merge": "sum"}, {"split": "chunk", "merge": "concat"}], ids=str
)
@pytest.mark.parametrize("makers", QUIET.values(), ids=QUIET)
def test_two_streams_are_kept_at_any_depth(makers: tuple, options: dict, needs: bool):
    x = randn(2, 6, 8, requires_grad=needs)
    chunked = options.get("split") == "chunk"
    depths = DEPTHS if needs and not options else DEPTHS[:2]
    pairs = build([makers] * max(depths), 4 if chunked else 8)
    for depth in depths:
        assert kept(ReversibleSequence(pairs[:depth], **options), x) == (
            x.nbytes if chunked else 2 * x.nbytes
        )


@pytest.mark.parametrize(
    "draws", [(True, True), (True, False), (False, True)], ids=["f-g", "f", "g"]
)
def test_and_one_generator_state_per_step_that_draws(draws: tuple[bool, bool]):
    x = randn(2, 6, 8, requires_grad=True)
    makers = tuple(with_dropout(Mlp) if drawn else Mlp for drawn in draws)
    pairs = build([makers] * max(DEPTHS), 8)
    for depth in DEPTHS:
        net = ReversibleSequence(pairs[:depth]).train()
        assert kept(net, x) == 2 * x.nbytes + depth * sum(draws) * RNG_STATE
        assert kept(net.eval(), x) == 2 * x.nbytes


def test_without_preserve_rng_state_no_generator_state_is_kept():
    x = randn(2, 6, 8, requires_grad=True)
    net = ReversibleSequence(build([(with_dropout(Mlp), Mlp)] * 4, 8), preserve_rng_state=False)
    assert kept(net, x) == 2 * x.nbytes


def test_what_is_kept_is_not_the_stored_loops():
    """The meter sees what stored execution keeps, so the figures above are not zero for want of
    looking.
    """
    pairs = build([(Mlp, Mlp)] * 4, 8)
    x = randn(2, 6, 8, requires_grad=True)
    net, oracle = ReversibleSequence(pairs, execution="store"), stored_copy(pairs)
    stored = measure_memory(lambda: oracle.run(x, x)).saved_bytes
    assert measure_memory(lambda: net.run(x, x)).saved_bytes == stored
    assert stored > 20 * x.nbytes


def test_images_keep_two_streams():
    x = randn(2, 6, 8, 8, requires_grad=True)
    for depth in DEPTHS[:2]:
        net = ReversibleSequence(
            build([(Convolution, Convolution)] * depth, 3), split="chunk", merge="concat", dim=1
        )
        assert kept(net, x) == x.nbytes


def test_buffers_that_a_step_changes_are_kept_as_they_were_before_it():
    x = randn(2, 6, 8, 8, requires_grad=True)
    net = ReversibleSequence(
        build([(normed, Convolution)] * 4, 3), split="chunk", merge="concat", dim=1
    )
    assert kept(net, x) == x.nbytes + sum(buffer.nbytes for buffer in net.buffers())
    assert kept(net.eval(), x) == x.nbytes


def test_keyword_tensors_are_not_copied():
    x, scale = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, seed=5, requires_grad=True)
    net = ReversibleSequence(
        build([(Modulated, Modulated)] * 8, 8), {"scale": every(8, True, True)}
    )
    assert kept(net, x, scale=scale) == 2 * x.nbytes


def test_run_keeps_no_more_than_it_returns():
    x1, x2 = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, seed=2, requires_grad=True)
    net = ReversibleSequence(build([(Mlp, Mlp)] * 8, 8))
    assert measure_memory(lambda: net.run(x1, x2)).saved_bytes == 0


def allocated_gradients(net: nn.Module) -> None:
    """Makes room for every gradient, so that what a step adds is activations alone."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)


def test_the_peak_through_backward_is_flat_in_depth():
    x = randn(8, 32, 8)
    peaks = []
    for depth in DEPTHS:
        net = ReversibleSequence(build([(Attention, Mlp)] * depth, 8))
        allocated_gradients(net)
        peaks.append(measure_memory(lambda net=net: net(x)).peak_bytes)
    assert max(peaks) <= 1.01 * min(peaks)
    # A peak that forgets the branch's own activations would be flat as well.
    assert min(peaks) > 4 * x.nbytes


def test_the_peak_with_dropout_grows_by_generator_states_alone():
    x = randn(8, 32, 8)
    peaks = []
    for depth in DEPTHS:
        net = ReversibleSequence(build([(with_dropout(Attention), Mlp)] * depth, 8))
        allocated_gradients(net)
        peaks.append(measure_memory(lambda net=net: net(x)).peak_bytes - depth * RNG_STATE)
    assert max(peaks) <= 1.01 * min(peaks)


class KeepsLoss(Mlp):
    """Leaves a loss of its own in an attribute, to be added by the training loop."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.loss = out.square().mean()
        self.losses = {"square": self.loss}
        return out


def test_the_peak_with_a_loss_in_an_attribute_grows_by_the_losses_alone():
    x = randn(8, 32, 8)
    peaks = []
    for depth in DEPTHS:
        net = ReversibleSequence(build([(KeepsLoss, KeepsLoss)] * depth, 8))
        allocated_gradients(net)
        branches = [branch for branch in net.modules() if isinstance(branch, KeepsLoss)]

        def step(net: nn.Module = net, branches: list[KeepsLoss] = branches) -> Tensor:
            return net(x).sum() + torch.stack([branch.loss for branch in branches]).sum()

        peaks.append(measure_memory(step).peak_bytes)
        assert all(branch.loss.grad_fn is not None for branch in branches)
    assert max(peaks) <= min(peaks) + 3 * 2 * max(DEPTHS) * x.itemsize


def test_the_peak_of_double_backward_is_not_what_is_promised_but_it_is_freed():
    net = ReversibleSequence(build([(Mlp, Mlp)] * 4, 8))
    allocated_gradients(net)

    def penalty() -> None:
        x = randn(2, 6, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(weighted(net(x)), x, create_graph=True)
        slope.square().sum().backward()

    penalty()
    gc.collect()
    assert measure_memory(penalty).saved_bytes == 0


def step(net: nn.Module, x: Tensor, **given: object) -> None:
    weighted(net(x, **given)).backward()


SEVERAL = named(
    "mlp-L8",
    "mlp-L8-dropout",
    "attention-L8-dropout",
    "modulated-L4-keywords",
    "convolution-L3-batchnorm",
    "mixed-L6",
    "shared-L4-dropout",
    "reads-saved-twice-L3",
)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_nothing_is_left_after_backward(case: Case):
    net = ReversibleSequence(case.pairs(), case.route, **case.options)
    x, given = case.input(requires_grad=False), {k: v.detach() for k, v in case.keywords().items()}
    allocated_gradients(net)
    assert measure_memory(lambda: step(net, x, **given)).saved_bytes == 0


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_nothing_is_left_after_backward_while_the_output_lives(case: Case):
    net = ReversibleSequence(case.pairs(), case.route, **case.options)
    x, given = case.input(requires_grad=False), {k: v.detach() for k, v in case.keywords().items()}
    allocated_gradients(net)

    def step_and_return() -> Tensor:
        out = net(x, **given)
        out.sum().backward()
        return out.detach()

    assert measure_memory(step_and_return).saved_bytes == 0


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_dropping_the_output_frees_everything(case: Case):
    net = ReversibleSequence(case.pairs(), case.route, **case.options)
    x, given = case.input(), case.keywords()

    def forward() -> None:
        net(x, **given)

    assert measure_memory(forward).saved_bytes == 0


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_dropping_the_output_after_a_partial_backward_frees_everything(case: Case):
    net = ReversibleSequence(case.pairs(), case.route, **case.options)
    x, given = case.input(), case.keywords()
    last = next(iter(net.blocks[-1].parameters()), x)

    def partial() -> None:
        loss = weighted(net(x, **given))
        torch.autograd.grad(loss, last, retain_graph=True)
        torch.autograd.grad(loss, x, retain_graph=True)

    partial()
    gc.collect()
    assert measure_memory(partial).saved_bytes == 0


def test_an_exception_in_a_replay_leaves_nothing():
    class Fails(Mlp):
        failing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.failing:
                raise ValueError
            return super().forward(x)

    net = ReversibleSequence(build([(Fails, Mlp)] * 4, 8))
    x = randn(2, 6, 8)
    allocated_gradients(net)

    def failing() -> None:
        loss = weighted(net(x))
        net.blocks[1].f.failing = True
        try:
            loss.backward()
        except ValueError as error:
            error.__traceback__ = None
        net.blocks[1].f.failing = False

    failing()
    gc.collect()
    assert measure_memory(failing).saved_bytes == 0


def test_a_retained_graph_keeps_what_it_kept_before():
    net = ReversibleSequence(build([(Mlp, Mlp)] * 8, 8))
    x = randn(2, 6, 8)
    allocated_gradients(net)

    def retained() -> Tensor:
        out = net(x)
        out.sum().backward(retain_graph=True)
        return out

    # The meter ends with a backward of its own on what is returned.
    assert measure_memory(retained).saved_bytes == 2 * x.nbytes


def test_activations_die_with_their_graph_and_not_with_the_collector():
    net = ReversibleSequence(build([(Mlp, with_dropout(Mlp))] * 4, 8))
    seen: list[weakref.ref] = []
    for block in net.blocks:
        for branch in (block.f, block.g):
            branch.enter.register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
    out = net(randn(2, 6, 8, requires_grad=True))
    assert len(seen) == 8
    assert not any(ref() is not None for ref in seen)
    weighted(out).backward()
    assert len(seen) == 16
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize(
    "case", named("mlp-L8-dropout", "convolution-L3-batchnorm", "modulated-L4-keywords"), ids=str
)
def test_five_hundred_steps_leak_nothing(case: Case):
    small = 2
    pairs = case.pairs()[:small]
    net = ReversibleSequence(pairs, {k: v[:small] for k, v in case.route.items()}, **case.options)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    x, given = case.input(requires_grad=False), {k: v.detach() for k, v in case.keywords().items()}

    def train(steps: int) -> None:
        for _ in range(steps):
            step(net, x, **given)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def tensors() -> int:
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    train(3)
    gc.collect()
    objects, before = len(gc.get_objects()), tensors()
    train(500)
    assert tensors() == before, (
        "the collector is off: a cycle that holds a tensor would have left hundreds"
    )
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert measure_memory(lambda: train(3)).saved_bytes == 0


def test_what_is_kept_is_kept_under_the_hooks_of_whoever_encloses_the_sequence():
    """So that offloading to host memory or disk, or an enclosing checkpoint, takes all of it."""
    net = ReversibleSequence(build([(Mlp, Mlp)] * 16, 8))
    x = randn(2, 6, 8)
    allocated_gradients(net)
    packed: list[int] = []

    def to_bytes(tensor: Tensor) -> object:
        if isinstance(tensor, nn.Parameter) or (
            tensor._base is not None and isinstance(tensor._base, nn.Parameter)
        ):
            return tensor
        packed.append(tensor.nbytes)
        return tensor.shape, tensor.detach().numpy().tobytes()

    def from_bytes(kept_: object) -> Tensor:
        if isinstance(kept_, Tensor):
            return kept_
        shape, data = kept_
        return torch.frombuffer(bytearray(data), dtype=torch.float64).view(shape)

    def forward() -> Tensor:
        with saved_tensors_hooks(to_bytes, from_bytes):
            return net(x)

    assert measure_memory(forward).saved_bytes == 0
    assert sum(packed) == 2 * x.nbytes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients_the_peak_is_the_plain_loops(training: bool, mode: object):
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 6, 8)
    net, oracle = ReversibleSequence(pairs).train(training), stored_copy(pairs).train(training)
    x = randn(4, 16, 8)
    with mode():
        report, plain = measure_memory(lambda: net(x)), measure_memory(lambda: oracle(x))
    assert report.saved_bytes == plain.saved_bytes == 0
    assert report.peak_bytes <= plain.peak_bytes


@pytest.mark.gpu
def test_memory_on_cuda_is_flat_in_depth():
    x = torch.randn(8, 256, 64, device="cuda")
    saved, peaks = [], []
    for depth in DEPTHS:
        net = ReversibleSequence(
            [
                (f.cuda(), g.cuda())
                for f, g in build([(with_dropout(Mlp), Mlp)] * depth, 64, dtype=torch.float32)
            ]
        )
        allocated_gradients(net)
        net(x).sum().backward()
        gc.collect()
        report = measure_memory(lambda net=net: net(x))
        saved.append(report.saved_bytes)
        peaks.append(report.peak_bytes)
    assert saved == [2 * x.nbytes] * len(DEPTHS)
    assert max(peaks) <= 1.01 * min(peaks)


@pytest.mark.gpu
def test_nothing_is_left_on_cuda_after_backward():
    net = ReversibleSequence(
        [
            (f.cuda(), g.cuda())
            for f, g in build([(with_dropout(Mlp), Mlp)] * 8, 64, dtype=torch.float32)
        ]
    )
    x = torch.randn(8, 256, 64, device="cuda")
    allocated_gradients(net)
    step(net, x)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step(net, x)
        net(x)
    assert torch.cuda.memory_allocated() == before
