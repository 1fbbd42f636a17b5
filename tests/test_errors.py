"""Wrong use raises, names the block and the branch, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from cases import Linear, Mlp, Modulated, SavesInput, SavesResult, build, every, noted, randn
from oracle import assert_same_step, stored_copy, train_step, weighted
from revnet import Fixed, ReversibleError, ReversibleSequence, SequentialSequence


def naming(depth: int, branch: str) -> str:
    """Returns the pattern that an error of that block and branch matches."""
    return rf"(?s)block {depth}\b.*\bbranch {branch}\b"


class Does(nn.Module):
    """A linear branch that, once told so, does something wrong with its input or output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.wrong: Callable[[Tensor, Tensor], object] | None = None

    def forward(self, x: Tensor) -> object:
        out = self.linear(x).tanh()
        return out if self.wrong is None else self.wrong(x, out)


def _in_place_before(x: Tensor, out: Tensor) -> Tensor:
    x.add_(1)
    return out


def _in_place_slice(x: Tensor, out: Tensor) -> Tensor:
    x[..., 0] = 0
    return out


def _in_place_view(x: Tensor, out: Tensor) -> Tensor:
    x.view(-1).mul_(2)
    return out


def _in_place_without_gradient(x: Tensor, out: Tensor) -> Tensor:
    with torch.no_grad():
        x.clamp_(-0.1, 0.1)
    return out


IN_PLACE = [_in_place_before, _in_place_slice, _in_place_view, _in_place_without_gradient]
RETURNS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "narrower": lambda x, out: out[..., :4],
    "broadcastable": lambda x, out: out.mean(1, keepdim=True),
    "one-dimension-more": lambda x, out: out[None],
    "scalar": lambda x, out: out.sum(),
    "another-device": lambda x, out: out.to("meta"),
    "integers": lambda x, out: (out * 10).long(),
    "booleans": lambda x, out: out > 0,
    "complex": lambda x, out: torch.complex(out, out),
    "none": lambda x, out: None,
    "list": lambda x, out: [out],
    "number": lambda x, out: 1.0,
}


def network(depth: int = 3) -> tuple[ReversibleSequence, nn.Module]:
    pairs = build([(Does, Does)] * depth, 8)
    return ReversibleSequence(pairs), stored_copy(pairs)


def assert_nothing_is_lost(net: ReversibleSequence, oracle: nn.Module) -> None:
    """Raises unless the next step, done right, is the step of a network that never failed."""
    net.zero_grad()
    x = randn(2, 6, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))


PLACES = [(0, "g"), (1, "f"), (2, "g")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}{place[1]}")
@pytest.mark.parametrize("wrong", IN_PLACE)
def test_a_branch_that_changes_its_input_in_place(wrong: Callable, place: tuple[int, str]):
    net, oracle = network()
    branch = getattr(net.blocks[place[0]], place[1])
    state = torch.get_rng_state()
    branch.wrong = wrong
    with pytest.raises(ReversibleError, match=naming(*place)):
        net(randn(2, 6, 8, requires_grad=True))
    branch.wrong = None
    assert torch.equal(torch.get_rng_state(), state)
    assert_nothing_is_lost(net, oracle)


@pytest.mark.parametrize("wrong", IN_PLACE)
def test_a_first_branch_that_changes_the_users_input_in_place(wrong: Callable):
    net, _ = network()
    net.blocks[0].f.wrong = wrong
    with pytest.raises(ReversibleError, match=naming(0, "f")):
        net(randn(2, 6, 8))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}{place[1]}")
@pytest.mark.parametrize("wrong", RETURNS.values(), ids=RETURNS)
def test_a_branch_that_returns_something_that_is_no_update(wrong: Callable, place: tuple[int, str]):
    net, oracle = network()
    branch = getattr(net.blocks[place[0]], place[1])
    branch.wrong = wrong
    for execution in ("invert", "store"):
        net.execution = execution
        with pytest.raises(ReversibleError, match=naming(*place)):
            net(randn(2, 6, 8, requires_grad=True))
    with torch.no_grad(), pytest.raises(ReversibleError, match=naming(*place)):
        net(randn(2, 6, 8))
    net.execution = "invert"
    branch.wrong = None
    assert_nothing_is_lost(net, oracle)


def test_the_message_says_what_was_returned_and_what_was_expected():
    net, _ = network()
    net.blocks[1].g.wrong = RETURNS["narrower"]
    with pytest.raises(ReversibleError, match=r"\(2, 6, 4\).*\(2, 6, 8\)"):
        net(randn(2, 6, 8))


