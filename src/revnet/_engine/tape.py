"""What forward leaves for backward: the records of the steps, and stream states between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._kept import Hosted, Referenced, Saved
from .._state.call_state import ContextFn, StepState
from .._step import BoundStep
from .._streams import tiled
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic, Stream
from .._torch import saved_tensor_hooks
from .._trees import tree_map


@dataclass(frozen=True)
class Options:
    """What a sequence asks of its calls: see `revnet.ReversibleSequence`."""

    preserve_rng_state: bool = True
    determinism_check: str = "default"
    context_fn: ContextFn | None = None

    @property
    def replays_specially(self) -> bool:
        """Whether something here takes effect in the replays of the engine alone."""
        return self.context_fn is not None or self.determinism_check == "exact"


class Layout:
    """Shape, strides, dtype and `requires_grad` of a tensor that a step read (rule 6)."""

    __slots__ = ("shape", "stride", "dtype", "requires_grad")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.dtype = tensor.dtype
        self.requires_grad = tensor.requires_grad

    def apply(self, tensor: Tensor) -> Tensor:
        """Return `tensor` as the step saw it: a new leaf of the same layout."""
        tensor = tensor.detach()
        if tensor.dtype is not self.dtype:
            tensor = tensor.to(self.dtype)
        if tensor.stride() != self.stride:
            tensor = self._laid_out(tensor)
        return tensor.requires_grad_(self.requires_grad)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor.new_empty_strided(self.shape, self.stride)
        # An expanded dimension has stride 0 and cannot be written to: fill one slice, expand that.
        pairs = zip(self.shape, self.stride, strict=True)
        base = [1 if step == 0 else size for size, step in pairs]
        slices = tuple(slice(0, size) for size in base)
        tensor = tensor.new_empty_strided(base, self.stride).copy_(tensor[slices])
        return tensor.expand(self.shape)


def layout_of(value: Any) -> Any:
    """Return the layout of a stream, a tree like that."""
    return Layout(value) if isinstance(value, Tensor) else tree_map(Layout, value)


@dataclass(eq=False, slots=True)
class Record:
    """What the replay of one step needs.

    Attributes:
        step: the step, without its keywords, which may hold the graph.
        state: what the call saw.
        layouts: of the sources, as trees.
        shared: by place among the sources, the first place that holds the same stream.
        target_layout: of the target; None where the rule saves nothing.
        kept: the target before the step, where the step is not undone.
        alone: the values of the streams that a replay reads, by place, where it needs no walk.
        saved: for each tensor that the call saved its shape, strides, dtype and device; where it
            passes through the parameter, or None.
        saved_by_branch: how many of these the branch saved; the rule saved the rest.
        stops: whether a replay may stop inside the operator that saves last.
        checksums: under determinism_check="exact", of the target before the step and of the
            branch's output.
    """

    step: BoundStep
    state: StepState
    layouts: list[Any]
    shared: list[int]
    target_layout: Any
    kept: Saved | Hosted | None
    saved: list[Any]
    saved_by_branch: int = 0
    stops: bool = False
    checksums: tuple[Tensor, Tensor] | None = None
    alone: Saved | None = None


class Recomputed:
    """The stream state that one backward call has reached (rule 3)."""

    __slots__ = ("position", "state", "loaded")

    def __init__(self) -> None:
        self.position: int | None = None
        self.state: list[Stream] = []
        self.loaded: dict[int, list[Stream]] = {}


def no_hook() -> None:
    """Dead weak reference that stands for the hook of a stored step, which has none."""


class Tape:
    """What backward needs of one forward pass; alive as long as one of its pack hooks.

    Args:
        arithmetic: how streams are held, and what a step does to them.
        options: see `Options`.
        prefetch: how many steps ahead a target starts on its way from the host.
    """

    def __init__(
        self, arithmetic: FloatArithmetic | FixedArithmetic, options: Options, prefetch: int
    ) -> None:
        self.arithmetic = arithmetic
        self.options = options
        self.prefetch = prefetch
        # Whether a stream may be held in tiles.
        self.tiled = False
        self.records: list[Record | None] = []
        self.hooks: list[Callable[[], Any]] = []
        # Position p is the state before step p.
        self.saved_states: dict[int, Saved | Referenced | list[Stream]] = {}
        # By position, the streams that one pass handed to the next, while somebody holds them.
        self.joints: dict[int, Callable[[], Any]] = {}
        self.backwards: dict[int, Recomputed] = {}
        # The streams before the step that runs now: its branch may differentiate by itself.
        self.running: list[Stream] | None = None
        self.top = -1
        # Behind the last record that is not freed.
        self.end = 0

    def append(self, record: Record, hook: Any) -> None:
        """Add the record of a step, and the hook under which it runs."""
        self.records.append(record)
        self.hooks.append(weakref.ref(hook))
        self.end = len(self.records)

    def add_barrier(self, streams: list[Stream], within: bool = False) -> None:
        """Insert a barrier: backward never recomputes across a stored step.

        Args:
            streams: the present ones.
            within: whether a wrapper stands between the sequence and the step. Its hooks must not
                see what the engine saves, since they see nothing of it when it runs the step again.
        """
        # What `follows_rebuilt` checks, without its calls: most stored steps follow another.
        records = self.records
        if records and records[-1] is not None and records[-1].alone is None:
            self._save(streams, referenced=within)
        records.append(None)
        self.hooks.append(no_hook)

    def save_state(self, streams: list[Stream]) -> None:
        """Save the present state as a place to walk from, unless the last step was stored."""
        if self.follows_rebuilt():
            # Where no hooks want to see it, a node of the graph would cost more and do no more.
            self._save(streams, referenced=saved_tensor_hooks() is None)

    def _save(self, streams: list[Stream], referenced: bool) -> None:
        """Save streams as the state before the next step, past all hooks or under them."""
        saved: Saved | Referenced
        if referenced:
            values: list[Tensor] = []
            state = [tiled.detached(self.arithmetic, encoded, values) for _, encoded in streams]
            saved = Referenced(state, values)
        else:
            saved = Saved([encoded for _, encoded in streams])
        self.saved_states[len(self.records)] = saved

    def follows_rebuilt(self) -> bool:
        """Check whether the last step is one that backward rebuilds."""
        return bool(self.records) and self.walks_over(-1)

    def walks_over(self, step: int) -> bool:
        """Check whether a walk undoes a step: not one that is stored, or that reads alone."""
        record = self.records[step]
        return record is not None and record.alone is None

    def name(self, step: int) -> str:
        """Return what errors call a step."""
        record = self.records[step]
        return record.step.name if record is not None else f"step {step}"

    def joint_state(self, low: int, high: float) -> tuple[int, list[Stream]] | None:
        """Return the lowest state between two passes that is still held, and its position.

        Args:
            low: the lowest position that serves.
            high: a position from which a walk could begin as well.
        """
        for position in sorted(each for each in self.joints if low <= each < high):
            left = self.joints[position]()
            state = None if left is None else left.state()
            if state is not None:
                return position, [(None, encoded) for encoded in state]
            del self.joints[position]
        return None

    def running_state(self) -> list[Stream]:
        """Return the streams before the step that runs now."""
        assert self.running is not None
        return [(None, tree_map(Tensor.detach, encoded)) for _, encoded in self.running]

    def forget_above(self, recomputed: Recomputed, step: int) -> bool:
        """Free the states after a step if no step above it is pending; return whether that is so.

        The state before the step must be there, or about to be.
        """
        if self.running is not None:
            return False
        while self.top > step and self.hooks[self.top]() is None:
            self.top -= 1
        if self.top > step:
            return False
        for states in (self.saved_states, recomputed.loaded):
            for position in [position for position in states if position > step]:
                del states[position]
        return True

    def begin_at(self, recomputed: Recomputed, position: int) -> None:
        """Free what only steps from a position on need, if none of them is pending.

        A walk begins at this position, whose state is saved. Backward has left the steps above
        since they were replayed: their results and targets need not outlive this replay.
        """
        if self.running is not None:
            return
        while self.top >= position and self.hooks[self.top]() is None:
            self.top -= 1
        if self.top >= position:
            return
        for states in (self.saved_states, recomputed.loaded):
            for above in [above for above in states if above > position]:
                del states[above]
        # A paused call may go on: later steps keep their numbers.
        for k in range(position, self.end):
            self.records[k] = None
        self.end = min(self.end, position)

    def lower(self, recomputed: Recomputed, step: int, state: list[Stream]) -> None:
        """Keep the state before a step on the way in place of those above it, if it serves."""
        if self.forget_above(recomputed, step):
            self.saved_states[step] = list(state)

    def release(self, recomputed: Recomputed, step: int, state: list[Stream] | None) -> None:
        """Free every saved state that no pending step needs (rule 4).

        Args:
            recomputed: what the backward call has reached.
            step: the step that was replayed.
            state: the streams before it; None after a step that reads alone.
        """
        if not self.forget_above(recomputed, step):
            return
        if state is not None:
            self.saved_states[step] = list(state)
        elif recomputed.position is not None and recomputed.position > step:
            recomputed.position, recomputed.state = None, []
        # A paused call may go on: later steps keep their numbers.
        for k in range(step + 1, self.end):
            self.records[k] = None
        self.end = step + 1
