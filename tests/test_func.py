"""torch.func transforms through sequences: by the traced operation, or by the plain loop where that
cannot be right.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import cases
import oracle
import revnet
from revnet._compiled import function as _traced
from revnet._compiled import purity as _inspect

# torch's own, from tracing any Function and any tensor with a history.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]

WIDTH = 6
STREAMS = [
    pytest.param("float", 1e-12, id="float"),
    pytest.param(revnet.Fixed(37), 1e-10, id="fixed"),
]


def networks(
    branch: Callable[[int], nn.Module] = cases.Mlp, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Returns a sequence and the stored loop over copies of its branches."""
    pairs = [(branch(WIDTH).double(), branch(WIDTH).double()) for _ in range(3)]
    stored = oracle.stored_copy(pairs, options.get("args_route"))
    return revnet.ReversibleSequence(pairs, **options), stored


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, WIDTH, dtype=torch.float64)


def loss_of(net: nn.Module) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, **given: Any) -> Tensor:
        return functional_call(net, parameters, (x,), given).sin().sum()

    return loss


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def assert_near(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for actual, wanted in zip(
        torch.utils._pytree.tree_leaves(found),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        oracle.assert_near(actual, wanted, tolerance=tolerance)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per pass that the traced operation took."""
    taken: list[int] = []
    reversibly = _traced._reversibly

    def counted(parts: Any, *rest: Any) -> Any:
        taken.append(len(parts))
        return reversibly(parts, *rest)

    monkeypatch.setattr(_traced, "_reversibly", counted)
    return taken


@pytest.mark.parametrize(("streams", "tolerance"), STREAMS)
def test_gradients_of_parameters_and_input(
    streams: Any, tolerance: float, walks: list[int]
) -> None:
    net, stored = networks(streams=streams)
    x = tokens()
    for argnums in (0, 1):
        found = grad(loss_of(net), argnums)(parameters_of(net), x)
        assert_near(found, grad(loss_of(stored), argnums)(parameters_of(stored), x), tolerance)
    assert walks == [6, 6]


@pytest.mark.parametrize(("streams", "tolerance"), STREAMS)
def test_gradients_per_sample(streams: Any, tolerance: float, walks: list[int]) -> None:
    net, stored = networks(streams=streams)
    x = tokens()
    found = vmap(grad(loss_of(net)), (None, 0))(parameters_of(net), x)
    assert_near(found, vmap(grad(loss_of(stored)), (None, 0))(parameters_of(stored), x), tolerance)
    assert walks == [6]


def test_an_ensemble(walks: list[int]) -> None:
    found, expected = [], []
    for results, one, two in ((found, *[networks()[0] for _ in range(2)]),):
        stacked = {
            name: torch.stack([p.detach(), dict(two.named_parameters())[name].detach()])
            for name, p in one.named_parameters()
        }
        x = tokens()
        results.append(vmap(grad(loss_of(one)), (0, None))(stacked, x))
        expected.append(
            {
                name: torch.stack(
                    [grad(loss_of(net))(parameters_of(net), x)[name] for net in (one, two)]
                )
                for name in stacked
            }
        )
    assert_near(found, expected)
    assert 6 in walks


@pytest.mark.parametrize(("streams", "tolerance"), STREAMS)
def test_vjp_and_jacrev(streams: Any, tolerance: float, walks: list[int]) -> None:
    net, stored = networks(streams=streams)
    x, pull = tokens(1), tokens(1)
    assert_near(vjp(net, x)[1](pull), vjp(stored, x)[1](pull), tolerance)
    assert_near(jacrev(net)(x), jacrev(stored)(x), tolerance)
    assert walks


@pytest.mark.parametrize(("streams", "tolerance"), STREAMS)
def test_gradients_of_gradients(streams: Any, tolerance: float) -> None:
    net, stored = networks(streams=streams)
    x = tokens(1)

    def penalty(of: nn.Module) -> Callable[..., Tensor]:
        return lambda parameters, x: grad(loss_of(of), 1)(parameters, x).square().sum()

    found = grad(penalty(net))(parameters_of(net), x)
    assert_near(found, grad(penalty(stored))(parameters_of(stored), x), tolerance)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own rules for jvp
def test_forward_mode_and_hessian() -> None:
    net, stored = networks(cases.Gate)
    x, tangent = tokens(1), tokens(1)
    assert_near(jvp(net, (x,), (tangent,)), jvp(stored, (x,), (tangent,)))
    assert_near(jacfwd(net)(x), jacfwd(stored)(x))
    assert_near(
        hessian(loss_of(net), 1)(parameters_of(net), x),
        hessian(loss_of(stored), 1)(parameters_of(stored), x),
    )


def test_keyword_tensors_and_shared_modules() -> None:
    f, g = (cases.Modulated(WIDTH).double() for _ in range(2))
    route = {"scale": ((True, False), (True, True)), "shift": ((True, True),) * 2}
    pairs = [(f, g), (g, f)]
    net, stored = revnet.ReversibleSequence(pairs, route), oracle.stored_copy(pairs, route)
    x, scale, shift = (
        tokens(),
        torch.randn(WIDTH, dtype=torch.float64),
        torch.randn(4, WIDTH, dtype=torch.float64),
    )

    def gradients(of: nn.Module) -> Any:
        def loss(parameters: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return loss_of(of)(parameters, x, scale=scale, shift=shift)

        return grad(loss, (0, 1, 2, 3))(parameters_of(of), x, scale, shift)

    assert_near(gradients(net), gradients(stored))


@pytest.mark.parametrize("kind", ["block", "steps", "sequential"])
def test_everything_that_runs_steps(kind: str) -> None:
    f, g = (cases.Mlp(WIDTH).double() for _ in range(2))
    net: nn.Module = {
        "block": lambda: revnet.ReversibleBlock(f, g),
        "steps": lambda: revnet.Reversible([revnet.Step(f, 0, 1), revnet.Step(g, 1, 0)]),
        "sequential": lambda: revnet.SequentialSequence([(f, g)]),
    }[kind]()
    x = tokens()

    def total(x: Tensor) -> Tensor:
        outputs = net(x) if kind == "sequential" else net(x, 2 * x)
        return oracle.weighted(*(outputs if isinstance(outputs, tuple) else (outputs,)))

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    assert_near(grad(total)(x), expected)


def test_dropout_repeats_its_mask(walks: list[int]) -> None:
    net, stored = networks(cases.with_dropout(cases.Mlp))
    x, results = tokens(), []
    for of in (net, stored):
        torch.manual_seed(0)
        results.append(grad(loss_of(of))(parameters_of(of), x))
    assert_near(*results)
    assert not walks, "what draws random numbers is no operation that is evaluated twice"


@pytest.mark.parametrize("change", ["rate", "child", "flag"])
def test_a_branch_that_begins_to_draw_after_it_was_inspected(change: str, walks: list[int]) -> None:
    class Late(cases.Mlp):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.drop: nn.Module = nn.Identity() if change == "child" else nn.Dropout(0.0)
            self.noisy = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(super().forward(x))
            return nn.functional.dropout(y) if self.noisy else y

    net, stored = networks(Late)
    x, results = tokens(), []
    assert_near(
        grad(loss_of(net))(parameters_of(net), x), grad(loss_of(stored))(parameters_of(stored), x)
    )
    assert walks
    for of in (net, stored):
        for branch in [module for module in of.modules() if isinstance(module, Late)]:
            branch.noisy = change == "flag"
            branch.drop = nn.Dropout(0.5 if change != "flag" else 0.0)
        torch.manual_seed(0)
        results.append(grad(loss_of(of))(parameters_of(of), x))
    assert_near(*results)


@pytest.mark.parametrize("extra", [False, True])
def test_streams_that_are_trees(extra: bool) -> None:
    class OnTrees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH).double()

        def forward(self, tree: dict[str, Tensor]) -> Any:
            update = {"a": self.linear(tree["a"]).tanh()}
            return (update, tree["a"].sum()) if extra else update

    net = revnet.Reversible([revnet.Step(OnTrees(), i % 2, (i + 1) % 2) for i in range(4)])

    def loss(x: Tensor) -> Tensor:
        y1, y2, *aux = net({"a": x}, {"a": 2 * x})
        return oracle.weighted(y1["a"], y2["a"], *(aux[0].values() if extra else ()))

    x = tokens()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_near(grad(loss)(x), expected)


def test_statistics_move_once() -> None:
    class Normed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    net, stored = networks(Normed)
    x, results = tokens(), []
    for of in (net, stored):
        state = {
            name: value.detach().clone()
            for name, value in (*of.named_parameters(), *of.named_buffers())
        }
        results.append((grad(loss_of(of), 1)(state, x), state))
    assert_near(*results)


def test_inspection_leaves_a_branch_as_it_was() -> None:
    class Remembering(cases.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return super().forward(x)

    net, stored = networks(Remembering)
    x = tokens()
    assert_near(
        grad(loss_of(net), 1)(parameters_of(net), x),
        grad(loss_of(stored), 1)(parameters_of(stored), x),
    )
    assert all(not isinstance(block.f.last, FakeTensor) for block in net.blocks)


def test_autocast_of_the_forward_is_the_autocast_of_the_replay() -> None:
    net = revnet.ReversibleSequence(
        [(cases.Mlp(WIDTH), cases.Mlp(WIDTH)) for _ in range(2)], streams="float"
    )
    x = torch.randn(3, 4, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        y, pull = vjp(net, x)
    expected = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(expected)
    out.backward(torch.ones_like(out))
    assert torch.equal(y, out)
    assert oracle.relative_error(pull(torch.ones_like(y))[0], expected.grad) < 1e-6


def test_memory_does_not_grow_with_depth() -> None:
    def peak(depth: int) -> float:
        net = revnet.ReversibleSequence(
            [(cases.Mlp(16), cases.Mlp(16)) for _ in range(depth)], streams="float"
        )
        x, parameters = torch.randn(32, 64, 16), parameters_of(net)
        gradient = grad(loss_of(net))
        gradient(parameters, x)
        gradients = sum(p.numel() * p.element_size() for p in parameters.values())
        report = revnet.measure_memory(lambda: list(gradient(parameters, x).values()))
        return (report.peak_bytes - gradients) / (x.numel() * x.element_size())

    peaks = [peak(depth) for depth in (2, 4, 8)]
    assert max(peaks) < 1.02 * min(peaks)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).tanh())


@pytest.mark.parametrize("how", ["transformed", "compiled"])
def test_a_module_under_two_names_keeps_its_parameters(how: str, walks: list[int]) -> None:
    net, stored = networks(Twice)
    x, parameters, results = tokens().requires_grad_(), list(net.parameters()), []
    for of in (net, stored):
        call = (
            torch.compile(of, fullgraph=True, backend="aot_eager")
            if how == "compiled" and of is net
            else of
        )
        if how == "compiled":
            results.append(torch.autograd.grad(call(x).sin().sum(), [x, *of.parameters()]))
        else:
            results.append(grad(lambda x, call=call: call(x).sin().sum())(x.detach()))
    assert_near(*results)
    assert walks == [6] or how == "compiled"
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))


class Pair(NamedTuple):
    scale: Tensor
    shift: Tensor


class Couple(tuple):
    """A tuple that pytrees do not know."""


class Many(list):
    """A list that pytrees do not know."""


class Table(dict):
    """A dict that cannot be made without its name."""

    def __init__(self, name: str, **items: Tensor) -> None:
        super().__init__(**items)
        self.name = name


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "namedtuple": Pair,
    "OrderedDict": lambda scale, shift: OrderedDict(scale=scale, shift=shift),
    "defaultdict": lambda scale, shift: defaultdict(list, scale=scale, shift=shift),
    "deque": lambda *pair: deque(pair),
    "tuple": lambda *pair: Couple(pair),
    "list": lambda *pair: Many(pair),
    "dict": lambda scale, shift: Table("pair", scale=scale, shift=shift),
}


class Conditioned(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor, given: Any) -> Tensor:
        scale, shift = given.values() if isinstance(given, dict) else given
        return super().forward(x).tanh() * scale + shift


@pytest.mark.parametrize("how", ["transformed", "compiled"])
@pytest.mark.parametrize("pack", CONTAINERS.values(), ids=CONTAINERS)
def test_tensors_in_containers_of_other_types_have_their_gradients(pack: Any, how: str) -> None:
    net, stored = networks(Conditioned, args_route={"given": ((True, True),) * 3})
    tensors = [torch.randn(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x, results = tokens(), []
    for of in (net, stored):
        if how == "compiled":
            call = torch.compile(of, backend="aot_eager") if of is net else of
            results.append(torch.autograd.grad(call(x, given=pack(*tensors)).sin().sum(), tensors))
        else:
            loss = lambda *given, of=of: of(x, given=pack(*given)).sin().sum()  # noqa: E731
            results.append(grad(loss, (0, 1))(*[tensor.detach() for tensor in tensors]))
    assert_near(*results)


class Settings:
    def __init__(self, rate: float) -> None:
        self.rate = rate


def test_a_branch_whose_configuration_stays_is_looked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, _ = networks(cases.Mlp)
    for module in net.modules():
        module.config = {"settings": Settings(0.5), "shapes": [(1, 2)]}
    looks = []
    run = _inspect._run
    monkeypatch.setattr(_inspect, "_run", lambda fn, *given: looks.append(fn) or run(fn, *given))
    for _ in range(3):
        grad(loss_of(net))(parameters_of(net), tokens())
    assert len(looks) == len(set(looks)) > 0


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, "transformed") for kind in (dict, SimpleNamespace, Settings)),
        (SimpleNamespace, "compiled"),
    ],
)
def test_a_rate_in_a_configuration_may_be_raised(kind: Any, how: str) -> None:
    class Configured(cases.Mlp):
        config: Any = None

        def forward(self, x: Tensor) -> Tensor:
            rate = self.config["rate"] if kind is dict else self.config.rate
            return nn.functional.dropout(super().forward(x), rate)

    net, stored = networks(Configured)
    config, x = kind(rate=0.0), tokens().requires_grad_()
    for branch in (
        module for of in (net, stored) for module in of.modules() if isinstance(module, Configured)
    ):
        branch.config = config
    for rate in (0.0, 0.5):
        (config if kind is dict else vars(config))["rate"] = rate
        results = []
        for of in (net, stored):
            torch.manual_seed(0)
            if how == "transformed":
                results.append(grad(loss_of(of))(parameters_of(of), x.detach()))
            else:
                call = torch.compile(of, backend="aot_eager") if of is net else of
                results.append(torch.autograd.grad(call(x).sin().sum(), [x, *of.parameters()]))
        assert_near(*results)


class Scaled(nn.Linear):
    """Reads a tensor that is no parameter and no buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.scale = torch.ones(width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.cat(
                [super().forward(x).tanh()[..., 1:], self.scale[:1].expand(*x.shape[:-1], 1)], -1
            )
            * self.scale
        )


def scale_branches(net: nn.Module, scale: Tensor) -> None:
    for branch in (module for module in net.modules() if isinstance(module, Scaled)):
        branch.scale = scale


def test_a_tensor_attribute_has_its_gradient() -> None:
    net, stored = networks(Scaled)
    x, scale = tokens(), torch.randn(WIDTH, dtype=torch.float64)

    def gradients(of: nn.Module) -> Any:
        def loss(scale: Tensor, x: Tensor) -> Tensor:
            scale_branches(of, scale)
            return of(x).sin().sum()

        return grad(loss, (0, 1))(scale, x)

    assert_near(gradients(net), gradients(stored))


def test_a_tensor_attribute_may_be_replaced_before_the_pull() -> None:
    x, results = tokens(), []
    for of in networks(Scaled):
        scale_branches(of, torch.linspace(0, 1, WIDTH, dtype=torch.float64))
        y, pull = vjp(of, x)
        scale_branches(of, torch.ones(WIDTH, dtype=torch.float64))
        results.append(pull(y.cos()))
    assert_near(*results)


def test_an_inspection_is_the_matter_of_its_thread(walks: list[int]) -> None:
    inspected, ended = threading.Event(), threading.Event()

    class Slow(cases.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, FakeTensor) and not inspected.is_set():
                inspected.set()
                ended.wait(60)
            return super().forward(x)

    slow, (other, _) = networks(Slow)[0], networks()
    thread = threading.Thread(target=lambda: grad(loss_of(slow))(parameters_of(slow), tokens()))
    thread.start()
    assert inspected.wait(60)
    evaluated: list[int] = []
    other.blocks[0].f.register_forward_hook(lambda *_: evaluated.append(1))
    other(tokens().requires_grad_()).sum().backward()
    ended.set()
    thread.join()
    assert len(evaluated) == 2, "another thread's sequence keeps nothing"
    assert walks == [6], "and is none in the branch"


def test_a_switch_to_training_before_the_pull_raises() -> None:
    net, _ = networks(cases.with_dropout(cases.Mlp))
    net.eval()
    y, pull = vjp(net, tokens())
    net.train()
    with pytest.raises(revnet.ReversibleError, match="switched between training and evaluation"):
        pull(y)
    net.eval()
    pull(y)


def exported(net: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(net, (x,)).module()(x)


@pytest.mark.parametrize("execution", ["store", "invert"])
@pytest.mark.parametrize(
    "run",
    [lambda net, x: vmap(net)(x), lambda net, x: grad(lambda x: net(x).sum())(x), exported],
    ids=["vmap", "grad", "export"],
)
def test_hooks_on_blocks_are_refused_where_they_would_not_run(
    run: Callable[..., Any], execution: str
) -> None:
    net, _ = networks(cases.Mlp)
    net.execution = execution
    for register, hook in (
        (net.blocks[1].register_forward_hook, lambda block, args, out: (out[0].tanh(), out[1])),
        (net.blocks[1].register_full_backward_hook, lambda block, grads, _: grads),
    ):
        handle = register(hook)
        with pytest.raises(revnet.ReversibleError, match="a block has hooks"):
            run(net, tokens())
        handle.remove()
    run(net, tokens())


@pytest.mark.parametrize("converted", [False, True])
def test_weights_of_a_functional_call_are_freed_with_it(converted: bool) -> None:
    pairs = [(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    net: nn.Module = revnet.ReversibleSequence(pairs)
    x = torch.randn(2, 4)
    if converted:
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        net, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 3, 4)
        revnet.convert(net)
        net(x)
    weights = {name: 2 * each.detach() for name, each in net.named_parameters()}
    for each in weights.values():
        each.requires_grad_()
    alive = [weakref.ref(each) for each in weights.values()]
    functional_call(net, weights, (x,)).sum().backward()
    del weights, each
    assert not any(reference() is not None for reference in alive)
