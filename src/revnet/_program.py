"""Programs of steps: what all of them share, and the general one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVarTuple, cast

import torch
from torch import Tensor, nn

from ._compiled.function import active, outside, run_traced
from ._engine import Call, ContextFn, Options
from ._errors import ReversibleError
from ._execution import EXECUTIONS, ExecutionName, resolve
from ._plan import Plan
from ._routing import check_keywords
from ._state.fsdp import LOW_PRECISION, casts_to_low_precision
from ._state.modules import Memory
from ._step import BoundStep, Step
from ._streams.arithmetic import FixedArithmetic, FloatArithmetic, undo
from ._streams.fixed import Fixed, fitting_fraction_bits
from ._streams.format import Float
from ._streams.monitor import OutOfRange, RangeMonitor
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
    # Whether it was said that hooks cast the streams to low precision.
    warned: bool = False


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

    @property
    def _random_depth(self) -> bool:
        """Whether the steps of a pass are drawn at random."""
        return False

    @property
    def _called_blocks(self) -> Sequence[nn.Module]:
        """Modules that a pass enters by their `__call__`."""
        return ()

    def _through(self, call: Call, parts: BoundSteps) -> Sequence[Any]:
        """Apply the steps; return the streams where a block returned others than its steps."""
        for index, part in parts:
            call.step(index, part)
        return ()

    def _run(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the streams after one pass, and a dict of extra outputs if there are any."""
        again = partial(self._run, streams, kwargs)
        if self._random_depth and torch.compiler.is_dynamo_compiling():
            return tuple(outside(again))
        parts = self._parts(streams, kwargs)
        leaves = [leaf for stream in streams for leaf in tree_leaves(stream)]
        self._check_plan(*leaves)
        arithmetic = self._arithmetic(*leaves)
        if active():
            obstacle = ""
            if self._settings.options.replays_specially:
                obstacle = (
                    "context_fn and determinism_check='exact' take effect only in engine replays"
                )
            return tuple(
                run_traced(
                    parts,
                    streams,
                    arithmetic,
                    self._executions,
                    again,
                    self._called_blocks,
                    obstacle,
                )
            )
        with self._call(streams, arithmetic) as call:
            outputs = tuple(call.finish(*self._through(call, parts)))
            self._monitor.flush()
            if isinstance(self.execution, Plan):
                # In a backward inside autocast, casts of biases would take memory beside the plan.
                torch.clear_autocast_cache()
            return (*outputs, call.aux) if call.aux else outputs

    def _call(self, streams: Sequence[Any], arithmetic: FloatArithmetic | FixedArithmetic) -> Call:
        """Return the call in which a pass over these streams runs."""
        options = self._settings.options
        return Call(streams, arithmetic, options, self._executions, self._memory)

    def _undo(self, streams: Sequence[Any], parts: BoundSteps) -> tuple[Any, ...]:
        """The streams before the steps, from those after them."""
        found = list(streams)
        for _, part in reversed(parts):
            undo(found, part.fn, part.target, part.source, part.coupling, part.kwargs)
        return tuple(found)

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
        low = low or torch.is_autocast_enabled(leaves[0].device.type)
        low = low or (not active() and casts_to_low_precision(self._called_blocks))
        return (
            Fixed() if low or (self._needs_fixed and leaves[0].dtype is torch.float32) else Float()
        )

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
        self._settings.streams = _streams(streams)

    @property
    def execution(self) -> Execution:
        """What stays of each step until backward; see `revnet.plan`. Switches at any time."""
        return self._settings.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        names = execution.for_steps(self._count) if isinstance(execution, Plan) else execution
        self._settings.executions = resolve(names, self._count, self._allowed)
        self._settings.execution = execution

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


