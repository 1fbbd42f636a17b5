"""Keywords find the branches that take them, and errors say which did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import assert_same_gradients, leaf, weighted
from revnet import (
    Deterministic,
    Reversible,
    ReversibleBlock,
    ReversibleSequence,
    SequentialSequence,
    Step,
    route_args,
)

DEPTH = 3
IN_A_GRAPH = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Scaled(nn.Linear):
    """Takes two keywords, one of which it needs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        x = super().forward(x).sin() * scale
        return x if shift is None else x + shift


class Shifted(nn.Linear):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor, *, shift: Tensor | None = None, causal: bool = False) -> Tensor:
        x = super().forward(x)
        return (x.cumsum(0) if causal else x) if shift is None else x * shift


class Anything(nn.Linear):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width, width)
        self.names: list[str] = []

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert sorted(kwargs) == self.names
        return super().forward(x)


class ByPosition(nn.Linear):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor, scale: Tensor, /) -> Tensor:
        return super().forward(x) * scale


def blocks(f: Callable[[], nn.Module] = Scaled, g: Callable[[], nn.Module] = Shifted) -> Any:
    torch.manual_seed(0)
    return [(f(), g()) for _ in range(DEPTH)]


def given() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(8).requires_grad_() for name in ("scale", "shift")}


def x() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 8).requires_grad_()


def results(run: Callable[..., Tensor], net: nn.Module, **keywords: Tensor) -> dict[str, Any]:
    """Return the output and all gradients of a call."""
    net.zero_grad()
    stream, keywords = x(), {name: leaf(value) for name, value in keywords.items()}
    out = run(stream, **keywords)
    weighted(out).backward()
    found = {"out": out.detach(), "x": stream.grad}
    found |= {name: value.grad for name, value in keywords.items()}
    return found | {name: p.grad for name, p in net.named_parameters()}


def by_hand(pairs: Any, to_f: Any, to_g: Any, streams: int = 2) -> Callable[..., Tensor]:
    """Return a plain loop in which `to_f` and `to_g` make the keywords of each branch."""

    def run(x: Tensor, **keywords: Tensor) -> Tensor:
        x1 = x2 = x
        for f, g in pairs:
            if streams == 1:
                x1 = x1 + f(x1, **to_f(**keywords))
                x1 = x1 + g(x1, **to_g(**keywords))
                continue
            x1 = x1 + f(x2, **to_f(**keywords))
            x2 = x2 + g(x1, **to_g(**keywords))
        return x1 if streams == 1 else (x1 + x2) / 2

    return run


