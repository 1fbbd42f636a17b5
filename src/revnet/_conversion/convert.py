"""`convert` and `unconvert`: ordinary residual networks in reversible form, with their weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from .._engine import Options
from .._errors import ReversibleError
from .._execution import ExecutionName, resolve
from .._program import callers_level, streams_of
from .._state.branch import OWN
from .._state.random import devices_of
from .._state.structure import Memory
from .._streams.fixed import Fixed
from .._streams.format import Float
from ._timm import checkpoints_blocks
from ._transformers import was_loaded
from .find import Found, find, named
from .layer import KEY, converted_class, dense_class, switching_class
from .rules import RULES
from .stack import HEADROOM, Stack
from .tiles import TILE, cut_into_tiles, parts_of

LARGEST_BITS = 8


class Conversion:
    """What `convert` did to a model: its stacks, their settings, and what was left as it is.

    It holds no parameters and registers nothing. `Conversion(model)` finds the stacks of a model
    that is converted, such as a copy.

    Args:
        model: a converted model.

    Raises:
        ReversibleError: the model is not converted.
    """

    def __init__(self, model: nn.Module) -> None:
        places = [vars(module)[KEY] for module in model.modules() if KEY in vars(module)]
        self.stacks: list[Stack] = list(dict.fromkeys(stack for stack, _ in places))
        self.left_out: dict[str, str] = {}
        self._model = model
        if not self.stacks:
            raise ReversibleError(
                f"{type(model).__name__} is not converted: call revnet.convert(model) first."
            )

    @property
    def bits(self) -> int | list[int]:
        """log₂(1/μ), one number or one per layer. Switches at any time between forward passes."""
        bits = [bits for stack in self.stacks for bits in stack.bits]
        return bits[0] if len(set(bits)) == 1 else bits

    @bits.setter
    def bits(self, bits: int | Sequence[int]) -> None:
        for stack, values in zip(self.stacks, self._split(_checked(bits), "bits"), strict=True):
            stack.bits = values

    @property
    def execution(self) -> ExecutionName | list[ExecutionName]:
        """The execution of the layers, one name or one per layer. Switches at any time."""
        names: list[Any] = [name for stack in self.stacks for name in stack.execution]
        return names[0] if len(set(names)) == 1 else names

    @execution.setter
    def execution(self, execution: ExecutionName | Sequence[ExecutionName]) -> None:
        for stack, names in zip(self.stacks, self._split(execution, "execution"), strict=True):
            stack.execution = names

    def _split(self, values: Any, name: str) -> list[list[Any]]:
        """Return the values for the layers of each stack."""
        counts = [len(stack.layers) for stack in self.stacks]
        if isinstance(values, int | str):
            return [[values] * count for count in counts]
        values = list(values)
        if len(values) != sum(counts):
            raise ValueError(
                f"{name} has {len(values)} entries for {sum(counts)} converted layers: give one "
                f"for all, or one per layer"
            )
        return [[values.pop(0) for _ in range(count)] for count in counts]

    def anneal(self, progress: float, first: int = 3, last: int = LARGEST_BITS) -> None:
        """Set `bits` on a straight line from `first` to `last`, towards the ordinary network.

        Args:
            progress: from 0 to 1: the share of the annealing that is done.
            first, last: bits at its two ends.
        """
        self.bits = round(first + (last - first) * min(max(progress, 0.0), 1.0))

    def check(self) -> None:
        """Wait for the devices and raise if a stream left the range of its format.

        Raises:
            ReversibleError: names the layer, the magnitude and what to set.
        """
        for stack in self.stacks:
            stack.check()

    def calibrate(self, batch: Any) -> None:
        """Choose the range of each stack from one batch, evaluated without gradients.

        Args:
            batch: a mapping of keywords, a tuple of arguments, or one argument of the model.
        """
        model, training = self._model, [module.training for module in self._model.modules()]
        for stack in self.stacks:
            if isinstance(stack.streams, Fixed):
                stack.unseen = set(range(len(stack.layers)))
        devices = devices_of(list(model.parameters()))
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device.index or 0 for device in devices]):
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*(batch if isinstance(batch, tuple) else (batch,)))
        finally:
            for module, flag in zip(model.modules(), training, strict=True):
                module.training = flag

    def state_dict(self) -> dict[str, Any]:
        """Return bits, execution and ranges by name of the stack, as numbers and names (JSON)."""
        return {stack.name: stack.numbers() for stack in self.stacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, to resume training.

        Raises:
            ReversibleError: the state is that of other stacks.
        """
        counts = {stack.name: len(stack.layers) for stack in self.stacks}
        given = {name: len(numbers["bits"]) for name, numbers in state.items()}
        if counts != given:
            raise ReversibleError(
                f"the state is that of stacks {given} (layers by name), but the model has "
                f"{counts}: load it into a conversion of the same model"
            )
        for stack in self.stacks:
            stack.set_numbers(state[stack.name])

    def __repr__(self) -> str:
        lines = [f"Conversion of {type(self._model).__name__}"]
        for stack in self.stacks:
            lines.append(
                f"  {stack.name or 'the model itself'}: {len(stack.layers)} × {stack.kind}, "
                f"{_rule_text(stack)}, {_range_text(stack)}, execution={_short(stack.execution)}"
            )
            outside = {stack.layers[place]: why for place, why in stack.outside.items()}
            lines += [f"    left out: {name} ({why})" for name, why in outside.items()]
        lines += [f"  left out: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    rule: Literal["momentum", "two-stream"] = "momentum",
    bits: int | Sequence[int] = 3,
    streams: Literal["fixed", "float"] | Fixed | Float = "fixed",
    execution: ExecutionName | Sequence[ExecutionName] = "invert",
    calibrate: Any = None,
    preserve_rng_state: bool = True,
    determinism_check: Literal["default", "none", "exact"] = "default",
    tile: Mapping[str, int] = {},
) -> Conversion:
    """Put the residual layers of a model in reversible form, in place and with unchanged weights.

    A layer `x → x + f(x)` becomes `v ← μ v + (1-μ) f(x)`, `x ← x + v`, with μ = 2^-bits, and
    returns `x + μ/(1-μ) v`, the residual stream of the ordinary network. Names, `state_dict` and
    hooks stay. Every layer runs when the model's own loop calls it.

    Args:
        model: any module with stacks of residual layers.
        layers: names of a ModuleList, Sequential or ModuleDict in it; found if not given.
        rule: `"momentum"` stays close to the ordinary network, pretrained or not; `"two-stream"`
            keeps no bits, is for training from scratch alone, and has no way back: weights do not
            carry over in either direction.
        bits: 1 to 8 per element and layer, one number or one per layer: fewer take less memory,
            more are closer to the ordinary network.
        streams: `"fixed"` chooses the range from the first batch; a `revnet.Fixed` sets it;
            `"float"` holds the tensors themselves.
        execution: `"store"`, `"select"`, `"checkpoint"`, `"offload"` or `"invert"`, of all layers
            or one per layer; see `revnet.ReversibleSequence`.
        calibrate: a batch that sets the range at once: a mapping, a tuple, or one argument.
        preserve_rng_state: as in `revnet.ReversibleSequence`.
        determinism_check: `"default"`, `"none"` or `"exact"`, as in `revnet.ReversibleSequence`.
        tile: parts of each layer that treat tokens (dimension -2) independently, and on how many
            they run at a time, as in `{"mlp": 4096}`.

    Returns:
        The conversion, which prints what was found, and sets bits and execution anew.

    Raises:
        ReversibleError, ValueError: no stack, layers that cannot be converted; an unknown option.

    Reference: Sander et al. 2021, arXiv:2102.07870; Maclaurin et al. 2015, arXiv:1502.03492.
    """
    bits = _checked(bits)
    _check(model, rule, streams, execution, determinism_check)
    found = find(model) if layers is None else named(model, layers)
    format_: Any = None if streams == "fixed" else streams_of(streams)
    options = Options(preserve_rng_state, determinism_check, None)
    parts = parts_of(found, tile)
    conversion = _enter(model, found, layers is not None, rule, format_, options)
    try:
        conversion.bits, conversion.execution = bits, execution
    except ValueError:
        unconvert(model)
        raise
    cut_into_tiles(parts)
    if calibrate is not None:
        conversion.calibrate(calibrate)
    return conversion