class Reversible(Program):
    """Steps over any number of streams, whose activation memory does not grow with depth.

    Streams are tensors, or trees (dicts, lists, tuples) of tensors, of any shapes. The same `Step`
    object may occur many times: its parameters are registered once.

    Args:
        steps: in the order in which they are applied.
        args_route: for each keyword of the forward pass, one boolean per step: whether its branch
            takes it.
        streams: `"auto"`, `"fixed"`, `"float"` or a `revnet.Fixed`; see `ReversibleSequence`.
            `"auto"` is fixed also for float32 where a step scales
            its target, which float streams cannot undo.
        execution: `"invert"`, `"store"`, `"checkpoint"`, `"select"` or `"offload"` for all steps,
            one of them per step, or a `revnet.Plan`; see `ReversibleSequence`. Where a step is to
            `"invert"` but cannot be undone in the streams of the call, it keeps its target: see
            `revnet.Coupling`.
        preserve_rng_state, context_fn: as in `ReversibleSequence`.
        determinism_check: `"default"`, `"none"` or `"exact"`; see `ReversibleSequence`.

    Raises:
        ValueError: no steps, a route of another length, or an unknown option.
        TypeError: a step that is not a `Step`.

    Example:
        >>> steps = [Step(nn.Linear(8, 8), target=i % 3, source=(i + 1) % 3) for i in range(6)]
        >>> net = Reversible(steps)
        >>> [tuple(y.shape) for y in net(*torch.randn(3, 2, 8))]
        [(2, 8), (2, 8), (2, 8)]
    """

    def __init__(
        self,
        steps: Iterable[Step],
        *,
        args_route: Mapping[str, Sequence[bool]] = {},
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: DeterminismCheck = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        program = list(steps)
        if not program:
            raise ValueError("steps is empty: give at least one revnet.Step")
        for i, step in enumerate(program):
            if not isinstance(step, Step):
                raise TypeError(
                    f"step {i} is {type(step).__name__}, but a program consists of revnet.Step"
                )
        for key, route in args_route.items():
            if len(route) != len(program):
                raise ValueError(
                    f"args_route[{key!r}] has {len(route)} entries for {len(program)} steps: give "
                    f"one boolean per step"
                )
        super().__init__(
            len(program), streams, execution, preserve_rng_state, determinism_check, context_fn
        )
        places = {step: place for place, step in enumerate(dict.fromkeys(program))}
        self.steps = nn.ModuleList(places)
        self._order = [places[step] for step in program]
        self.args_route = dict(args_route)
        self._width = 1 + max(max((step.target, *step.source)) for step in places)
        undoes = FloatArithmetic().undoes
        self._needs_fixed = any(
            step.coupling.scales and not undoes(step.coupling) for step in places
        )

    if TYPE_CHECKING:

        def __call__(self, *streams: *Values, **kwargs: Any) -> tuple[*Values]: ...

    def with_aux(self, *streams: *Values, **kwargs: Any) -> tuple[tuple[*Values], dict[str, Any]]:
        """Call the module; return the streams, and the extra outputs, which may be none.

        The result has one form, and one type, whether branches return extra outputs or not.

        Args:
            *streams, **kwargs: as in `forward`.

        Returns:
            The tuple of streams, and a dict from step, such as "step 3", to extra output.
        """
        found: Any = self(*streams, **kwargs)
        count = len(streams)
        return found[:count], found[count] if len(found) > count else {}

    def forward(self, *streams: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The streams after the last step.

        Args:
            streams: tensors, or trees of tensors, floating-point: as many as the steps refer to, or
                more.
            **kwargs: passed to the branches that `args_route` names.

        Returns:
            As many streams, and a dict from step to extra output if branches returned `(update,
            aux)`.
        """
        return self._run(streams, kwargs)

    def inverse(self, *streams: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The streams before the first step, from those after the last; differentiable.

        Computed in floating point, so exact up to rounding. Randomness is not repeated: call it in
        `eval()`, or without dropout.
        """
        return self._undo(streams, self._parts(streams, kwargs))

    def _parts(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundSteps:
        if len(streams) < self._width:
            raise ValueError(f"got {len(streams)} streams, but the steps refer to {self._width}")
        if not any(map(tree_leaves, streams)):
            raise ValueError("the streams hold no tensors: give at least one")
        for i, stream in enumerate(streams):
            for leaf in tree_leaves(stream):
                check_stream(leaf, f"stream {i}")
        check_keywords(self.args_route, kwargs)
        routed = {key: value for key, value in kwargs.items() if key in self.args_route}
        steps = cast(list[Step], list(self.steps))
        parts = []
        for i, place in enumerate(self._order):
            step = steps[place]
            keywords = {key: value for key, value in routed.items() if self.args_route[key][i]}
            parts.append(
                (i, BoundStep(f"step {i}", step, step.coupling, step.target, step.source, keywords))
            )
        return parts


def callers_level() -> int:
    """Return the `stacklevel` with which a warning names the line that called the library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "revnet",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level


def _streams(streams: Streams) -> Streams:
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