BOTH: Any = [ReversibleSequence, SequentialSequence]
ROUTES: dict[str, Any] = {
    "pairs": {"scale": ((True, False),) * DEPTH, "shift": ((True, True),) * DEPTH},
    "one-pair": {"scale": (True, False), "shift": (True, True)},
    "signature": "signature",
    "of-one-keyword": {"scale": (True, False), "shift": "signature"},
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_all_ways_to_write_a_route_do_the_same(route: Any, kind: Any):
    pairs = blocks()
    net = kind(pairs, route)
    expected = by_hand(
        pairs, lambda **kw: kw, lambda shift, **_: {"shift": shift}, 2 - BOTH.index(kind)
    )
    found, right = results(net, net, **given()), results(expected, net, **given())
    assert_same_gradients(found, right, tolerance=1e-5)


def test_a_route_may_name_the_keyword_of_the_branch():
    pairs = blocks()
    net = ReversibleSequence(pairs, {"gain": ("scale", "shift"), "add": ("shift", False)})
    keywords = dict(zip(("gain", "add"), given().values(), strict=True))
    expected = by_hand(
        pairs, lambda gain, add: {"scale": gain, "shift": add}, lambda gain, add: {"shift": gain}
    )
    found, right = results(net, net, **keywords), results(expected, net, **keywords)
    assert_same_gradients(found, right, tolerance=1e-5)
    assert (
        route_args({"gain": ("scale", False)}, {"gain": 1, "lost": 2}, 2)
        == [({"scale": 1}, {})] * 2
    )


def test_two_keywords_for_one_parameter_raise():
    net = ReversibleSequence(blocks(), {"gain": ("scale", False), "scale": (True, False)})
    with pytest.raises(TypeError, match="a branch gets 'scale' twice"):
        net(x(), gain=1.0, scale=2.0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pair_for_all_blocks_is_told_from_a_pair_for_each(depth: int):
    assert route_args({"a": (True, False)}, {"a": 0}, depth) == [({"a": 0}, {})] * depth
    assert route_args({"a": [[0, 1]] * depth}, {"a": 0}, depth) == [({}, {"a": 0})] * depth


@pytest.mark.parametrize(
    ("route", "match"),
    [
        ("signatures", r"args_route is 'signatures', which is not 'signature'"),
        ({"a": "all"}, r"args_route\['a'\] is 'all', which is not"),
        ({"a": True}, r"args_route\['a'\] is True: give a pair \(to_f, to_g\)"),
        ({"a": (True,)}, r"has 1 pairs for 3 blocks.*a=\(True, False\)"),
        ({"a": (True, (True, False), True)}, r"args_route\['a'\]\[0\] is True"),
        ({"taps": (True, False)}, r"args_route\['taps'\]: `taps` is a parameter of"),
    ],
)
def test_a_wrong_route_is_named(route: Any, match: str):
    with pytest.raises(ValueError, match=match):
        ReversibleSequence(blocks(), route)
    net = ReversibleSequence(blocks())
    net.args_route = route
    if "taps" not in route:
        with pytest.raises(ValueError, match=match):
            net(x(), a=1.0)


# --- by signature


def test_a_branch_with_any_keywords_gets_them_all():
    net = ReversibleSequence(blocks(Scaled, Anything), "signature")
    for _, g in ((block.f, block.g) for block in net):
        g.names = ["other", "scale"]
    net(x(), scale=1.0, mask=None, other=2)


class Handed(nn.Module):
    """A wrapper as torch's are: it has one child and hands on what it gets."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap", [Deterministic, Handed, lambda f: Handed(Handed(f)), torch.compile]
)
def test_a_wrapper_counts_as_what_it_wraps(wrap: Callable[[nn.Module], nn.Module]):
    pairs = blocks()
    net = ReversibleSequence([(f, wrap(g)) for f, g in pairs], "signature")
    with torch.compiler.set_stance("force_eager"):
        expected = ReversibleSequence(pairs, ROUTES["pairs"])(x(), **given())
        assert torch.equal(net(x(), **given()), expected)


def test_a_keyword_that_no_branch_takes_raises():
    net = ReversibleSequence(blocks(), "signature")
    with pytest.raises(TypeError, match=r"no branch takes the keyword 'skale'"):
        net(x(), scale=1.0, skale=1.0)
    with pytest.raises(TypeError, match=r"no branch takes .*'use_cache': \(False, False\)"):
        net(x(), scale=1.0, use_cache=False)
    net(x(), scale=1.0, use_cache=None)


def test_what_is_positional_only_says_what_to_do():
    net = ReversibleSequence(blocks(ByPosition), "signature")
    with pytest.raises(TypeError, match=r"ByPosition.forward takes 'scale' by position.*Step"):
        net(x(), scale=1.0)


def test_the_stream_is_no_keyword():
    net = ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8))], "signature")
    with pytest.raises(TypeError, match="no branch takes the keyword 'input'"):
        net(x(), input=x())


@IN_A_GRAPH
def test_signatures_are_read_inside_a_graph():
    net = ReversibleSequence(blocks()[:1], "signature")
    expected = results(net, net, **given())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same_gradients(results(compiled, net, **given()), expected, tolerance=1e-5)


# --- falsy flags, and routes that change


@pytest.mark.parametrize("value", [False, 0, "", ()])
def test_a_flag_without_route_says_how_to_drop_it(value: Any):
    route = {"scale": (True, False)}
    net = ReversibleSequence(blocks(), route)
    with pytest.raises(TypeError, match=r"drop it by args_route={'use_cache': \(False, False\)}"):
        net(x(), scale=1.0, use_cache=value)
    dropped = ReversibleSequence(net, {**route, "use_cache": (False, False)})
    assert torch.equal(dropped(x(), scale=1.0, use_cache=value), net(x(), scale=1.0))
    by_signature = {"use_cache": (False, False), "scale": "signature"}
    dropped = ReversibleSequence(net, by_signature)
    assert torch.equal(dropped(x(), scale=1.0, use_cache=value), net(x(), scale=1.0))


def test_routes_of_the_next_call_are_those_of_the_attribute():
    pairs = blocks()
    net = ReversibleSequence(pairs, {"scale": (True, False)})
    out = net(x(), scale=given()["scale"])
    net.args_route = "signature"
    everywhere = net(x(), **given())
    net.args_route = {}
    for total, names in ((out, ["scale"]), (everywhere, ["scale", "shift"])):
        fresh = ReversibleSequence(pairs, "signature", execution="store")
        expected = results(fresh, fresh, **{name: given()[name] for name in names})
        net.zero_grad()
        weighted(total).backward()
        found = {name: p.grad for name, p in fresh.named_parameters()}
        assert_same_gradients(found, {name: expected[name] for name in found}, tolerance=1e-5)


# --- steps


def test_a_step_renames_takes_by_position_and_has_constants():
    torch.manual_seed(0)
    fns = [Scaled(), Shifted(), ByPosition(), Scaled()]
    steps = [
        Step(fns[0], kwargs={"scale": "gain"}, constants={"shift": torch.ones(8)}),
        Step(fns[1], 1, 0, constants={"causal": True}),
        Step(fns[2], args=("gain",)),
        Step(fns[3], 1, 0, kwargs={"scale": "add", "shift": "gain"}),
    ]
    net = Reversible(steps)

    def run(x: Tensor, gain: Tensor, add: Tensor) -> Tensor:
        a = x + fns[0](x, scale=gain, shift=torch.ones(8))
        b = x + fns[1](a, causal=True)
        a = a + fns[2](b, gain)
        b = b + fns[3](a, scale=add, shift=gain)
        return a + b

    keywords = dict(zip(("gain", "add"), given().values(), strict=True))
    expected = results(run, net, **keywords)
    for execution in ("invert", "checkpoint", "store"):
        net.execution = execution
        found = results(lambda x, **kw: sum(net(x, x, **kw)), net, **keywords)
        assert_same_gradients(found, expected, tolerance=1e-5)
    back = net.inverse(*net(x(), x(), **keywords), **keywords)
    assert all(torch.allclose(found, x(), atol=1e-4) for found in back)
    assert "kwargs={'scale': 'gain'}, constants=['shift']" in repr(net)


@IN_A_GRAPH
def test_a_step_inside_a_graph():
    torch.manual_seed(0)
    fns = [Scaled(), ByPosition()]
    net = Reversible(
        [
            Step(fns[0], kwargs={"scale": "gain"}, constants={"shift": 0.5}),
            Step(fns[1], 1, 0, args=["gain"]),
        ]
    )
    gain = given()["scale"]
    expected = results(lambda x, gain: sum(net(x, x, gain=gain)), net, gain=gain)
    compiled = torch.compile(
        lambda x, gain: sum(net(x, x, gain=gain)), fullgraph=True, backend="aot_eager"
    )
    assert_same_gradients(results(compiled, net, gain=gain), expected, tolerance=1e-5)


def test_routes_of_programs_are_broadcast_and_read_from_signatures():
    torch.manual_seed(0)
    fns = [Scaled(), Shifted()]
    steps = [Step(fns[0]), Step(fns[1], 1, 0)]
    scale, shift = given().values()
    a = x() + fns[0](x(), scale, shift)
    b = x() + fns[1](a, shift=shift)
    for route in ("signature", {"scale": [True, False], "shift": True}):
        net = Reversible(steps, args_route=route)
        found = net(x(), x(), scale=scale, shift=shift)
        assert torch.equal(found[0], a)
        assert torch.equal(found[1], b)
    by_name = Reversible(
        [Step(fns[0], kwargs={"shift": "other"}), Step(fns[1], 1, 0)], args_route="signature"
    )
    found = by_name(x(), x(), scale=scale, shift=shift, other=shift)
    assert torch.equal(found[1], b)
    # What a step has under another name does not come by its signature as well.
    with pytest.raises(TypeError, match="a branch gets 'shift' twice"):
        Reversible(list(by_name), args_route={"shift": True, "scale": (True, False)})(
            x(), x(), scale=scale, shift=shift, other=shift
        )


def test_what_a_step_cannot_take_is_named():
    with pytest.raises(ValueError, match=r"Step: 'mask' is named more than once"):
        Step(Scaled(), args=["mask"], constants={"mask": 1})
    net = Reversible([Step(Scaled(), args=("first", "second"))])
    with pytest.raises(TypeError, match=r"the call lacks 'first'.*before others"):
        net(x(), x(), second=1.0)
    with pytest.raises(TypeError, match=r"no route for keyword 'third'.*{'third': True}"):
        net(x(), x(), first=1.0, third=1.0)
    with pytest.raises(ValueError, match=r"args_route\['a'\] has 2 entries for 1 steps"):
        Reversible(list(net), args_route={"a": (True, True)})
    with pytest.raises(ValueError, match=r"args_route\['a'\] is 1: give a boolean"):
        Reversible(list(net), args_route={"a": 1})
    with pytest.raises(ValueError, match="route_args does not know the branches"):
        route_args("signature", {"a": 1}, 2)


def test_a_program_drops_a_keyword_by_its_route():
    step = Step(Scaled(), kwargs={"scale": "gain"})
    net = Reversible([step], args_route={"use_cache": False})
    expected = Reversible([step])(x(), x(), gain=2.0)
    assert torch.equal(net(x(), x(), gain=2.0, use_cache=False)[0], expected[0])


# --- what a branch raises


def notes(call: Callable[[], Any], kind: type[Exception] = TypeError) -> str:
    with pytest.raises(kind) as raised:
        call()
    return "\n".join(raised.value.__notes__)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("grad", [True, False])
def test_a_wrong_keyword_names_block_branch_and_route(kind: Any, grad: bool):
    name = "block" if kind is ReversibleSequence else "layer"
    route = ((True, False), (True, False), (True, True))
    net = kind(blocks(), {"scale": route, "other": (False, False)})
    with torch.set_grad_enabled(grad):
        note = notes(lambda: net(x(), scale=1.0))
    assert note.startswith(f"In {name} 2, branch g, Shifted: its forward takes (x, *, shift=None")
    assert "It got 'scale', which it does not take" in note
    assert note.endswith(f"args_route={{'scale': {route}}}".replace("{{", "{"))


def test_a_missing_keyword_names_block_branch_and_route():
    net = ReversibleSequence(blocks(), {"scale": ((True, False), (False, False), (True, False))})
    note = notes(lambda: net(x(), scale=1.0))
    assert note.startswith("In block 1, branch f, Scaled")
    assert "It got no 'scale': give it in the call, and send it here." in note
    assert "args_route={'scale': ((True, False), (False, False), (True, False))}" in note
    note = notes(lambda: ReversibleSequence(blocks(), "signature")(x()))
    assert "In block 0, branch f, Scaled" in note
    assert note.endswith("args_route='signature'")


def test_a_long_route_is_shortened():
    net = ReversibleSequence(blocks() * 20, {"scale": ((True, True),) * 60})
    note = notes(lambda: net(x(), scale=1.0))
    assert "In block 0, branch g" in note
    assert len(note) < 400


class NoSelf(nn.Linear):
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        module, x = args
        assert sorted(kwargs) == ["scale"]
        return nn.Linear.forward(module, x)


def test_a_forward_without_named_parameters_gets_all_keywords():
    ReversibleSequence([(NoSelf(8, 8), NoSelf(8, 8))], "signature")(x(), scale=1.0)


def test_any_error_of_a_branch_names_it():
    net = ReversibleSequence(blocks(lambda: Scaled(4)), "signature")
    note = notes(lambda: net(x(), scale=1.0), RuntimeError)
    assert note == "In block 0, branch f, Scaled"
    block = ReversibleBlock(Scaled(), Shifted())
    assert "In branch f, Scaled: its forward takes" in notes(lambda: block(x(), x()))
    program = Reversible([Step(nn.Identity()), Step(Scaled(), 1, 0)])
    assert "In step 1, Scaled" in notes(lambda: program(x(), x()))


def test_the_error_of_a_hook_is_not_taken_for_that_of_a_branch():
    net = ReversibleSequence(blocks(), "signature")

    def raises(*_: Any) -> None:
        raise TypeError("of the hook")

    net[1].register_forward_hook(raises)
    with pytest.raises(TypeError) as raised:
        net(x(), scale=1.0)
    assert not hasattr(raised.value, "__notes__")
