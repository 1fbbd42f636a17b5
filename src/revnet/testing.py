"""Checks for your own couplings and branches: of inverses, gradients and single branches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._branch_check import IN_PLACE, check_branch, check_tiles, unchanged
from ._conversion.convert import Conversion, unconvert
from ._couplings import Coupling
from ._cycle import ReversibleCycle
from ._errors import ReversibleError
from ._memory import measure_memory
from ._sequence import ReversibleSequence
from ._source import rule_of

__all__ = [
    "ConversionReport",
    "check_branch",
    "check_conversion",
    "check_gradients",
    "check_inverse",
    "check_tiles",
]


def check_inverse(
    program: nn.Module, *inputs: Any, tolerance: float | None = None, **kwargs: Any
) -> float:
    """Return the relative error with which an inverse restores the inputs of its forward pass.

    Args:
        program: a `Coupling`, whose `inputs` are a target and a branch output (and a source, if it
            reads that); or a module with `forward` (or `run`, as sequences have it) and `inverse`,
            whose `inputs` are its streams.
        inputs: tensors, or trees of tensors, floating-point.
        tolerance: largest relative error of a tensor; by default 1000 times the precision of its
            dtype, and a tenth at most.
        **kwargs: keywords of both directions.

    Returns:
        The largest relative error of an input: the norm of the difference divided by its norm.

    Raises:
        ReversibleError: an error is above the tolerance, an input was changed in place, or an input
            came back with another structure, shape or dtype.
    """
    before = _leaves(inputs)
    name: Callable[[int], str] = "stream {}".format
    with torch.no_grad():
        if isinstance(program, Coupling):
            name = ("target", "branch output", "source").__getitem__
            rule, (target, *read) = rule_of(program), inputs
            out: Any = read if program.reads_source else read[0]
            restored: Any = (rule.invert(rule.combine(target, out), out), *read)
        else:
            forward: Any = program
            if isinstance(program, ReversibleSequence | ReversibleCycle):
                # Their forward pass merges the streams.
                forward = program.run
            outputs = forward(*inputs, **kwargs)
            streams = outputs if isinstance(outputs, tuple) else (outputs,)
            restored = program.inverse(*streams[: len(inputs)], **kwargs)  # type: ignore[operator]
            restored = restored if isinstance(restored, tuple) else (restored,)
    unchanged(inputs, before, type(program).__name__, name)
    worst = 0.0
    for i, (given, back) in enumerate(zip(before, restored, strict=True)):
        if pytree.tree_structure(given) != pytree.tree_structure(back):
            raise ReversibleError(
                f"{name(i)} came back with another structure: inverse returns what forward takes"
            )
        for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(back), strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ReversibleError(
                    f"{name(i)} is {tuple(a.shape)} {a.dtype}, but came back as {tuple(b.shape)} "
                    f"{b.dtype}: the inverse undoes shape and dtype, too"
                )
            error, allowed = _relative_error(b, a), _allowed(a, tolerance, 1000)
            if not error <= allowed:
                raise ReversibleError(
                    f"{name(i)} came back with a relative error of {error:.2g}, more than "
                    f"{allowed:.2g}. {_LOSSY}"
                )
            worst = max(worst, error)
    return worst


def check_gradients(
    program: nn.Module, *streams: Any, tolerance: float | None = None, seed: int = 0, **kwargs: Any
) -> float:
    """Return the relative error of the gradients of `program` against stored execution of it.

    Every output counts: the gradient is that of a weighted sum over all elements of all of them.
    The `.grad` of parameters, buffers and generators are left as they were.

    A gradient that is zero in theory, as of a bias before a batch norm, consists of rounding errors
    alone: those of a sum whose terms cancel. Rounding the streams differently changes it as a
    whole. Its error is given in units of those terms.

    Args:
        program: `revnet.Reversible` or a sequence, in the mode and with the execution to be
            checked.
        *streams: tensors, or trees of tensors, floating-point; they get gradients as well.
        tolerance: largest relative error of a gradient. By default zero with fixed streams, else
            10,000 times the precision of the dtype, and a tenth at most.
        seed: seed of the randomness of each pass.
        **kwargs: keywords of the forward pass; floating-point tensors that require a gradient get
            one.

    Returns:
        The largest relative error among the gradients of streams, keywords and parameters.

    Raises:
        ReversibleError: a gradient is wrong, a branch gives another result when called again, or an
            input was changed.
    """
    outputs, expected = _pass(program, "store", streams, kwargs, seed)
    again, repeated = _pass(program, "store", streams, kwargs, seed)
    _deterministic(outputs, again, expected, repeated)
    outputs, actual = _pass(program, program.execution, streams, kwargs, seed)
    for i, (a, b) in enumerate(zip(again, outputs, strict=True)):
        if not torch.equal(a, b):
            raise ReversibleError(
                f"output {i} differs between execution={program.execution!r} and 'store': a branch "
                f"reads what its own calls change, such as a counter. Keep such state in buffers."
            )
    exact = program._arithmetic(*_floating(streams)).exact  # type: ignore[operator]
    if exact and tolerance is None:
        tolerance = 0.0

    def rounded() -> list[dict[str, Tensor | None]]:
        nearby = [
            pytree.tree_map_only(Tensor, partial(_nearby, way=way), streams) for way in (1, -1)
        ]
        return [_pass(program, "store", one, kwargs, seed)[1] for one in nearby]

    return _compare(actual, expected, tolerance, rounded)


@dataclass(frozen=True)
class ConversionReport:
    """What `check_conversion` measured.

    Attributes:
        loss: of the converted model.
        ordinary_loss: of the same weights run as the ordinary network.
        saved_bytes: kept for backward by the converted model.
        stored_bytes: kept with `execution="store"`.
    """

    loss: float
    ordinary_loss: float
    saved_bytes: int
    stored_bytes: int

    @property
    def shift(self) -> float:
        """The loss of the converted model less that of the ordinary network."""
        return self.loss - self.ordinary_loss


def check_conversion(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    tolerance: float = 0.0,
    seed: int = 0,
) -> ConversionReport:
    """Compare a converted model with stored execution, and with the ordinary network.

    Gradients (`.grad`), buffers, generators and settings stay as they are.

    Args:
        model: a model that `revnet.convert` converted.
        batch: a mapping of keywords, a tuple of arguments, or one argument of the model.
        loss: gives a scalar from the model's output; by default its `loss`, or a weighted sum over
            all elements.
        tolerance: largest relative error of a gradient, with respect to stored execution.
        seed: of the randomness of each pass.

    Raises:
        ReversibleError: a wrong gradient, or a layer that gives another result when called again.
    """
    conversion = Conversion(model)
    own = conversion.execution
    gradients = [(p, p.grad) for p in model.parameters()]

    def total(network: nn.Module = model) -> Tensor:
        with _seeded(model, seed):
            out = _called(network, batch)
        return (_loss_of if loss is None else loss)(out)

    # Measuring memory runs backward: not into the caller's gradients.
    model.zero_grad()
    with _same_buffers(model), torch.no_grad():
        total()  # The first batch chooses the range of the streams.
    try:
        conversion.execution = "store"
        value, expected = _differentiated(model, total)
        again, repeated = _differentiated(model, total)
        _deterministic([value], [again], expected, repeated)
        with _same_buffers(model):
            stored_bytes = measure_memory(total).saved_bytes
        conversion.execution = own
        value, actual = _differentiated(model, total)
        if not torch.equal(value, again):
            raise ReversibleError(
                f"the loss is {value.item()} in execution {own!r}, {again.item()} stored: a layer "
                "reads what its own calls change, such as a counter. Keep it in buffers."
            )
        _compare(actual, expected, tolerance, list)
        with _same_buffers(model):
            saved_bytes = measure_memory(total).saved_bytes
    finally:
        conversion.execution = own
        for p, grad in gradients:
            p.grad = grad
    with torch.no_grad():
        plain = total(unconvert(copy.deepcopy(model)))
    return ConversionReport(value.item(), plain.item(), saved_bytes, stored_bytes)


def _differentiated(
    model: nn.Module, total: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return a loss and its gradients by parameter; the buffers stay as they are."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _same_buffers(model):
        value = total()
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return value.detach(), dict(zip(named, grads, strict=True))


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*(batch if isinstance(batch, tuple) else (batch,)))


def _loss_of(out: Any) -> Tensor:
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    leaves = _floating(dict(out) if isinstance(out, Mapping) else out)
    # Mean over elements, so that the loss does not grow with them.
    return torch.stack([_weighted(leaf) / leaf.numel() for leaf in leaves]).sum()


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw from this seed inside; leave the generators as they were."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _same_buffers(program: nn.Module) -> Iterator[None]:
    """Leave the buffers as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in program.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _pass(
    program: nn.Module, execution: Any, streams: Any, kwargs: Mapping[str, Any], seed: int
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Return the outputs of one pass, and the gradients by name."""
    leaves, given = _leaves(streams, differentiable=True), _leaves(kwargs)
    wanted = {f"stream {i}": leaf for i, leaf in enumerate(_floating(leaves))}
    wanted |= {
        f"keyword tensor {i}": leaf for i, leaf in enumerate(_floating(given)) if leaf.requires_grad
    }
    wanted |= {
        f"parameter {name}": value
        for name, value in program.named_parameters()
        if value.requires_grad
    }
    devices = {leaf.device.index or 0 for leaf in _floating(leaves) if leaf.device.type == "cuda"}
    with _executed(program, execution), torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        outputs = _floating(_run(program, leaves, given))
        total = torch.stack([_weighted(out).to(outputs[0].device) for out in outputs]).sum()
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    unchanged(leaves, streams, type(program).__name__, "stream {}".format)
    return [out.detach() for out in outputs], dict(zip(wanted, grads, strict=True))


@contextlib.contextmanager
def _executed(program: nn.Module, execution: Any) -> Iterator[None]:
    """Set another execution; afterwards restore the execution and the buffers."""
    own = program.execution
    program.execution = execution
    try:
        with _same_buffers(program):
            yield
    finally:
        program.execution = own


def _run(program: nn.Module, streams: Any, kwargs: Any) -> Any:
    try:
        return program(*streams, **kwargs)
    except RuntimeError as error:
        if isinstance(error, ReversibleError) or "in-place" not in str(error):
            raise
        raise ReversibleError(IN_PLACE.format(type(program).__name__, "a stream")) from error


def _compare(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    tolerance: float | None,
    rounded: Callable[[], list[dict[str, Tensor | None]]],
) -> float:
    """Return the largest relative error of the gradients.

    Args:
        actual, expected: gradients by name.
        tolerance: see `check_gradients`.
        rounded: returns the expected gradients at streams that are rounded in other ways.
    """
    worst, nearby = 0.0, list[dict[str, Tensor | None]]()
    for name, right in expected.items():
        found = actual[name]
        if (right is None) != (found is None):
            raise ReversibleError(
                f"{name} has {'no' if found is None else 'a'} gradient, unlike stored execution"
            )
        if right is None or found is None:
            continue
        error, allowed = _relative_error(found, right), _allowed(right, tolerance, 10_000)
        if error > allowed > 0.0:
            nearby = nearby or rounded()
            error *= _share_in_terms(right, [gradients[name] for gradients in nearby])
        if not error <= allowed:
            raise ReversibleError(
                f"the gradient of {name} has a relative error of {error:.2g}, more than "
                f"{allowed:.2g}. {_WRONG}"
            )
        worst = max(worst, error)
    return worst


def _nearby(x: Tensor, way: int) -> Tensor:
    """Return a stream whose elements differ by about the precision of the dtype."""
    if not x.is_floating_point():
        return x
    places = torch.arange(x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
    return x.detach() * (1 + way * torch.finfo(x.dtype).eps * places.sin().sign())


def _share_in_terms(gradient: Tensor, nearby: list[Tensor | None]) -> float:
    """Return the norm of a gradient in units of the norm of the terms that it is a sum of.

    Only a gradient that other rounding changes by a tenth or more is taken for a sum of terms that
    cancel. The change is the precision of the dtype in units of these terms. Any other gradient is
    its own unit.
    """
    exact = gradient.double()
    size = exact.norm().item()
    change = max((x.double() - exact).norm().item() for x in nearby if x is not None)
    if change < 0.1 * size or not change:
        return 1.0
    return float(size * torch.finfo(gradient.dtype).eps / change)


def _deterministic(
    outputs: list[Tensor], again: list[Tensor], expected: Any, repeated: Any
) -> None:
    pairs = zip([*outputs, *expected.values()], [*again, *repeated.values()], strict=True)
    if not all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs):
        raise ReversibleError(
            "two stored runs with the same seed differ, so that no replay can be right. Draw from "
            "torch's global generators, not from those of Python or NumPy or a custom one; keep "
            "state in buffers; and on a GPU ask for deterministic kernels with "
            "torch.use_deterministic_algorithms(True)."
        )


def _leaves(tree: Any, differentiable: bool = False) -> Any:
    """Return a tree of fresh leaves.

    They take a gradient where the given ones do or, if `differentiable`, where they can.
    """

    def fresh(leaf: Tensor) -> Tensor:
        takes_gradient = leaf.requires_grad or (differentiable and leaf.is_floating_point())
        return leaf.detach().clone().requires_grad_(takes_gradient)

    return pytree.tree_map_only(Tensor, fresh, tree)


def _floating(tree: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def _weighted(out: Tensor) -> Tensor:
    """Return a scalar to which every element contributes differently and not linearly."""
    wide = out.double()
    places = torch.arange(1, out.numel() + 1, dtype=wide.dtype, device=out.device)
    weight = places.view(out.shape).cos()
    return (weight * (wide + 0.1 * wide.square())).sum()


_LOSSY = (
    "If it is of the order of one, the inverse does not match: undo the operations of forward in "
    "reverse order, with the same branch output, in eval() or without randomness. If it is small, "
    "the rule loses digits: leave approximate=False, so that steps keep their targets, or define "
    "the rule by scale and increment and use streams='fixed'."
)
_WRONG = (
    "With float streams, rounding errors of the rebuilt activations grow with depth: use "
    "streams='fixed', or keep the targets of some steps with execution='checkpoint'. With fixed "
    "streams, a branch draws from Python's or NumPy's generator, or reads state that is not a "
    "buffer: determinism_check='exact' names it. If a coupling sets approximate or rearranges, "
    "check it with check_inverse."
)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by that of the expected tensor if not zero."""
    difference = (actual.double() - expected.double()).norm().item()
    return float(difference / (expected.double().norm().item() or 1.0))


def _allowed(expected: Tensor, tolerance: float | None, precisions: int) -> float:
    """Return the tolerance, by default so many times the precision of the dtype."""
    if tolerance is not None:
        return tolerance
    # In bfloat16 the multiple alone would be more than the tensor itself.
    return float(min(precisions * torch.finfo(expected.dtype).eps, 0.1))
