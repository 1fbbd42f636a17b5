"""A converted layer: when the model's own loop calls it, it takes its steps in an open call.

A layer returns a readout of the streams, and keeps the call open for whoever gives it exactly this
tensor next. The open call hangs on the returned tensor: on its node in the graph, or where it has
none in a table with weak keys. So it dies with the tensor, after exceptions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._compiled.function import active
from .._engine import Call
from .._errors import ReversibleError
from .._execution import STORE
from .._source import Adapter
from .._state.branch import OWN
from .._streams.arithmetic import FixedArithmetic, Stream
from .._torch import (
    counted_writes,
    is_capturing,
    is_faking,
    is_forward_mode,
    records_operators,
    saved_tensor_hooks,
)
from ._dynamo import keep_out, set_compiler
from ._timm import FLAG
from ._transformers import FLAG_OF_LAYERS, is_cache, is_empty
from .rules import NODES, Readout, hand_on, take_up
from .stack import Stack, low_precision
from .trial import Trial

# Where a converted layer finds its stack, and its place there.
KEY = "_revnet_place"


@dataclass(slots=True)
class _Open:
    """A call between two of its layers."""

    call: Call
    streams: list[Stream]
    stack: Stack
    format: Any
    bits: int
    turn: int
    readout: Readout
    # Of the tensor that was returned.
    version: int
    address: int
    # Hooks on saved tensors at the opening: a layer under a checkpoint of its own opens a call,
    # since the checkpoint gives it another tensor when it recomputes.
    hooks: Any


# Open calls by the tensor that was returned, where it has no node in the graph.
_OPEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


class _Aside(Exception):
    """A layer that does not fit, and why."""


class _Range(Exception):
    """The format of the streams does not fit this layer."""


class _Update(Adapter):
    """What a layer adds to its input.

    Args:
        layer: the converted layer.
        own: its class before conversion, whose `forward` is called.
        dtype: of the tensor that the layer was given.
        compiler: at work where the layer was called.
        watch: told magnitudes around the layer; returns whether the format fits them.
        subtracts: whether the rule takes the difference of what the layer returns and reads.
        stored: whether the layer keeps its activations.
    """

    def __init__(
        self,
        layer: nn.Module,
        own: Any,
        dtype: torch.dtype,
        compiler: Any,
        watch: Callable[[float, float], bool] | None,
        subtracts: bool,
        stored: bool,
    ) -> None:
        self.branch = layer
        self.own = own
        self.given = dtype
        self.compiler = compiler
        self.watch = watch
        self.subtracts = subtracts
        self.stored = stored
        # What the layer returned: its dtype, and the class of its tuple.
        self.dtype = dtype
        self.kind: Any = tuple
        # What it returned and read in a call that was given up, where it need not run again.
        self.evaluated: tuple[Any, Tensor] | None = None

    def __call__(self, x: Tensor, /, **kwargs: Any) -> Any:
        positional = kwargs.pop(_POSITIONAL, ())
        x = x.to(self.given)
        if self.evaluated is not None:
            out, x = self.evaluated
        else:
            out = _plainly(self.branch, self.own, (x, *positional), kwargs, self.compiler)
        y, rest = (out[0], tuple(out[1:])) if isinstance(out, tuple) and out else (out, None)
        if not isinstance(y, Tensor):
            raise _Aside(f"it returns {type(y).__name__}, not a tensor")
        if y.shape != x.shape:
            raise _Aside(f"it changes the shape, {tuple(x.shape)} to {tuple(y.shape)}")
        if not y.is_floating_point():
            raise _Aside(f"it returns {y.dtype}")
        self.dtype, self.kind = y.dtype, type(out)
        if self.watch is not None and not self.watch(*_magnitudes(x, y)):
            if self.stored or not torch.is_grad_enabled():
                self.evaluated = out, x
            raise _Range
        update = [y, x] if self.subtracts else y - x
        return update if rest is None else (update, rest)


_POSITIONAL = "_positional"


def _magnitudes(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest magnitude around a layer, and the mean one of its update."""
    if x.is_meta or x.numel() == 0:
        return 0.0, 0.0
    with torch.no_grad():
        largest = torch.maximum(x.abs().amax(), y.abs().amax())
        mean = (y - x).abs().mean(dtype=torch.float32)
        first, second = torch.stack((largest.float(), mean)).tolist()
    return first, second