class SecondTime(nn.Module):
    """A branch that does something else from its second evaluation on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.change: Callable[[SecondTime, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        noted(self).append(x.shape)
        if self.change is not None and len(noted(self)) > 1:
            return self.change(self, x)
        return self.linear(x).sin()


OTHERWISE: dict[str, Callable[[SecondTime, Tensor], Tensor]] = {
    "more": lambda m, x: m.linear(x).sin().cos(),
    "fewer": lambda m, x: m.linear(x),
    "other-shape": lambda m, x: m.other(x).sin()[..., :8],
    "other-dtype": lambda m, x: m.linear(x).float().sin().double(),
    "other-strides": lambda m, x: m.linear(x).transpose(0, 1).contiguous().sin().transpose(0, 1),
    "no-gradient": lambda m, x: m.linear(x).detach().sin(),
    "other-parameter": lambda m, x: nn.functional.linear(
        x, m.other.weight[:8], m.linear.bias
    ).sin(),
}


@pytest.mark.parametrize(
    "place", [(0, "f"), (1, "g"), (2, "g")], ids=lambda place: f"{place[0]}{place[1]}"
)
@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_a_replay_that_saves_other_tensors_than_the_forward_did(
    change: Callable, place: tuple[int, str]
):
    pairs = build([(SecondTime, SecondTime)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    branch = getattr(net.blocks[place[0]], place[1])
    branch.change = change
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    with pytest.raises(ReversibleError, match=naming(*place)):
        loss.backward()
    branch.change = None
    assert_nothing_is_lost(net, oracle)


@pytest.mark.parametrize("change", list(OTHERWISE.values())[:2], ids=list(OTHERWISE)[:2])
def test_a_replay_that_saves_another_number_of_tensors_raises_for_a_partial_gradient_too(
    change: Callable,
):
    net = ReversibleSequence(build([(SecondTime, SecondTime)] * 3, 8))
    net.blocks[1].g.change = change
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    with pytest.raises(ReversibleError, match=naming(1, "g")):
        torch.autograd.grad(loss, net.blocks[0].f.linear.weight)


@pytest.mark.parametrize("branch", [Linear, Mlp])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_too_early(
    optimizer: type[torch.optim.Optimizer], branch: type[nn.Module]
):
    pairs = build([(branch, branch)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    for module in (oracle, net):
        step = optimizer(module.parameters(), lr=0.1)
        weighted(module(randn(2, 6, 8))).backward()
        loss = weighted(module(randn(2, 6, 8, requires_grad=True)))
        step.step()
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            loss.backward()
    assert_nothing_is_lost(net, stored_copy([(block.f, block.g) for block in net.blocks]))


@pytest.mark.parametrize(
    "where", ["blocks.0.f.linear.weight", "blocks.1.g.linear.weight", "blocks.2.g.linear.weight"]
)
def test_one_parameter_changed_in_place(where: str):
    net, _ = network()
    x = randn(2, 6, 8, requires_grad=True)
    loss = weighted(net(x))
    with torch.no_grad():
        net.get_parameter(where).mul_(2)
    with pytest.raises(
        ReversibleError, match=naming(int(where.split(".")[1]), where.split(".")[2])
    ):
        loss.backward()
    assert x.grad is None


def test_a_bias_changed_in_place_which_stored_execution_does_not_need_but_a_replay_does():
    net, _ = network()
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    with torch.no_grad():
        net.blocks[1].f.linear.bias.add_(1)
    with pytest.raises(ReversibleError, match=naming(1, "f")):
        loss.backward()


def test_a_buffer_changed_in_place():
    class Scaled(Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("factor", torch.full((width,), 2.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.factor)

    net = ReversibleSequence(build([(Scaled, Scaled)] * 2, 8))
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    net.blocks[0].g.factor.zero_()
    with pytest.raises(ReversibleError, match=naming(0, "g")):
        loss.backward()


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrization_removed():
    net, _ = network()
    branch = net.blocks[0].g.linear
    register_parametrization(branch, "weight", Twice())
    loss = weighted(net(randn(2, 6, 8, requires_grad=True)))
    remove_parametrizations(branch, "weight", leave_parametrized=False)
    expected = naming(0, "g") + ".*ParametrizedLinear has class Linear now"
    with pytest.raises(ReversibleError, match=expected):
        loss.backward()
    weighted(net(randn(2, 6, 8))).backward()


class Masked(Linear):
    """Fills by a mask, which stored execution saves."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x).tanh().masked_fill(mask, 0.0)