_FROM_SCRATCH = (
    "rule='two-stream' is for training from scratch: pretrained weights do not carry over "
    "(SmolLM2-135M: a loss of 3.72 becomes 16.6). Use rule='momentum' (3.74)."
)


def _check(
    model: nn.Module,
    rule: str,
    streams: str | Fixed | Float,
    execution: str | Sequence[str],
    determinism_check: str,
) -> None:
    resolve(execution, 1 if isinstance(execution, str) else len(execution))
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(map(repr, RULES))}")
    if determinism_check not in ("default", "none", "exact"):
        raise ValueError(
            f"determinism_check {determinism_check!r} is not 'default', 'none' or 'exact'"
        )
    if cast(Any, streams) == "auto":
        raise ValueError("streams 'auto' is not 'fixed', 'float' or a revnet.Fixed")
    if any(KEY in vars(module) for module in model.modules()):
        raise ReversibleError(
            f"{type(model).__name__} is converted already. Change bits and execution on its "
            f"Conversion, or call revnet.unconvert(model) first."
        )
    if rule == "two-stream" and was_loaded(model):
        warnings.warn(_FROM_SCRATCH, stacklevel=callers_level())


def _enter(
    model: nn.Module,
    found: list[Found],
    chosen: bool,
    rule: str,
    format_: Fixed | Float | None,
    options: Options,
) -> Conversion:
    """Give the layers that were found their stacks and classes."""
    for each in found:
        _check_layers(each)
    for each in found:
        count = len(each.layers)
        stack = Stack(
            each.name,
            list(each.layers),
            each.kind,
            chosen,
            rule,
            [1] * count,
            format_,
            ["invert"] * count,
            options,
        )
        # Its memory holds the layers, which hold the stack: in this cycle they would outlive the
        # model until the garbage collector runs.
        weakref.finalize(model, _forget, weakref.ref(stack.memory))
        for place, layer in enumerate(each.layers.values()):
            layer.__dict__[KEY] = (stack, place)
            own: Any = type(layer)
            layer.__class__ = converted_class(own)
    for module in model.modules():
        inside = any(KEY in vars(child) for child in module.modules() if child is not module)
        around: Any = type(module)
        if inside and checkpoints_blocks(module):
            module.__class__ = switching_class(around)
        elif inside and isinstance(module, nn.TransformerEncoder):
            module.__class__ = dense_class(around)
    conversion = Conversion(model)
    conversion.left_out = {name: why for each in found for name, why in each.left_out.items()}
    return conversion