def run(layer: nn.Module, own: Any, args: tuple[Any, ...], kwargs: Any, compiler: Any) -> Any:
    """Call a converted layer; `compiler` is at work around it, and off here."""
    stack, place = vars(layer)[KEY]
    bound = _bind(own, args, kwargs)
    if bound is None or place in stack.outside:
        return _plainly(layer, own, args, kwargs, compiler)
    x, keywords = bound
    recording = _recording()
    # A second evaluation would fill a cache twice.
    stored = recording and not _without_caches(stack, keywords)
    new = place in stack.untried or place in stack.unseen
    real = new and not active() and not is_faking()
    unseen = real and place in stack.unseen
    watch = stack.fits if unseen else None
    update = _Update(layer, own, x.dtype, compiler, watch, stack.rule.subtracts, stored)
    # Generators cannot be read in a capture, which follows other calls.
    trial = Trial(layer, x, keywords) if real and not is_capturing() else None
    try:
        found = _find(x, stack, recording)
        if unseen and found is None and not stack.fits(*_magnitudes(x, x)):
            stack.fit()
        if recording:
            stack.note(place, found is not None)
        try:
            y = _steps(stack, place, update, x, keywords, found)
        except _Range:
            # Another format begins with a new call.
            stack.fit()
            update.watch = None
            if update.evaluated is None and trial is not None:
                trial.take_back()
            y = _steps(stack, place, update, x, keywords, None)
        if real:
            stack.tried(place)
        return y
    except _Aside as reason:
        if stack.chosen:
            raise ReversibleError(
                f"{stack.layers[place]} ({stack.kind}): {reason}. A converted layer maps a tensor "
                f"to a tensor of its shape, alone or first in a tuple: leave it out of `layers`."
            ) from None
        stack.outside[place] = str(reason)
        stack.tried(place)
    finally:
        # Replays choose no range.
        update.watch = None
    if trial is not None:
        trial.take_back()
    return _plainly(layer, own, args, kwargs, compiler)


def _plainly(layer: nn.Module, own: Any, args: tuple[Any, ...], kwargs: Any, compiler: Any) -> Any:
    """Call a layer as it was before conversion."""
    found = set_compiler(compiler)
    try:
        return own.forward(layer, *args, **kwargs)
    finally:
        set_compiler(found)


def _steps(
    stack: Stack,
    place: int,
    update: _Update,
    x: Tensor,
    keywords: dict[str, Any],
    found: _Open | None,
) -> Any:
    """Take the steps of a layer in the open call that was found, or in a new one."""
    rule, bits = stack.rule, stack.bits[place]
    if found is None:
        call = _new_call(stack, x)
        turn, before = 0, bits
    else:
        call, turn, before = found.call, found.turn + 1, found.bits
        call.resume(_taken_up(found, x))
    name = stack.layers[place]
    first = place * rule.steps_per_layer
    if update.stored:
        call.executions = list(call.executions)
        call.executions[first] = STORE
    try:
        for i, part in enumerate(rule.steps(name, update, keywords, before, bits, turn)):
            call.step(first + i, part)
        rest = call.aux.pop(name, None)
        streams = call.pause()
    finally:
        # After an exception the call must not hold the graph.
        call.streams, call.aux = [], {}
    readout = rule.readout(bits, turn)
    value, hidden = streams[readout.place][0], streams[1 - readout.place][0]
    y = hand_on(value, hidden, readout.own, readout.other, update.dtype)
    hold = _Open(
        call,
        streams,
        stack,
        stack.streams,
        bits,
        turn,
        readout,
        _version(y),
        _address(y),
        saved_tensor_hooks(),
    )
    node: Any = y.grad_fn
    if type(node) in NODES:
        vars(node)["open_call"] = hold
    else:
        _OPEN[y] = hold
    if place == len(stack.layers) - 1 and isinstance(call.arithmetic, FixedArithmetic):
        stack.monitor.flush()
    return y if rest is None else _tuple(update.kind, (y, *rest))


def _tuple(kind: Any, items: tuple[Any, ...]) -> Any:
    """Return a tuple of this class, where it is a named one."""
    return kind._make(items) if hasattr(kind, "_make") else items


def _new_call(stack: Stack, x: Tensor) -> Call:
    if low_precision(x.dtype) and torch.is_autocast_enabled(x.device.type):
        # Layers return float32 then, unless they end with a product.
        x = x.float()
    executions = [STORE] * len(stack.executions) if active() else stack.executions
    streams = stack.rule.streams(x)
    return Call(streams, stack.arithmetic(), stack.options, executions, stack.memory)


def _taken_up(found: _Open, x: Tensor) -> list[Stream]:
    """Return the streams of an open call, as functions of the tensor that was handed on."""
    place, own, other = found.readout
    streams = list(found.streams)
    (value, encoded), (hidden, _) = streams[place], streams[1 - place]
    streams[place] = take_up(x, hidden, value, own, other, _origin(x)), encoded
    return streams


def _find(x: Tensor, stack: Stack, recording: bool) -> _Open | None:
    """Return the open call that returned this tensor, and take it from the tensor."""
    node = _origin(x)
    if type(node) in NODES:
        found = vars(node).pop("open_call", None)
    else:
        found = _OPEN.pop(x, None)
    if found is None or found.stack is not stack or found.format != stack.streams:
        return None
    same = (
        found.version == _version(x)
        and found.address == _address(x)
        and found.hooks == saved_tensor_hooks()
        and found.call.recording is recording
        and not (node is None and x.requires_grad)
    )
    return found if same else None


def _origin(x: Tensor) -> Any:
    """Return the node that made a tensor, through those that return their inputs."""
    node: Any = x.grad_fn
    place = x.output_nr
    while type(node).__name__ in _PASSING and place < len(node.next_functions):
        node, place = node.next_functions[place]
    return node