class MaskedIn(Linear):
    """Reads values from a container."""

    def forward(self, x: Tensor, mask: dict) -> Tensor:
        return super().forward(x).tanh() * mask["values"][0]


@pytest.mark.parametrize("to", [(True, False), (False, True)], ids=["f", "g"])
def test_a_mask_zeroed(to: tuple[bool, bool]):
    pairs = build([(Masked if to[0] else Linear, Masked if to[1] else Linear)] * 3, 8)
    net = ReversibleSequence(pairs, {"mask": every(3, *to)})
    mask = torch.rand(2, 6, 8) < 0.5
    loss = weighted(net(randn(2, 6, 8, requires_grad=True), mask=mask))
    mask.zero_()
    with pytest.raises(ReversibleError, match=naming(2, "f" if to[0] else "g")):
        loss.backward()


def test_a_tensor_inside_a_container_zeroed():
    net = ReversibleSequence(build([(MaskedIn, Linear)] * 3, 8), {"mask": every(3, True, False)})
    mask = torch.rand(2, 6, 8, dtype=torch.float64)
    loss = weighted(net(randn(2, 6, 8, requires_grad=True), mask={"values": [mask]}))
    mask.zero_()
    with pytest.raises(ReversibleError, match=naming(2, "f")):
        loss.backward()


def test_a_keyword_that_needs_a_gradient_changed():
    net = ReversibleSequence(
        build([(Modulated, Modulated)] * 3, 8), {"scale": every(3, True, True)}
    )
    for make in (lambda t: t, lambda t: t * 2):
        scale = make(randn(8, seed=5, requires_grad=True))
        loss = weighted(net(randn(2, 6, 8, requires_grad=True), scale=scale))
        with torch.no_grad():
            scale.add_(1)
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            loss.backward()


@pytest.mark.parametrize("which", [0, 1], ids=["y1", "y2"])
def test_a_returned_stream_changed_under_no_grad_is_never_silently_wrong(which: int):
    net = ReversibleSequence(build([(SavesInput, SavesResult)] * 3, 8))
    x = randn(2, 6, 8, requires_grad=True)
    ys = net.run(x, x)
    loss = weighted(ys[0].clone(), ys[1].clone())
    with torch.no_grad():
        ys[which].zero_()
    with pytest.raises(ReversibleError, match="in place"):
        loss.backward()
    assert x.grad is None


class ChangesOwn(Linear):
    """Changes in place a tensor of its own that backward needs: wrong in stored execution too."""

    def forward(self, x: Tensor) -> Tensor:
        inner = super().forward(x)
        out = inner.sin()
        inner.zero_()
        return out


def test_a_branch_that_spoils_what_backward_needs():
    pairs = build([(Linear, ChangesOwn)] * 2, 8)
    for module in (stored_copy(pairs), ReversibleSequence(pairs)):
        loss = weighted(module(randn(2, 6, 8, requires_grad=True)))
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            loss.backward()


def test_nested_tensors():
    net = ReversibleSequence(build([(Linear, Linear)], 8))
    nested = torch.nested.nested_tensor(
        [torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged, dtype=torch.float64
    )
    with pytest.raises(TypeError, match="nested"):
        net(nested)
    with pytest.raises(TypeError, match="nested"):
        net.run(nested, nested)


@pytest.mark.parametrize(
    "value", [torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.bool), [1.0], None]
)
def test_a_stream_that_is_no_floating_point_tensor(value: object):
    net = ReversibleSequence(build([(Linear, Linear)], 8))
    with pytest.raises(TypeError, match=r"floating|tensor"):
        net(value)


def test_an_odd_size_for_chunk():
    net = ReversibleSequence(build([(Linear, Linear)], 4), split="chunk", merge="concat")
    with pytest.raises(ValueError, match=r"chunk.*7.*odd"):
        net(randn(2, 6, 7))
    with pytest.raises(ValueError, match=r"chunk.*3.*odd"):
        ReversibleSequence(build([(Linear, Linear)], 8), split="chunk", merge="concat", dim=1)(
            randn(2, 3, 8)
        )