def _forget(reference: weakref.ref[Memory]) -> None:
    """Empty a memory that is still there."""
    memory = reference()
    if memory is not None:
        memory.forget()


def unconvert(model: nn.Module) -> nn.Module:
    """Make a converted model the ordinary network again, in place; returns it.

    Raises:
        ReversibleError: the model is not converted, or sharded by FSDP2.
    """
    converted = [module for module in model.modules() if KEY in vars(module)]
    if not converted:
        raise ReversibleError(
            f"{type(model).__name__} is not converted: call revnet.convert(model) first."
        )
    for module in converted:
        if OWN not in vars(type(module)):
            raise ReversibleError(
                f"{type(module).__name__} was given another class after its conversion (by "
                f"fully_shard?). Load the state_dict into an ordinary model instead."
            )
    for module in model.modules():
        if OWN in vars(type(module)):
            module.__class__ = vars(type(module))[OWN]
            vars(module).pop(KEY, None)
            vars(module).pop(TILE, None)
    return model


def _check_layers(found: Found) -> None:
    """Raise where a layer cannot be converted."""
    for name, layer in found.layers.items():
        kind = type(layer)
        if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
            raise ReversibleError(
                f"{name} is sharded by FSDP2 already: call revnet.convert before fully_shard."
            )
        if kind.__name__ == "FullyShardedDataParallel":
            raise ReversibleError(
                f"{name} is wrapped by FSDP1, which replaces the parameters of its layers: use "
                f"FSDP2 (torch.distributed.fsdp.fully_shard) after revnet.convert."
            )
        if "forward" in vars(layer):
            raise ReversibleError(
                f"{name} has a forward of its own on the instance, as accelerate sets it for a "
                f"device_map over several devices: call revnet.convert before that."
            )
        if "_checkpoint_wrapped_module" in layer._modules:
            raise ReversibleError(
                f"{name} is wrapped in activation checkpointing, which conversion replaces: call "
                f"revnet.convert without it."
            )


def _checked(bits: int | Sequence[int]) -> int | list[int]:
    values = list(bits) if isinstance(bits, Iterable) else [bits]
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_BITS:
            raise ValueError(
                f"bits {value!r}: expected an integer from 1 to {LARGEST_BITS}, one for all layers "
                f"or one per layer"
            )
    return bits if isinstance(bits, int) else values


def _short(values: Sequence[Any]) -> str:
    return repr(values[0]) if len(set(values)) == 1 else repr(list(values))


def _rule_text(stack: Stack) -> str:
    if stack.rule_name != "momentum":
        return f"rule={stack.rule_name!r}"
    return f"rule='momentum', bits={_short(stack.bits)}"


def _range_text(stack: Stack) -> str:
    if not isinstance(stack.streams, Fixed):
        return "float streams"
    text = f"range ±{stack.streams.limit:.6g} (fraction_bits={stack.streams.fraction_bits})"
    if len(stack.unseen) == len(stack.layers):
        return f"{text} until the first batch is seen"
    if stack.largest:
        return f"{text}, {HEADROOM} × {stack.largest:.3g} seen"
    return text
