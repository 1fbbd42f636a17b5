"""The backward pass: walks down to the step whose tensors autograd asks for, and replays it."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .._errors import ReversibleError
from .._kept import Hosted
from .._state.undo import Undo
from .._step import branch_output
from .._streams import tiled
from .._streams.arithmetic import Stream
from .._tile import Tiles
from .._torch import (
    after_backward,
    current_backward,
    optimize_scripts,
    outside_transforms,
    pop_saved_tensor_hooks,
    push_saved_tensor_hooks,
    set_grad_mode,
    untraced,
)
from .._trees import tree_map
from . import checksums
from .hooks import PackHook, RecomputeHook, Saving, same_tensor
from .tape import Layout, Recomputed, Record, Tape

_NOTHING = contextlib.nullcontext()


class Lock:
    """Lets one replay run at a time, since replays restore modules and global generators.

    Backward may run in several threads.
    """

    lock = threading.RLock()

    @classmethod
    def renew(cls) -> None:
        """Forget who holds it: in a forked child no replay is under way."""
        cls.lock = threading.RLock()


os.register_at_fork(after_in_child=Lock.renew)


def recover(tape: Tape, hook: PackHook, number: int) -> Saving:
    """Return the tensor that was saved under a number, and the version that it has now."""
    lock = Lock.lock
    taken: list[bool] = []
    # Twice, and without `with`: an interrupt at its end would leave the lock taken.
    try:
        try:
            taken.append(lock.acquire())
            return _recover(tape, hook, number)
        finally:
            _release(lock, taken)
    finally:
        _release(lock, taken)


def _release(lock: Any, taken: list[bool]) -> None:
    if taken:
        _ = lock.release(), taken.pop()


def _recover(tape: Tape, hook: PackHook, number: int) -> Saving:
    backward = current_backward()
    collected = hook.recomputed.get(backward)
    # Another thread may have been here.
    if collected is None or number not in collected:
        try:
            recomputed = tape.backwards.get(backward) or _begin(tape, backward)
            with outside_transforms():
                collected = _walk(tape, recomputed, hook)
        except BaseException:
            tape.backwards.pop(backward, None)
            raise
        if backward != -1:
            hook.recomputed[backward] = collected
    return collected.pop(number)


def _begin(tape: Tape, backward: int) -> Recomputed:
    recomputed = Recomputed()
    if backward == -1:
        return recomputed
    tape.backwards[backward] = recomputed
    after_backward(partial(_forget, weakref.ref(tape), backward))
    return recomputed


@untraced
def _forget(reference: weakref.ref[Tape], backward: int) -> None:
    """Free what a backward call recomputed, at its end."""
    tape = reference()
    if tape is not None:
        tape.backwards.pop(backward, None)
        for hook_reference in tape.hooks:
            if (hook := hook_reference()) is not None:
                hook.forget(backward)


def _nearest(tape: Tape, recomputed: Recomputed, step: int) -> tuple[int, list[Stream]]:
    """Return the lowest state from which `step` can be reached, and its position (rule 2)."""
    if (
        recomputed.position == step + 1
        and step not in tape.saved_states
        and tape.running is None
        and not tape.joints
    ):
        # Most walks begin where the last one ended.
        return step + 1, recomputed.state
    candidates = [position for position in tape.saved_states if position >= step]
    running = len(tape.records) - 1 if tape.running is not None else None
    if running is not None:
        candidates.append(running)
    if recomputed.position is not None and recomputed.position >= step:
        candidates.append(recomputed.position)
    if tape.joints and (joint := tape.joint_state(step, min(candidates, default=math.inf))):
        return joint
    if not candidates:
        raise ReversibleError(
            f"{tape.name(step)}: backward went through this part of the graph before, and what it "
            "needs is freed. Give retain_graph=True to the first backward."
        )
    position = min(candidates)
    if position == recomputed.position:
        return position, recomputed.state
    if position == running:
        return position, tape.running_state()
    if position not in recomputed.loaded:
        saved = tape.saved_states[position]
        # Loaded once per backward: an enclosing checkpoint gives a saved tensor only once.
        if not isinstance(saved, list):
            saved = [(None, encoded) for encoded in saved.load()]
        recomputed.loaded[position] = saved
    return position, recomputed.loaded[position]


def _walk(tape: Tape, recomputed: Recomputed, hook: PackHook) -> dict[int, Saving]:
    """Restore the state before a step; return what its call saved, by number."""
    step = hook.number
    record = tape.records[step]
    if record is not None and record.alone is not None:
        return _replay_alone(tape, recomputed, step, record.alone.load())
    position, state = _nearest(tape, recomputed, step)
    state = list(state)
    if position in tape.saved_states:
        tape.begin_at(recomputed, position)
    recomputed.position, recomputed.state = None, []
    collected: dict[int, Saving] = {}
    # Backward has gradients off already, unless it is to be differentiated itself.
    with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
        for k in range(position - 1, step, -1):
            _revisit(tape, k, state, None, undo=True)
            tape.lower(recomputed, k, state)
        # Once the branch has run, the state above goes tile by tile while the one below is made.
        free = partial(tape.forget_above, recomputed, step) if tape.tiled else None
        _revisit(tape, step, state, collected, undo=position > step, free=free)
    recomputed.position, recomputed.state = step, state
    tape.release(recomputed, step, state)
    return collected


def _replay_alone(
    tape: Tape, recomputed: Recomputed, step: int, values: list[Any]
) -> dict[int, Saving]:
    """Return what a step saved that reads the values that were kept for it."""
    collected: dict[int, Saving] = {}
    state: list[Stream] = [(value, None) for value in values]
    with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
        _revisit(tape, step, state, collected, undo=False)
    tape.release(recomputed, step, None)
    return collected


def _revisit(
    tape: Tape,
    k: int,
    state: list[Stream],
    collected: dict[int, Saving] | None,
    undo: bool,
    free: Callable[[], Any] | None = None,
) -> None:
    """Collect what step k saved; take its update back in the state where `undo` says so.

    Args:
        tape: the tape of the call.
        k: number of the step.
        state: the streams after the step, which become those before it.
        collected: where the tensors that the step saved go, by number; None for a step on the way.
        undo: whether the streams are those after the step.
        free: frees the saved states after the step, where this is the last step of the walk.
    """
    record = tape.records[k]
    assert record is not None, "a stored step lies above the state saved before it"
    assert not undo or record.alone is None, "so does a step that reads alone"
    if undo and tape.prefetch:
        for lower in tape.records[max(0, k - tape.prefetch) : k]:
            if lower is not None and isinstance(lower.kept, Hosted):
                lower.kept.prefetch()
    step = record.step
    if tape.tiled:
        tiled.arrange(tape.arithmetic, state, step)
    kept = record.kept is not None
    if kept and undo:
        assert record.kept is not None
        tiled.put(state, step.target, step.cut, (None, record.kept.load()))
    if kept and collected is None:
        return
    record.state.check()
    restoring, optimized = Undo(), optimize_scripts()
    # Twice, because an interrupt may come in the middle of the first.
    try:
        try:
            optimize_scripts(False)
            keywords = record.state.restore(restoring)
            replay = _Replay(tape, record, state, collected, keywords)
            if undo and not kept:
                replay.invert(free)
            else:
                again = undo or record.alone is not None
                replay.collect(compare=again and record.checksums is not None)
        finally:
            optimize_scripts(optimized)
            restoring.run()
    finally:
        optimize_scripts(optimized)
        restoring.run()


class _Replay:
    """One evaluation of a step in backward (rule 1).

    Args:
        tape: the tape of the call.
        record: the record of the step.
        state: the streams after the step, which become those before it.
        collected: where the tensors that the step saved go, by number; None where only the streams
            are needed.
        keywords: those of the branch.
    """

    def __init__(
        self,
        tape: Tape,
        record: Record,
        state: list[Stream],
        collected: dict[int, Saving] | None,
        keywords: dict[str, Any],
    ) -> None:
        self.tape = tape
        self.record = record
        self.state = state
        self.collected = collected
        self.keywords = keywords
        self.running = tape.running is not None
        self.compare = tape.options.determinism_check != "none"
        self.stopped = False
        self.mark: Any = None

    def invert(self, free: Callable[[], Any] | None) -> None:
        """Replay the branch and undo the step with its output."""
        step, arithmetic = self.record.step, self.tape.arithmetic
        out = self._branch(early=False)
        if free is not None and isinstance(self.state[step.target][1], Tiles):
            free()
        if self.record.state.quiet:
            self._undo(out)
        else:
            with self._rule(plays=step.coupling.linear):
                self._undo(out)
        if arithmetic.exact and self.record.checksums is not None:
            target = tiled.at(self.state, step.target, step.cut)
            checksums.compare(self.record, 0, target[1])
        self._collect_rule(out)

    def _undo(self, out: Any) -> None:
        """Take the update of the step back."""
        step, state, arithmetic = self.record.step, self.state, self.tape.arithmetic
        if self.tape.tiled:
            tiled.invert(arithmetic, step, state, out)
        else:
            encoded = state[step.target][1]
            state[step.target] = arithmetic.invert(step.coupling, encoded, out)

    def collect(self, compare: bool) -> None:
        """Replay the branch for what it saved alone, up to the last tensor where that is safe.

        Args:
            compare: whether to compare its output with that of the forward pass.
        """
        early = not compare and not self.running and self.record.stops
        out = self._branch(early)
        if compare:
            checksums.compare(self.record, 1, out)
        if not self.stopped:
            self._collect_rule(out)

    def _branch(self, early: bool) -> Any:
        """Return the output of the branch, called as in forward; None if it was stopped early."""
        record, step = self.record, self.record.step
        early = early and record.saved_by_branch == len(record.saved)
        hook = RecomputeHook(record, 0, self.collected, self.compare, self.running, early)
        sources = self._sources()
        push_saved_tensor_hooks(hook.pack, same_tensor)
        before = torch.is_grad_enabled()
        try:
            set_grad_mode(True)
            with record.state.replaying(self.running):
                out = step.fn(*sources, **self.keywords)
        except Exception as error:
            # The branch may have put another exception in its place, as a script does.
            if not hook.stopped:
                if hook.error is None or error is hook.error:
                    raise
                raise hook.error from error
            self.stopped = True
            return None
        finally:
            pop_saved_tensor_hooks()
            set_grad_mode(before)
        hook.check(record.saved_by_branch)
        if self.compare and not self.running:
            record.state.verify()
        if not record.state.quiet:
            self.mark = record.state.mark()
        return branch_output(out, record.target_layout)[0]

    def _sources(self) -> list[Any]:
        """Return what the branch reads; a stream that it reads twice is one tensor again."""
        record, cut = self.record, self.record.step.cut
        sources: list[Any] = []
        for place, (layouts, i) in enumerate(zip(record.layouts, record.step.source, strict=True)):
            first = record.shared[place]
            if first < place:
                sources.append(sources[first])
                continue
            stream = self.state[i] if cut is None else tiled.at(self.state, i, cut)
            sources.append(self._read(stream, layouts))
        return sources

    def _read(self, stream: Stream, layouts: Any) -> Any:
        """Return the value of a stream as a step saw it: new leaves of the same layout."""
        value, encoded = stream
        if isinstance(encoded, Tiles):
            value = tiled.whole(tiled.read(self.tape.arithmetic, stream))
        elif value is None:
            value = self.tape.arithmetic.read(encoded)
        if isinstance(layouts, Layout):
            return layouts.apply(value)
        return tree_map(Layout.apply, layouts, value)

    def _rule(self, plays: bool, again: bool = False) -> Any:
        if self.record.state.quiet:
            return _NOTHING
        return self.record.state.replaying_rule(self.mark, plays, again)

    def _collect_rule(self, out: Any) -> None:
        """Collect what the rule of the step saved (rule 10)."""
        record = self.record
        saved = record.saved_by_branch
        if self.collected is None or self.running or saved == len(record.saved):
            return
        hook = RecomputeHook(record, saved, self.collected, self.compare)
        step = record.step
        stream = tiled.at(self.state, step.target, step.cut)
        with (
            self._rule(plays=True, again=True),
            torch.enable_grad(),
            saved_tensors_hooks(hook.pack, same_tensor),
        ):
            # What adds to tiles saves nothing.
            if isinstance(stream[1], Tiles):
                step.coupling.increment(out)
            else:
                value = self._read(stream, record.target_layout)
                self.tape.arithmetic.save(step.coupling, value, out)
        hook.check(len(record.saved))