@pytest.mark.parametrize(
    "other",
    [
        randn(2, 6, 4),
        randn(2, 1, 8),
        randn(6, 8),
        randn(2, 6, 8).float(),
        torch.empty(2, 6, 8, device="meta").double(),
    ],
    ids=["width", "broadcastable", "dimensions", "dtype", "device"],
)
def test_unequal_streams(other: Tensor):
    net = ReversibleSequence(build([(Linear, Linear)], 8))
    with pytest.raises(ValueError, match="stream"):
        net.run(randn(2, 6, 8), other)
    with pytest.raises(ValueError, match="stream"):
        net.inverse(randn(2, 6, 8), other)


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
@pytest.mark.parametrize(
    "empty", [[], (), nn.ModuleList(), iter(())], ids=["list", "tuple", "modules", "iterator"]
)
def test_empty_blocks(sequence: type, empty: object):
    with pytest.raises(ValueError, match=r"empty|at least one|no block"):
        sequence(empty)


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
@pytest.mark.parametrize(
    "entry",
    [
        nn.Linear(8, 8),
        (nn.Linear(8, 8),),
        (nn.Linear(8, 8),) * 3,
        (nn.Linear(8, 8), None),
        (torch.sin, torch.cos),
        3,
    ],
    ids=["module", "one", "three", "none", "functions", "number"],
)
def test_a_non_pair_is_named(sequence: type, entry: object):
    with pytest.raises(TypeError, match=r"(block|layer) 1\b.*pair"):
        sequence([(nn.Linear(8, 8), nn.Linear(8, 8)), entry])


class Both(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
@pytest.mark.parametrize("kind", [nn.Sequential, lambda *pair: Both(pair)], ids=["given", "own"])
def test_a_module_whose_forward_would_not_run_is_no_pair(sequence: type, kind: Callable):
    with pytest.raises(TypeError, match=r"block 0 .* whose forward would not run.* Give a tuple"):
        sequence([kind(nn.Linear(8, 8), nn.Linear(8, 8))])


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
@pytest.mark.parametrize("kind", [tuple, list, nn.ModuleList, iter])
def test_a_pair_is_a_tuple_a_list_or_a_module_list(sequence: type, kind: Callable):
    x = torch.randn(2, 8)
    pair = [nn.Linear(8, 8), nn.Linear(8, 8)]
    assert torch.equal(sequence([kind(pair)])(x), sequence([pair])(x))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("split", "half"),
        ("merge", "max"),
        ("execution", "rebuild"),
        ("determinism_check", "maybe"),
        ("layer_dropout", -0.1),
        ("layer_dropout", 1.5),
    ],
)
def test_an_unknown_option_is_named_with_what_was_expected(option: str, value: object):
    with pytest.raises(ValueError, match=rf"{option}.*{value}"):
        ReversibleSequence(build([(Linear, Linear)], 8), **{option: value})


def test_an_unknown_execution_set_later():
    net = ReversibleSequence(build([(Linear, Linear)], 8))
    with pytest.raises(ValueError, match=r"execution.*rebuild.*invert"):
        net.execution = "rebuild"
    assert net.execution == "invert"


def test_streams_set_later():
    net = ReversibleSequence(build([(Linear, Linear)] * 2, 8))
    net.streams = "fixed"
    assert net.streams == Fixed()
    with pytest.raises(ValueError, match="'fixedd' is not 'auto', 'fixed'"):
        net.streams = "fixedd"


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
def test_a_route_of_the_wrong_length_raises_at_construction(sequence: type):
    with pytest.raises(ValueError, match=r"mask.*3.*2"):
        sequence(build([(Linear, Linear)] * 2, 8), {"mask": every(3, True, False)})


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
def test_a_keyword_in_no_route(sequence: type):
    net = sequence(build([(Modulated, Modulated)] * 2, 8), {"scale": every(2, True, False)})
    with pytest.raises(TypeError, match=r"'sacle'.*scale"):
        net(randn(2, 6, 8), sacle=randn(8))
    assert torch.equal(net(randn(2, 6, 8), sacle=None), net(randn(2, 6, 8)))


@pytest.mark.parametrize("method", ["run", "inverse"])
def test_a_keyword_in_no_route_of_run_and_inverse(method: str):
    net = ReversibleSequence(
        build([(Modulated, Modulated)] * 2, 8), {"scale": every(2, True, False)}
    )
    with pytest.raises(TypeError, match=r"'sacle'.*scale"):
        getattr(net, method)(randn(2, 6, 8), randn(2, 6, 8), sacle=randn(8))
