"""What all programs of steps share: streams, execution, and a pass over the steps."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVarTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from . import _precision
from ._compiled.function import active, kinds_of_layers, outside, run_traced
from ._couplings import Coupling
from ._engine import Call, ContextFn, Options
from ._errors import ReversibleError
from ._execution import EXECUTIONS, ExecutionName, resolve
from ._forgotten import attention_weights
from ._inverse import inverted, traceable
from ._plan import Plan
from ._routing import (
    explain,
)
from ._state.fsdp import LOW_PRECISION, casts_to_low_precision
from ._state.structure import Memory
from ._step import BoundStep
from ._streams.arithmetic import FixedArithmetic, FloatArithmetic
from ._streams.fixed import Fixed, fitting_fraction_bits
from ._streams.format import Float
from ._streams.monitor import OutOfRange, RangeMonitor
from ._taps import Taps
from ._tile import Tile
from ._torch import compile_branch
from ._trees import tree_leaves

Execution = ExecutionName | Sequence[ExecutionName] | Plan
Streams = Literal["auto", "fixed", "float"] | Fixed | Float
DeterminismCheck = Literal["default", "none", "exact"]
Values = TypeVarTuple("Values")
# The steps of one pass, each with its index in the program: some may be left out.
BoundSteps = Sequence[tuple[int, BoundStep]]


@dataclass
class Settings:
    """What a program was told to do. The blocks of a sequence share those of the sequence."""

    options: Options
    streams: Streams = "auto"
    execution: Execution = "invert"
    executions: list[Any] = field(default_factory=list)
    # Of the blocks of a sequence: the rule, additive if None, and whether the first begins at rest.
    coupling: Coupling | None = None
    begins: bool = False
    # Of the branches of blocks, how many tokens each reads at a time.
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    # Whether it was said that hooks cast the streams to low precision.
    warned: bool = False
    # Whether extra outputs were looked at: once, as that waits for the device.
    looked: bool = False


class Program(nn.Module):
    """What all programs share: the choice of streams and execution, and a pass over the steps.

    A subclass says which steps a pass consists of, in `_parts`.
    """

    _allowed: Sequence[str] = EXECUTIONS
    # Whether a step can be undone in fixed streams alone.
    _needs_fixed = False

    def __init__(
        self,
        steps: int,
        streams: Streams,
        execution: Execution,
        preserve_rng_state: bool = True,
        determinism_check: DeterminismCheck = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        super().__init__()
        if determinism_check not in ("default", "none", "exact"):
            raise ValueError(
                f"determinism_check {determinism_check!r} is not 'default', 'none' or 'exact'"
            )
        self._count = steps
        self._settings = Settings(Options(preserve_rng_state, determinism_check, context_fn))
        self.streams = streams
        self._monitor = RangeMonitor()
        self._memory = Memory()
        self.execution = execution

    def _parts(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundSteps:
        """The steps of one pass, after a look at what it is given."""
        raise NotImplementedError

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each branch by itself; the engine runs around them, with all it does otherwise.

        Branches of one class share what is compiled, and torch's own modules are compiled as well.
        A branch that was compiled before by itself stays as it is. For one graph of the whole, use
        `torch.compile(net)`; see `docs/compile.md`.

        Args:
            *args, **options: those of `torch.compile`, for each branch: `fullgraph=True` raises
                where the graph of a branch would break.
        """
        for branch in dict.fromkeys(self._own_branches):
            compile_branch(branch, *args, **options)

    @property
    def _own_branches(self) -> Iterable[nn.Module]:
        """The modules that steps call."""
        raise NotImplementedError

    @property
    def _random_depth(self) -> bool:
        """Whether the steps of a pass are drawn at random."""
        return False

    @property
    def _makes_rules(self) -> bool:
        """Whether a pass makes modules for its rules, into which a tracer cannot look."""
        return self._settings.coupling is not None

    @property
    def _called_blocks(self) -> Sequence[nn.Module]:
        """Modules that a pass enters by their `__call__`."""
        return ()

    def _through(self, call: Call, parts: BoundSteps, taps: Taps | None) -> Sequence[Any]:
        """Apply the steps; return the streams where a block returned others than its steps."""
        return _apply(call, parts, taps)

    def _tapped(self, *streams: Any) -> Any:
        """Return what a caller gets of the streams: at the end, or of a tap on the way."""
        return streams

    def _run(
        self,
        streams: Sequence[Any],
        kwargs: Mapping[str, Any],
        positions: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """Return the streams after one pass, and a dict of extra outputs if there are any.

        Between them comes the list of what was read at `positions`, unless None.
        """
        again = partial(self._run, streams, kwargs, positions)
        if (self._random_depth or self._makes_rules) and torch.compiler.is_dynamo_compiling():
            return tuple(outside(again))
        parts = self._parts(streams, kwargs)
        taps = None if positions is None else Taps(positions, self._tapped)
        return self._pass(streams, parts, again, self._through, taps)

    def _invert(self, streams: Sequence[Any], parts: BoundSteps) -> tuple[Any, ...]:
        """Return the streams before these steps, and extra outputs: a pass of its own."""
        again = partial(self._invert, streams, parts)
        if torch.compiler.is_dynamo_compiling() and not traceable(parts):
            return tuple(outside(again))
        return self._pass(streams, inverted(parts), again, _apply)

    def _pass(
        self,
        streams: Sequence[Any],
        parts: BoundSteps,
        again: Callable[[], tuple[Any, ...]],
        through: Callable[[Call, BoundSteps, Taps | None], Sequence[Any]],
        taps: Taps | None = None,
    ) -> tuple[Any, ...]:
        """Return the streams after these steps, and a dict of extra outputs if there are any.

        Args:
            streams: those before the first step.
            parts: the steps.
            again: does the same outside of a graph.
            through: applies the steps to a call.
            taps: read the streams on the way.
        """
        leaves = [leaf for stream in streams for leaf in tree_leaves(stream)]
        self._check_plan(*leaves)
        arithmetic = self._arithmetic(*leaves)
        if active():
            executions, blocks = self._executions, self._called_blocks
            why = self._unsupported(parts)
            return tuple(
                run_traced(parts, streams, arithmetic, executions, again, blocks, why, taps)
            )
        with self._call(streams, arithmetic) as call:
            try:
                last = through(call, parts, taps)
            except Exception as error:
                if call.at is not None and not isinstance(error, ReversibleError):
                    error.add_note(explain(error, call.at, getattr(self, "args_route", None)))
                raise
            outputs = tuple(call.finish(*last))
            del last
            if taps is not None:
                taps.reach(self._count, outputs)
                outputs = (*outputs, taps.results())
            self._monitor.flush()
            if call.aux and not self._settings.looked and not call.capturing:
                self._settings.looked = True
                if warning := attention_weights(call.aux, outputs[0]):
                    warnings.warn(warning, stacklevel=callers_level())
            if isinstance(self.execution, Plan):
                # In a backward inside autocast, casts of biases would take memory beside the plan.
                torch.clear_autocast_cache()
            return (*outputs, call.aux) if call.aux else outputs

    def _unsupported(self, parts: BoundSteps) -> str:
        """Return why only the engine can replay these steps; empty if graphs can, too."""
        if self._settings.options.replays_specially:
            return "context_fn and determinism_check='exact' take effect only in engine replays"
        if any(part.tile is not None for _, part in parts):
            return "a step runs in tiles, which in a graph would all be there at once"
        return ""

    def _call(self, streams: Sequence[Any], arithmetic: FloatArithmetic | FixedArithmetic) -> Call:
        """Return the call in which a pass over these streams runs."""
        options = self._settings.options
        return Call(streams, arithmetic, options, self._executions, self._memory, chains=True)

    def _check_plan(self, *leaves: Tensor) -> None:
        """Raise if the input is larger than that for which the plan in force was made."""
        if isinstance(self.execution, Plan) and torch.is_grad_enabled():
            self.execution.check_input(*leaves)

    def _arithmetic(self, *leaves: Tensor) -> FloatArithmetic | FixedArithmetic:
        """How this call holds its streams, after a look at what earlier calls found."""
        fixed = self._format(leaves)
        if not isinstance(fixed, Fixed):
            return FloatArithmetic()
        if not active():
            self._raise(self._monitor.poll(), fixed)
        # An exported program has no monitor to tell.
        return FixedArithmetic(fixed, None if torch.compiler._is_exporting_flag else self._monitor)

    def _format(self, leaves: Sequence[Tensor]) -> Fixed | Float:
        """The format of streams that start as these tensors."""
        if isinstance(self.streams, Fixed | Float):
            return self.streams
        # One stream in low precision is enough for wrong gradients.
        low = any(leaf.dtype in LOW_PRECISION for leaf in leaves)
        device = leaves[0].device.type
        # The meta device has no autocast.
        low = low or (device != "meta" and torch.is_autocast_enabled(device))
        low = low or (not active() and casts_to_low_precision(self._called_blocks))
        if not low and any(leaf.dtype is torch.float32 for leaf in leaves):
            low = self._rounds_products(device)
        return (
            Fixed() if low or (self._needs_fixed and leaves[0].dtype is torch.float32) else Float()
        )

    def _rounds_products(self, device: str) -> bool:
        """Check whether branches may compute products of float32 in TF32 or bfloat16."""
        if device not in _precision.DEVICES:
            return False
        if getattr(_precision, f"{device}_matmul"):
            return True
        kinds = [kind for kind in ("conv", "rnn") if getattr(_precision, f"{device}_{kind}")]
        if not kinds:
            return False
        present = kinds_of_layers(self, self._memory)
        return any(kind in present for kind in kinds)

    def check(self) -> None:
        """Wait for the device and raise if a stream left the range of its format.

        Without this call, the error is raised by the first forward pass after the news has reached
        the host.

        Raises:
            ReversibleError: a branch whose update left the range, was infinite or not a number.
        """
        fixed = self.streams if isinstance(self.streams, Fixed) else Fixed()
        self._raise(self._monitor.check(), fixed)

    def _raise(self, found: OutOfRange | None, fixed: Fixed) -> None:
        for step, share in self._monitor.vanishing().items():
            warnings.warn(
                f"{self._step_name(step)}: {share:.0%} of its nonzero outputs are smaller than "
                f"half of 2^-{fixed.fraction_bits}, the resolution of the streams, and change "
                f"nothing. Use more fraction bits, as in streams=revnet.Fixed(fraction_bits=37).",
                stacklevel=callers_level(),
            )
        if found is None:
            return
        self._monitor.reset()
        bits = fitting_fraction_bits(found.magnitude)
        remedy = "Look for the cause in this branch."
        if bits is not None:
            remedy = f"Use streams=revnet.Fixed(fraction_bits={bits}) or fewer fraction bits."
        raise ReversibleError(
            f"{self._step_name(found.step)}: a stream left the range of {fixed}, "
            f"±{fixed.limit:.6g}: the largest value was {found.magnitude:.6g}. The output of that "
            f"forward pass is NaN there. {remedy}"
        )

    def _step_name(self, step: int) -> str:
        return "the input" if step < 0 else f"step {step}"

    @property
    def streams(self) -> Streams:
        """How streams are held. Switches at any time."""
        return self._settings.streams

    @streams.setter
    def streams(self, streams: Streams) -> None:
        self._settings.streams = streams_of(streams)

    @property
    def execution(self) -> Execution:
        """What stays of each step until backward; see `revnet.plan`. Switches at any time."""
        return self._settings.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        names = execution.for_steps(self._count) if isinstance(execution, Plan) else execution
        self._settings.executions = resolve(names, self._count, self._allowed)
        self._settings.execution = execution
        if isinstance(execution, Plan) and execution.tile:
            self._retile(execution.tile)

    @property
    def _tiling(self) -> Mapping[Any, Tile]:
        """The tiles of the steps that run in tiles, by letter or number."""
        return {}

    @_tiling.setter
    def _tiling(self, tiles: Mapping[Any, Tile]) -> None:
        raise NotImplementedError

    def _retile(self, size: int) -> None:
        """Set the tokens in a tile of each step that runs in tiles."""
        self._tiling = {key: replace(tile, size=size) for key, tile in self._tiling.items()}

    @property
    def _executions(self) -> list[Any]:
        """One execution for each step."""
        return self._settings.executions

    def extra_repr(self) -> str:
        streams = repr(self.streams)
        if self.streams == "auto":
            where = "below float64" if self._needs_fixed else "in low precision"
            streams += f" ({Fixed()!r} {where}, else {Float()!r})"
        return f"streams={streams}, execution={self.execution!r}"


def _apply(call: Call, parts: BoundSteps, taps: Taps | None = None) -> Sequence[Any]:
    for index, part in parts:
        if taps is not None:
            taps.reach(index, call.values)
        call.step(index, part)
    return ()


def output_and_aux(net: Program, x: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Call a module of one input; return its output, and the extra outputs, which may be none."""
    if kwargs.get("taps") is not None:
        raise TypeError("with_aux takes no taps: call the module itself")
    found: Any = net(x, **kwargs)
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
    # An output may be such a pair itself, if the input is one.
    if pair and tree_structure(found) != tree_structure(x):
        return found[0], found[1]
    return found, {}


def callers_level() -> int:
    """Return the `stacklevel` with which a warning names the line that called the library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "revnet",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level


def streams_of(streams: Streams) -> Streams:
    named: dict[Any, Streams] = {"auto": "auto", "fixed": Fixed(), "float": Float()}
    if isinstance(streams, Fixed | Float):
        return streams
    if streams not in named:
        raise ValueError(f"streams {streams!r} is not 'auto', 'fixed', 'float' or a revnet.Fixed")
    return named[streams]


def check_stream(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, but a stream is a tensor")
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: a stream is a dense tensor. Pad it, and pass a mask by "
            f"args_route."
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}, but a stream is floating-point")
