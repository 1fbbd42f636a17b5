"""The forward pass: runs the steps under hooks, and records what their replays need."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from .._couplings import Additive
from .._errors import ReversibleError
from .._execution import STORE, Execution
from .._kept import Saved
from .._source import Adapter, branch_of
from .._state.branch import is_compiled
from .._state.call_state import StepState
from .._state.environment import Environment
from .._state.modules import ModuleState
from .._state.random import RandomState, devices_of
from .._state.results import Results
from .._state.structure import Memory
from .._step import BoundStep, HandOn, branch_output, hands_on
from .._streams import tiled
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic, Stream
from .._sum import Sum
from .._tile import Tiles, added
from .._torch import (
    has_any_global_hook,
    is_autocasting,
    is_capturing,
    is_faking,
    is_forward_mode,
    optimize_scripts,
    pop_saved_tensor_hooks,
    push_saved_tensor_hooks,
    records_operators,
    untraced,
    version_of,
)
from .._trees import tree_leaves
from . import chain
from .backward import Lock, recover
from .checksums import forget_inexact, tree_checksum
from .gates import Gates
from .hooks import PackHook, may_stop_at_last_save, tensors_in
from .keeping import kept_target, reads_alone
from .parts import gates_of, parts_of
from .tape import Layout, Options, Record, Tape, layout_of


class Call:
    """One forward pass over streams.

    Args:
        streams: the streams before the first step: tensors, or trees of tensors.
        arithmetic: how streams are held, and what a step does to them.
        options: see `Options`.
        executions: the execution of every step of the sequence.
        memory: what earlier calls of the same program found.
        chains: whether to go on where a call stopped that returned exactly these streams, and to
            let another go on with this one.
    """

    @untraced
    def __init__(
        self,
        streams: Sequence[Any],
        arithmetic: FloatArithmetic | FixedArithmetic,
        options: Options,
        executions: Sequence[Execution],
        memory: Memory | None = None,
        chains: bool = False,
    ) -> None:
        self.arithmetic = arithmetic
        self.options = options
        self.executions = executions
        self.memory = Memory() if memory is None else memory
        # Where operators are noted down the recomputation would be, too, and draw new random
        # numbers: run as a plain loop there.
        self.recording = (
            torch.is_grad_enabled() and not records_operators() and not is_forward_mode()
        )
        leaves = [leaf for value in streams for leaf in tree_leaves(value)]
        self.layout_of = Layout if all(isinstance(x, Tensor) for x in streams) else layout_of
        self.devices = devices_of(leaves)
        # Read when the first of the steps under it is recorded.
        self.environment: Environment | None = None
        # Versions of the streams as a block returned them.
        self.versions: list[int] = []
        self.aux: dict[str, Any] = {}
        # The step under way, for errors.
        self.at: BoundStep | None = None
        # Of the tiled step under way.
        self.gates: Gates | None = None
        self.capturing = bool(self.devices) and is_capturing()
        self.fake = is_faking()
        # The generators after the last step, while nobody else can have drawn since.
        self.random: RandomState | None = None
        self.restores = options.preserve_rng_state and not (self.capturing or self.fake)
        self._begin(streams, chains)

    def _begin(self, streams: Sequence[Any], chains: bool) -> None:
        """Begin with these streams, where a call that returned them stopped if there is one."""
        arithmetic = self.arithmetic
        prefetch = max(map(_prefetch, self.executions), default=0)
        self.mode: chain.Mode | None = None
        continued = None
        if chains:
            self.mode = chain.Mode(self.recording, self.capturing, self.fake, self.options)
            continued = chain.go_on(streams, arithmetic, self.mode)
        # Where `pause` or the call before saved the state that the next one replaces.
        self.paused: int | None = None
        if continued is None or continued.tape is None:
            self.tape = Tape(arithmetic, self.options, prefetch)
        else:
            self.tape, self.paused = continued.tape, continued.position
            self.tape.prefetch = max(self.tape.prefetch, prefetch)
        self.streams: list[Stream] = (
            [arithmetic.encode(value) for value in streams]
            if continued is None
            else continued.streams
        )
        if any(isinstance(encoded, Tiles) for _, encoded in self.streams):
            self.tape.tiled = True

    @untraced
    def enter(self, *streams: Any) -> None:
        """Continue from a block's inputs, which a hook may have replaced (rule 9)."""
        self._check_unwritten()
        self.environment = None
        if all(
            chain.same_stream(value, given)
            for (value, _), given in zip(self.streams, streams, strict=True)
        ):
            self.streams = [
                (value, encoded) for value, (_, encoded) in zip(streams, self.streams, strict=True)
            ]
            return
        # A hook on the block put other streams in: below this point state cannot be found by
        # walking. As after a stored step, the state before it and after it are two positions.
        if self.recording and self.tape.follows_rebuilt():
            self.tape.add_barrier(self.streams)
        self.layout_of = layout_of
        self.streams = [self.arithmetic.encode(value) for value in streams]

    @untraced
    def steps(self, parts: Sequence[tuple[int, BoundStep]]) -> None:
        """Apply steps in order, each with its index in the sequence."""
        recording, executions, tape = self.recording, self.executions, self.tape
        for index, step in parts:
            self.at = step
            if step.tile is not None or isinstance(step.fn, Sum):
                self._take_parts(index, step, False)
            elif (recording and executions[index].rebuilds) or tape.tiled:
                self._take(index, step, False)
            else:
                # What `_take` does, without its calls: a stored step costs what one of a loop does.
                if recording:
                    tape.add_barrier(self.streams)
                self.random = None
                sources = map(_value, map(self.streams.__getitem__, step.source))
                self._combine(index, step, step.fn(*sources, **step.kwargs))
            self.at = None

    @untraced
    def step(self, index: int, step: BoundStep, within: bool = False) -> None:
        """Apply a step to the streams.

        Args:
            index: of the step in the sequence.
            step: the step.
            within: whether a wrapper, such as a checkpoint, stands between the sequence and the
                step. The step is stored then, and the wrapper manages what it saves.
        """
        self.at = step
        if step.tile is None and not isinstance(step.fn, Sum):
            self._take(index, step, within)
        else:
            self._take_parts(index, step, within)
        self.at = None

    def _take_parts(self, index: int, step: BoundStep, within: bool) -> None:
        """Apply a step that is several: each tile, or branch of a sum, is a step of its own."""
        parts = parts_of(step, self.streams)
        if parts[0].cut is not None:
            self.tape.tiled = True
            self.gates = gates_of(step, self.streams)
        try:
            for part in parts:
                self.at = part
                self._take(index, part, within)
        finally:
            self.gates = None

    def _take(self, index: int, step: BoundStep, within: bool) -> None:
        execution = STORE if within else self.executions[index]
        if execution.keeps_results and is_compiled(branch_of(step.fn)):
            execution = STORE
        if execution.keeps_target and hands_on(step.fn) and not self.tape.follows_rebuilt():
            # It saves nothing, and no walk leads here.
            execution = STORE
        streams, layout = self.streams, self.layout_of
        if self.tape.tiled:
            tiled.arrange(self.arithmetic, streams, step)
            sources, target = tiled.sources(streams, step), tiled.at(streams, step.target, step.cut)
            layout = layout_of
        else:
            sources = [streams[i][0] for i in step.source]
            target = streams[step.target]
        if not self.recording or not execution.rebuilds:
            if self.recording:
                self.tape.add_barrier(self.streams, within)
            self.random = None
            if self.gates is None:
                out = step.fn(*sources, **step.kwargs)
            else:
                out = self.gates.call(step, sources)
            self._combine(index, step, out)
            return
        alone = execution.keeps_target and reads_alone(self.tape, self.executions, index, step)
        if alone:
            self.tape.save_state(self.streams)
        # A sum of tensors saves nothing that a replay would read the target for.
        sums = type(step.coupling) is Additive and type(target[0]) is Tensor
        record = Record(
            step._replace(kwargs={}) if step.kwargs else step,
            self._state(index, step, execution),
            [layout(source) for source in sources],
            _ALONE if len(sources) == 1 else _shared(sources),
            None if sums else layout(target[0]),
            None if alone else kept_target(self.tape, execution, step, target[1], self.capturing),
            [],
        )
        # Free for who updates it.
        del target
        tape = self.tape
        hook = PackHook(record, sources, tape, recover)
        tape.append(record, hook)
        tape.running = streams
        try:
            self._run(index, step, hook, sources, alone)
        finally:
            tape.running = None
            # Autograd holds the hooks as long as what they packed.
            hook.sources = []

    def _state(self, index: int, step: BoundStep, execution: Execution) -> StepState:
        results = None
        if execution.keeps_results or self.capturing:
            results = Results(execution.keeps_results, self.capturing)
        # What `branch_of` returns, without a call.
        fn = step.fn.branch if isinstance(step.fn, Adapter) else step.fn
        number = index, step.part
        if self.environment is None:
            self.environment = Environment([device.type for device in self.devices])
        structure = self.memory.structure(number, fn, step.coupling)
        random = None
        # Hooks on all modules run there as well, and may draw.
        draws = not (type(fn) is HandOn and structure.quiet) or has_any_global_hook()
        if draws and self.restores:
            random = self.random or RandomState(self.devices)
        context_fn = self.options.context_fn
        state = StepState(step, structure, self.environment, random, results, context_fn)
        if state.modules.objects.modules and (given := state.modules.strangers()):
            # A list of modules, say, has other modules in it than in the last call.
            structure = self.memory.structure(number, fn, step.coupling, given)
            state.modules = ModuleState(structure, step.kwargs, step.name)
        return state

    def _run(
        self, index: int, step: BoundStep, hook: PackHook, sources: list[Any], alone: bool
    ) -> None:
        """Run a step so that it can be replayed; `alone`: from values that are kept for it."""
        record, before = hook.record, self.streams[step.target][0] if alone else None
        state = record.state
        versions = list(map(version_of, hook.sources))
        # Their default, if an interrupt comes before it is known.
        optimized = True
        push_saved_tensor_hooks(hook.pack, hook.unpack)
        try:
            # As in the replay.
            optimized = optimize_scripts(False)
            with state.decisions if state.unaided else state.recording(self.devices):
                if self.gates is None:
                    out = step.fn(*sources, **step.kwargs)
                else:
                    out = self.gates.call(step, sources)
            record.saved_by_branch = len(record.saved)
            if versions != list(map(version_of, hook.sources)):
                raise ReversibleError(
                    f"{step.name} changed its input in place. The stream it reads is needed to "
                    "rebuild the activations: work on a copy, or use the out-of-place operation."
                )
            if self.options.determinism_check == "exact":
                target, encoded = tiled.at(self.streams, step.target, step.cut)
                update = branch_output(out, target)[0]
                record.checksums = tree_checksum(encoded), tree_checksum(update)
            if state.quiet:
                self._combine(index, step, out)
            else:
                with state.recording_rule(self.devices):
                    self._combine(index, step, out)
        finally:
            pop_saved_tensor_hooks()
            optimize_scripts(optimized)
        if record.kept is not None or alone:
            record.stops = may_stop_at_last_save(tensors_in(out))
        if alone:
            read = dict(zip(step.source, sources, strict=True))
            if len(record.saved) > record.saved_by_branch:
                read[step.target] = before
            record.alone = Saved([read.get(i) for i in range(len(self.streams))])
        if state.random is not None:
            self.random = RandomState(self.devices)
        state.settle(self.random)

    def _surface(self) -> None:
        """Have a tensor for the value of each stream."""
        if self.tape.tiled:
            self.streams = [tiled.surfaced(stream) for stream in self.streams]

    @property
    def values(self) -> list[Any]:
        """The streams before the next step, to be looked at."""
        return [tiled.whole(value) for value, _ in self.streams]

    @untraced
    def start(self) -> list[Any]:
        """Return the streams before the next step, as branches read them."""
        self._surface()
        self.versions = self._versions()
        return [value for value, _ in self.streams]

    @untraced
    def finish(self, *streams: Any) -> Sequence[Any]:
        """Return the streams after the last step, as its block gave them.

        From now on the tape lives as long as its hooks.
        """
        self._surface()
        self._check_unwritten()
        # Another thread may walk the tape of an earlier pass.
        with contextlib.nullcontext() if self.paused is None else Lock.lock:
            self._save_end()
        if is_autocasting() and any(self.tape.records):
            # Replays cast parameters anew. A backward inside autocast needs as little as outside.
            torch.clear_autocast_cache()
        if not streams:
            streams = tuple(self.start())
        if self.mode is not None and all(
            given is value for given, (value, _) in zip(streams, self.streams, strict=True)
        ):
            chain.hand_on(self.streams, self.arithmetic, self.tape, self.mode)
        return streams

    def pause(self) -> list[Stream]:
        """Return the streams for `resume`; until then the call can be read and walked as it is.

        The state is saved here, and dropped by the next pause unless a barrier needs it. A paused
        call holds no graph: whoever holds the streams does.
        """
        self._surface()
        self._check_unwritten()
        with Lock.lock:
            self._save_end()
        streams, self.streams, self.random = self.streams, [], None
        return streams

    def _save_end(self) -> None:
        """Save the present state as the place to walk from, in place of the last that was saved."""
        tape, before, position = self.tape, self.paused, len(self.tape.records)
        tape.save_state(self.streams)
        tape.top = position - 1
        if before is not None and before < position and tape.walks_over(before):
            tape.saved_states.pop(before, None)
        self.paused = position
        if self.options.determinism_check == "exact":
            forget_inexact(tape)

    def resume(self, streams: list[Stream]) -> None:
        """Continue with the streams that `pause` returned; their values may be other tensors."""
        self.streams = streams
        self.environment = None

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *exception: Any) -> None:
        # These hold the graph.
        self.streams, self.aux, self.random, self.at = [], {}, None, None

    def _versions(self) -> list[int]:
        """Return the versions of the streams, where the last step is undone from them."""
        if not self.tape.follows_rebuilt():
            return []
        return [leaf._version for value, _ in self.streams for leaf in tree_leaves(value)]

    def _check_unwritten(self) -> None:
        if self.versions and self.versions != self._versions():
            raise ReversibleError(
                f"{self.tape.name(len(self.tape.records) - 1)}: a hook changed the streams that "
                "this step left in place. They are needed to rebuild the activations: return other "
                "tensors from the hook instead."
            )
        self.versions = []

    def _combine(self, index: int, step: BoundStep, out: Any) -> None:
        """Update the target with what the branch returned, its extra output put aside."""
        if isinstance(out, tuple):
            target = tiled.at(self.streams, step.target, step.cut)[0]
            out, aux = branch_output(out, target)
            # A tile that is held here could not be freed below.
            del target
            if aux is not None:
                before = self.aux.get(step.whole) if step.whole else None
                self.aux[step.whole or step.name] = added(before, aux, step.name)
        try:
            if self.tape.tiled:
                tiled.combine(self.arithmetic, step, self.streams, out, index)
            else:
                self.streams[step.target] = self.arithmetic.combine(
                    step.coupling, self.streams[step.target], out, index
                )
        except (TypeError, ValueError) as error:
            raise ReversibleError(f"{step.name} {error}") from error


_prefetch = attrgetter("prefetch")
_value = itemgetter(0)
# What `_shared` returns for one source.
_ALONE = [0]


def _shared(sources: list[Any]) -> list[int]:
    """Return for each source the first place that holds the same object."""
    places: dict[int, int] = {}
    return [places.setdefault(id(source), place) for place, source in enumerate(sources)]