# Nodes of functions that return their inputs: of FSDP2 and of backward hooks of modules.
_PASSING = frozenset(("RegisterPostBackwardFunctionBackward", "BackwardHookFunctionBackward"))


def _recording() -> bool:
    """Check whether a call records its steps, as `Call` does."""
    return torch.is_grad_enabled() and not records_operators() and not is_forward_mode()


def _address(x: Tensor) -> int:
    # Tensors of transforms and of FakeTensorMode have none.
    return 0 if active() or is_faking() else x.data_ptr()


def _version(x: Tensor) -> int:
    """Return a number that each write to the tensor makes larger."""
    functorch = torch._C._functorch
    version = counted_writes(x)
    # Of nested transforms, only the one that makes a write may count it.
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
        version += counted_writes(x)
    return version


def _without_caches(stack: Stack, keywords: dict[str, Any]) -> bool:
    """Take empty caches from the keywords; return whether no other cache is left."""
    caches = [name for name, value in keywords.items() if is_cache(name, value)]
    if not caches:
        return True
    if not all(is_empty(keywords[name]) for name in caches):
        stack.warn_once(
            "filled cache",
            f"{stack.name}: a key-value cache that holds something was given in training. The "
            f"layers that read it keep their activations.",
        )
        return False
    stack.warn_once(
        "cache",
        f"{stack.name}: a key-value cache was given in training, and is ignored: layers are "
        f"evaluated again in backward, and would fill it twice. Pass use_cache=False.",
    )
    for name in caches:
        keywords[name] = None
    if "use_cache" in keywords:
        keywords["use_cache"] = False
    return True


def _bind(
    own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]] | None:
    """Return the stream that a layer is given, and the rest by name; None where there is none."""
    names, named = _signature(own)
    keywords = dict(kwargs)
    if args:
        x, positional = args[0], args[1:]
        if named and len(positional) < len(names):
            keywords.update(zip(names[1:], positional, strict=False))
            if len(keywords) < len(kwargs) + len(positional):
                return None
        elif positional:
            keywords[_POSITIONAL] = positional
    elif names and names[0] in keywords:
        x = keywords.pop(names[0])
    else:
        return None
    plain = isinstance(x, Tensor) and not x.is_nested and x.is_floating_point()
    return (x, keywords) if plain else None


@cache
def _signature(own: Any) -> tuple[list[str], bool]:
    """Return the names of the positional parameters, and whether all may be given by name."""
    parameters = list(inspect.signature(own.forward).parameters.values())[1:]
    kinds = inspect.Parameter
    positional = [
        p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    named = all(p.kind is kinds.POSITIONAL_OR_KEYWORD for p in positional[1:])
    named = named and not any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    return [p.name for p in positional], named


@cache
def converted_class(own: Any) -> Any:
    """Return the class of converted layers of this class: equal but for `forward`.

    A class, not an attribute of each layer: copies, pickles and replicas have it as well, and call
    it with their own parameters.
    """

    @wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiler = set_compiler(None)
        try:
            return run(self, own, args, kwargs, compiler)
        finally:
            set_compiler(compiler)

    keep_out(forward)
    made = derived_class(own, converted_class, {FLAG_OF_LAYERS: property(_unset, _switch)})
    # Set afterwards: transformers wraps what a class is made with.
    made.forward = forward
    return made


@cache
def switching_class(own: Any) -> Any:
    """Return the class of a module around layers, equal but for its flag of checkpointing."""
    return derived_class(own, switching_class, {FLAG: property(_unset, _switch)})


@cache
def dense_class(own: Any) -> Any:
    """Return the class of a `TransformerEncoder`, equal but that it makes no nested tensors.

    In evaluation it makes one of padded sequences, on which a layer cannot take its steps.
    """
    return derived_class(own, dense_class, {"use_nested_tensor": property(_unset, _keep)})


def derived_class(own: Any, make: Callable[[Any], Any], namespace: dict[str, Any]) -> Any:
    """Return a class like `own` with other attributes; copies and pickles call `make` again."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The class has no name that a pickle could refer to.
        reduced: Any = object.__reduce_ex__(self, protocol)
        return _revive, (make, own), *reduced[2:]

    own_names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own,), {**own_names, **namespace, "__reduce_ex__": reduce, OWN: own})


def _revive(make: Callable[[Any], Any], own: Any) -> Any:
    made = make(own)
    return made.__new__(made)


def _unset(module: nn.Module) -> bool:
    """Return False, also where the model set True: conversion does without this."""
    return False


def _keep(module: nn.Module, value: bool) -> None:
    """Set the attribute as the class before conversion finds it."""
    vars(module)["use_nested_tensor"] = value


def _switch(module: nn.Module, enabled: bool) -> None:
    """Switch the layers inside between `"invert"` and `"store"`, as checkpointing is switched."""
    for layer in module.modules():
        if KEY in vars(layer):
            stack, place = vars(layer)[KEY]
            if not enabled:
                stack.set_execution(place, "store")
            elif stack.execution[place] == "store":
                stack.set_execution(place, "invert")
