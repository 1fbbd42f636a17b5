"""The eager engine: an ordinary forward pass whose saved tensors are rebuilt, step by step, when backward asks.

A step is `streams[target] = combine(streams[target], fn(*streams[source], **kwargs))`. The forward
pass records the ordinary autograd graph under saved-tensor hooks that keep empty handles. The first
handle of a step that backward opens makes the call *walk* from the nearest known state down to that
step: each step on the way runs `fn` once, and its output undoes the combine; at the step itself,
what `fn` saves is caught for the waiting handles.

The rules, cited below by number:

 1. One evaluation of `fn` per step in backward, which serves the inversion and the gradient.
 2. State is found by walking, never by assuming an order. Walks exclude one another.
 3. What was restored belongs to the backward call (graph task) that asked for it.
 4. What a handle caught dies with the handle. What the engine keeps is saved through a no-op
    Function, so that enclosing hooks manage it too. A known state dies with the last handle above
    it.
 5. Parameters and keyword tensors are not recomputed: they pass through.
 6. A replay sees what the call saw: layout of the sources, parameters, buffers, training flags,
    containers among the keywords, randomness, autocast.
 7. A replay that differs from its forward raises, and so does what was changed in place in between.
 8. Without gradients there is no engine, only the loop.
 9. A forward enters blocks by their `__call__`, where that does more than their steps; a replay
    calls branches.
10. The combine runs inside the hooks as well.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from .._errors import ReversibleError
from .._execution import STORE, Execution
from .._kept import Hosted, RecordResults, ReplayResults, Results, Saved, compiled, unrecorded
from .._state.call_state import (
    REPLAYING,
    AutocastState,
    KeywordState,
    ModuleState,
    RandomState,
    devices_of,
    modules_of,
)
from .._state.decisions import Decisions
from .._step import BoundStep, branch_output
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic, Stream
from .._streams.fixed import checksum
from .._trees import tree_leaves, tree_map

ContextFn = Callable[
    [], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]
]


@dataclass(frozen=True)
class Options:
    """What a sequence asks of its calls."""

    preserve_rng_state: bool = True
    determinism_check: str = "default"
    context_fn: ContextFn | None = None


class _Layout:
    """Shape, strides, dtype and `requires_grad` of a tensor that a step read (rule 6)."""

    __slots__ = ("shape", "stride", "dtype", "requires_grad")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.dtype = tensor.dtype
        self.requires_grad = tensor.requires_grad

    def apply(self, tensor: Tensor) -> Tensor:
        """`tensor` as the step saw it: a new leaf of the same layout."""
        tensor = tensor.detach()
        if tensor.dtype is not self.dtype:
            tensor = tensor.to(self.dtype)
        if tensor.stride() != self.stride:
            # An expanded dimension has stride 0 and cannot be written to: fill one slice, and
            # expand that.
            base = [
                1 if step == 0 else size for size, step in zip(self.shape, self.stride, strict=True)
            ]
            slices = tuple(slice(0, size) for size in base)
            tensor = (
                tensor.new_empty_strided(base, self.stride).copy_(tensor[slices]).expand(self.shape)
            )
        return tensor.requires_grad_(self.requires_grad)


@dataclass(eq=False, slots=True)
class _Record:
    """What the replay of one step needs."""

    part: BoundStep
    keywords: KeywordState
    modules: ModuleState
    layouts: list[Any]
    target_layout: Any
    kept: Saved | Hosted | None
    results: Results | None
    random: RandomState | None
    decisions: Decisions
    # Per tensor that the call saved: shape, strides, dtype, device; where it passed through the
    # parameter, or None.
    saved: list[Any]
    saved_by_branch: int = 0
    context: contextlib.AbstractContextManager[Any] | None = None
    # Under determinism_check="exact": of the target before the step, and of the branch's output.
    checksums: tuple[Tensor, Tensor] | None = None


_current_task = torch._C._current_graph_task_id


class _Handles:
    """The hooks under which one step runs; alive while autograd keeps something that they packed.

    What it packs of a restored tensor is a number, of one that passes through the tensor and its
    version (rule 5).
    """

    __slots__ = ("call", "step", "record", "sources", "passing", "caught", "__weakref__")

    def __init__(self, call: Call, step: int, record: _Record) -> None:
        self.call = call
        self.step = step
        self.record = record
        # Tensors that the step reads, and those of which they are views: leaves, perhaps, but
        # restored.
        self.sources: list[Tensor] = []
        self.passing: Collection[int] = ()
        # Per backward call, by number: the tensor and its version. It dies with the handles (rule
        # 4).
        self.caught: dict[int, dict[int, tuple[Tensor, int]]] = {}

    def read(self, sources: Sequence[Any]) -> None:
        """Tell what the step is about to read."""
        for value in sources:
            for leaf in tree_leaves(value):
                base = leaf._base
                self.sources += (leaf,) if base is None else (leaf, base)
        if versions := self.record.keywords.versions:
            self.passing = {_memory(tensor) for tensor, _, _ in versions} - set(
                map(_memory, self.sources)
            )

    def pack(self, tensor: Tensor) -> Any:
        # Called for each tensor that each step saves: every attribute counts.
        saved = self.record.saved
        root = tensor._base
        if root is None:
            root = tensor
        if root.requires_grad and root.is_leaf:
            for source in self.sources:
                if root is source:
                    break
            else:
                saved.append(root if isinstance(root, Parameter) else None)
                return tensor, tensor._version
        elif self.passing and _memory(tensor) in self.passing:
            saved.append(None)
            return tensor, tensor._version
        saved.append(_describe(tensor))
        return len(saved) - 1

    def unpack(self, packed: Any) -> Tensor:
        if packed.__class__ is tuple:
            tensor, version = packed
        else:
            caught = self.caught.get(_current_task())
            found = None if caught is None else caught.pop(packed, None)
            tensor, version = self.call.recover(self, packed) if found is None else found
        if tensor._version != version:
            what = (
                "parameter or keyword tensor"
                if packed.__class__ is tuple
                else "tensor that the branch itself made"
            )
            raise ReversibleError(
                f"{self.call.name(self.step)}: a {what} was changed in place before backward, "
                f"which needs it. Call backward before the optimizer's step (or any other in-place "
                f"write). In a branch, use the out-of-place operation."
            )
        return tensor  # type: ignore[no-any-return]


def _no_handles() -> None:
    """In place of a reference to the handles of a stored step, which has none."""


class _Task:
    """What one backward call has restored (rule 3)."""

    __slots__ = ("position", "state", "loaded")

    def __init__(self) -> None:
        self.position: int | None = None
        self.state: list[Stream] = []
        self.loaded: dict[int, list[Stream]] = {}


_NO_KEYWORDS = KeywordState({})


class _Stop(Exception):
    """Ends a replay at the last tensor that backward needs. An `Exception`: hooks with `always_call` see no others."""


class Call:
    """One forward pass over streams, and what its backward needs.

    Args:
        streams: the streams before the first step: tensors, or trees of tensors.
        arithmetic: how streams are held, and what a step does to them.
        options: see `Options`.
        executions: the execution of every step of the sequence.
    """

    def __init__(
        self,
        streams: Sequence[Any],
        arithmetic: FloatArithmetic | FixedArithmetic,
        options: Options,
        executions: Sequence[Execution],
    ) -> None:
        self.arithmetic = arithmetic
        self.options = options
        self.executions = executions
        # Whoever notes operations down would run the branches' second evaluation later, with other
        # random numbers.
        self.recording = (
            torch.is_grad_enabled() and not torch._C._is_tracing() and get_proxy_mode() is None
        )
        leaves = [leaf for value in streams for leaf in tree_leaves(value)]
        self.devices = devices_of(leaves)
        self.autocast = AutocastState([device.type for device in self.devices])
        self.streams: list[Stream] = [arithmetic.encode(value) for value in streams]
        # Of the streams as a block gave them.
        self.versions: list[int] = []
        self.aux: dict[str, Any] = {}
        self.capturing = (
            bool(self.devices)
            and torch.cuda.is_available()
            and torch.cuda.is_current_stream_capturing()
        )
        # Under FakeTensorMode nothing is drawn, and generators cannot be read.
        self.fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        self.records: list[_Record | None] = []
        self.handles: list[Callable[[], _Handles | None]] = []
        # The generators after the last step, while nobody can have drawn since.
        self.random: RandomState | None = None
        # Position p is the state before step p.
        self.known: dict[int, Saved | list[Stream]] = {}
        self.tasks: dict[int, _Task] = {}
        self.running = False
        self.prefetch = max((execution.prefetch for execution in executions), default=0)
        self.top = -1

    # Forward

    def enter(self, *streams: Any) -> None:
        """Take up the streams as a block received them through its `__call__` (rule 9)."""
        self._check_unwritten()
        if all(
            _same(value, given) for (value, _), given in zip(self.streams, streams, strict=True)
        ):
            self.streams = [
                (value, held) for value, (_, held) in zip(streams, self.streams, strict=True)
            ]
            return
        # A hook on the block put other streams in: below this point state cannot be found by
        # walking. As after a stored step, the state before it and the state after it are two
        # positions.
        if self.recording and self.records and self.records[-1] is not None:
            self._skip()
        self.streams = [self.arithmetic.encode(value) for value in streams]

    def step(self, index: int, part: BoundStep) -> None:
        """Apply step `index` of the sequence to the streams."""
        execution = self.executions[index]
        if execution.keeps_results and compiled(part.fn):
            execution = STORE
        sources = [self.streams[i][0] for i in part.source]
        if not self.recording or not execution.rebuilds:
            if self.recording:
                self._skip()
            self.random = None
            self._combine(index, part, part.fn(*sources, **part.kwargs))
            return
        record = _Record(
            # Keywords may hold the graph, and its handles the record.
            part=part._replace(kwargs={}) if part.kwargs else part,
            keywords=KeywordState(part.kwargs) if part.kwargs else _NO_KEYWORDS,
            modules=ModuleState(modules_of(part.fn)),
            layouts=[tree_map(_Layout, value) for value in sources],
            target_layout=tree_map(_Layout, self.streams[part.target][0]),
            kept=self._keep(execution, part),
            results=Results(execution.keeps_results, self.capturing)
            if execution.keeps_results or self.capturing
            else None,
            random=self._generators(),
            decisions=Decisions(part.name),
            saved=[],
        )
        handles = self._append(record)
        handles.read(sources)
        self.running = True
        try:
            self._record(index, part, record, handles, sources)
        finally:
            self.running = False
            # Autograd holds the hooks as long as what they packed.
            handles.sources = []

    def _record(
        self, index: int, part: BoundStep, record: _Record, handles: _Handles, sources: list[Any]
    ) -> None:
        """Run a step so that it can be replayed."""
        context = None
        if self.options.context_fn is not None:
            context, record.context = self.options.context_fn()
        recording = None if record.results is None else RecordResults(record.results, self.devices)
        versions = [tensor._version for tensor in handles.sources]
        with saved_tensors_hooks(handles.pack, handles.unpack):
            with record.decisions, _all(context, recording):
                out = part.fn(*sources, **part.kwargs)
            record.saved_by_branch = len(record.saved)
            record.modules.settle()
            if versions != [tensor._version for tensor in handles.sources]:
                raise ReversibleError(
                    f"{part.name} changed its input in place. The stream it reads is needed to "
                    f"rebuild the activations: work on a copy, or use the out-of-place operation."
                )
            if self.options.determinism_check == "exact":
                target, held = self.streams[part.target]
                record.checksums = _checksum(held), _checksum(branch_output(out, target)[0])
            self._combine(index, part, out)
        if record.results is not None:
            record.results.settle()
        if record.random is not None:
            self.random = RandomState(self.devices)
            if self.random.same(record.random):
                record.random = None

    def _generators(self) -> RandomState | None:
        """The generators before a step."""
        if not self.options.preserve_rng_state or self.capturing or self.fake:
            return None
        return self.random or RandomState(self.devices)

    def start(self) -> list[Any]:
        """The streams before the next step, as branches read them."""
        self.versions = self._versions()
        return [value for value, _ in self.streams]

    def _versions(self) -> list[int]:
        """Of the streams, where the last step is to be undone from them."""
        if not self.records or self.records[-1] is None:
            return []
        return [leaf._version for value, _ in self.streams for leaf in tree_leaves(value)]

    def _check_unwritten(self) -> None:
        if self.versions and self.versions != self._versions():
            raise ReversibleError(
                f"{self.name(len(self.records) - 1)}: a hook changed the streams that this step "
                f"left in place. They are needed to rebuild the activations: return other tensors "
                f"from the hook instead."
            )
        self.versions = []

    def finish(self, *streams: Any) -> Sequence[Any]:
        """The streams after the last step, as its block gave them. Now the call lives as long as its handles."""
        self._check_unwritten()
        self._mark()
        self.top = len(self.records) - 1
        for k, record in enumerate(self.records):
            if (
                record is not None
                and record.checksums
                and not all(self._exact(i, k) for i in record.part.source)
            ):
                record.checksums = None
        return streams or self.start()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *exception: Any) -> None:
        # These hold the graph, and the graph's handles this call: keeping them would be a cycle
        # through C++.
        self.streams, self.aux, self.random = [], {}, None

    def _keep(self, execution: Execution, part: BoundStep) -> Saved | Hosted | None:
        """The target before a step, where the step is not undone."""
        held = self.streams[part.target][1]
        if (
            execution.on_host
            and all(leaf.is_cuda for leaf in tree_leaves(held))
            and not self.capturing
        ):
            return Hosted(held)
        undone = not execution.keeps_target and part.target not in part.source
        return None if undone and self.arithmetic.undoes(part.coupling) else Saved(held)

    def _append(self, record: _Record) -> _Handles:
        handles = _Handles(self, len(self.records), record)
        self.records.append(record)
        self.handles.append(weakref.ref(handles))
        return handles

    def _skip(self) -> None:
        """Go on with what no walk crosses."""
        self._mark()
        self.records.append(None)
        self.handles.append(_no_handles)

    def _mark(self) -> None:
        """Keep the present state as a place to walk from, unless the last step was stored."""
        if self.records and self.records[-1] is not None:
            self.known[len(self.records)] = Saved([held for _, held in self.streams])

    def _combine(self, index: int, part: BoundStep, out: Any) -> None:
        """Update the target with what the branch returned, its extra output put aside."""
        if isinstance(out, tuple):
            out, aux = branch_output(out, self.streams[part.target][0])
            if aux is not None:
                self.aux[part.name] = aux
        try:
            self.streams[part.target] = self.arithmetic.combine(
                part.coupling, self.streams[part.target], out, index
            )
        except (TypeError, ValueError) as error:
            raise ReversibleError(f"{part.name} {error}") from error

    # Backward

    def recover(self, handles: _Handles, number: int) -> tuple[Tensor, int]:
        """The tensor that a handle stands for, and the version that it has unless somebody wrote to it."""
        with REPLAYING:
            task_id = _current_task()
            caught = handles.caught.get(task_id)
            # Another thread may have been here.
            if caught is None or number not in caught:
                try:
                    caught = self._walk(self.tasks.get(task_id) or self._task(task_id), handles)
                except BaseException:
                    self.tasks.pop(task_id, None)
                    raise
                if task_id != -1:
                    handles.caught[task_id] = caught
            return caught.pop(number)

    def name(self, step: int) -> str:
        """What errors call a step."""
        record = self.records[step]
        return record.part.name if record is not None else f"step {step}"

    def _task(self, task_id: int) -> _Task:
        task = _Task()
        if task_id == -1:
            return task
        self.tasks[task_id] = task
        call = weakref.ref(self)

        def forget() -> None:
            alive = call()
            if alive is not None:
                alive.tasks.pop(task_id, None)
                for reference in alive.handles:
                    if (handles := reference()) is not None:
                        handles.caught.pop(task_id, None)

        torch.autograd.Variable._execution_engine.queue_callback(forget)
        return task

    def _nearest(self, task: _Task, step: int) -> tuple[int, list[Stream]]:
        """The lowest known state from which `step` can be reached (rule 2)."""
        candidates = [position for position in self.known if position >= step]
        if self.running:
            candidates.append(len(self.records) - 1)
        if task.position is not None and task.position >= step:
            candidates.append(task.position)
        if not candidates:
            raise ReversibleError(
                f"{self.name(step)}: backward went through this part of the graph before, and what "
                f"it needs is freed. Give retain_graph=True to the first backward."
            )
        position = min(candidates)
        if position == task.position:
            return position, task.state
        if self.running and position == len(self.records) - 1:
            return position, [
                (None, tree_map(torch.Tensor.detach, held)) for _, held in self.streams
            ]
        if position not in task.loaded:
            known = self.known[position]
            # Loaded once per backward: an enclosing checkpoint gives a saved tensor only once.
            task.loaded[position] = (
                [(None, held) for held in known.load()] if isinstance(known, Saved) else known
            )
        return position, task.loaded[position]

    def _walk(self, task: _Task, handles: _Handles) -> dict[int, tuple[Tensor, int]]:
        """Restore the state before a step; returns what its call saved, by number."""
        step = handles.step
        position, state = self._nearest(task, step)
        state = list(state)
        task.position, task.state = None, []
        caught: dict[int, tuple[Tensor, int]] = {}
        # Backward has gradients off already, unless it is to be differentiated itself.
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
            for k in range(position - 1, step, -1):
                self._revisit(k, state, None, undo=True)
            self._revisit(step, state, caught, undo=position > step)
        task.position, task.state = step, state
        self._release(task, step, state)
        return caught

    def _revisit(
        self, k: int, state: list[Stream], caught: dict[int, tuple[Tensor, int]] | None, undo: bool
    ) -> None:
        """Catch what step k saved; `undo` it in the state as well."""
        record = self.records[k]
        assert record is not None, "a stored step lies above the state kept before it"
        if undo and self.prefetch:
            for lower in self.records[max(0, k - self.prefetch) : k]:
                if lower is not None and isinstance(lower.kept, Hosted):
                    lower.kept.prefetch()
        part, target = record.part, record.part.target
        # Autocast and modules are as the step's call found them.
        with _all(self.autocast.restored(), record.modules.restored(part.name)):
            out = None
            if undo and record.kept is None:
                out = self._replay(record, state, caught)
                state[target] = self.arithmetic.invert(part.coupling, state[target][1], out)
                if self.arithmetic.exact:
                    self._compare(record, 0, state[target][1])
            else:
                if record.kept is not None and undo:
                    state[target] = (None, record.kept.load())
                if caught is not None:
                    compare = undo and record.checksums is not None
                    out = self._replay(
                        record, state, caught, early=not compare and not self.running
                    )
                    if compare:
                        self._compare(record, 1, out)
            if caught is not None:
                self._replay_combine(record, state[target], out, caught)

    def _exact(self, stream: int, k: int) -> bool:
        """Whether the walk finds this stream as forward left it before step k, in every bit."""
        for record in self.records[k + 1 :]:
            if record is None:
                break
            if record.part.target == stream:
                return self.arithmetic.exact or record.kept is not None
        return True

    def _compare(self, record: _Record, which: int, tree: Any) -> None:
        if record.checksums is None or torch.equal(record.checksums[which], _checksum(tree)):
            return
        raise ReversibleError(
            f"{record.part.name} is not deterministic: called again on the same input, it gave "
            f"another output, so its gradient would be wrong. Randomness of Python, NumPy or an "
            f"own torch.Generator is not repeated: draw from torch's global generators. Kernels "
            f"that add in changing order have deterministic forms: "
            f"torch.use_deterministic_algorithms(True)."
        )

    def _read(self, stream: Stream, layouts: Any) -> Any:
        """The value of a stream as a step saw it: new leaves of the same layout."""
        value, held = stream
        if value is None:
            value = self.arithmetic.read(held)
        return (
            layouts.apply(value)
            if isinstance(layouts, _Layout)
            else tree_map(_Layout.apply, layouts, value)
        )

    def _replay(
        self,
        record: _Record,
        state: list[Stream],
        caught: dict[int, tuple[Tensor, int]] | None,
        early: bool = False,
    ) -> Any:
        """Call the branch again as forward did; its output, or None if it was stopped early."""
        part = record.part
        record.keywords.check(part.name)
        sources = [
            self._read(state[i], layouts)
            for layouts, i in zip(record.layouts, part.source, strict=True)
        ]
        early = early and record.saved_by_branch == len(record.saved)
        pack = _Catching(
            record, 0, caught, self.options.determinism_check != "none", self.running, early
        )
        random = None if record.random is None else record.random.restored()
        playing: contextlib.AbstractContextManager[Any] | None = None
        if record.results is not None:
            playing = (
                unrecorded(record.results)
                if self.running
                else ReplayResults(record.results, part.name)
            )
        try:
            with (
                torch.enable_grad(),
                record.decisions.rewound(),
                _all(random, record.context, playing),
                saved_tensors_hooks(pack.pack, _identity),
            ):
                out = part.fn(*sources, **record.keywords.fresh())
        except Exception:
            # The branch may have put another exception in its place.
            if not pack.stopped:
                raise
            return None
        pack.check(record.saved_by_branch)
        return branch_output(out, record.target_layout)[0]

    def _replay_combine(
        self, record: _Record, target: Stream, out: Any, caught: dict[int, tuple[Tensor, int]]
    ) -> None:
        """Catch what the combine saved (rule 10)."""
        if self.running or record.saved_by_branch == len(record.saved):
            return
        pack = _Catching(
            record, record.saved_by_branch, caught, self.options.determinism_check != "none"
        )
        value = self._read(target, record.target_layout)
        with torch.enable_grad(), saved_tensors_hooks(pack.pack, _identity):
            # What an arithmetic does around the rule saves nothing.
            record.part.coupling.combine(value, out)
        pack.check(len(record.saved))

    def _release(self, task: _Task, step: int, state: list[Stream]) -> None:
        """Drop every known state that no handle needs any more (rule 4)."""
        if self.running:
            return
        while self.top > step and self.handles[self.top]() is None:
            self.top -= 1
        if self.top > step:
            return
        for known in (self.known, task.loaded):
            for position in [position for position in known if position > step]:
                del known[position]
        self.known[step] = list(state)
        del self.records[step + 1 :]


def _all(
    *contexts: contextlib.AbstractContextManager[Any] | None,
) -> contextlib.AbstractContextManager[Any]:
    """Those contexts that are there, as one; the usual step has none, and pays nothing."""
    present = [context for context in contexts if context is not None]
    if not present:
        return _NOTHING
    with contextlib.ExitStack() as stack:
        for context in present:
            stack.enter_context(context)
        return stack.pop_all()


_NOTHING = contextlib.nullcontext()


class _Catching:
    """Pack hook of a replay: compares what is saved with what forward saved, and catches it."""

    __slots__ = ("record", "count", "caught", "compare", "partial", "early", "stopped")

    def __init__(
        self,
        record: _Record,
        start: int,
        caught: dict[int, tuple[Tensor, int]] | None,
        compare: bool,
        partial: bool = False,
        early: bool = False,
    ) -> None:
        self.record = record
        self.count = start
        self.caught = caught
        self.compare = compare
        self.partial = partial
        self.early = early
        self.stopped = False

    def pack(self, tensor: Tensor) -> Tensor:
        # Called for each tensor that each step saves: every attribute counts.
        index = self.count
        self.count = count = index + 1
        saved = self.record.saved
        found = tensor
        if index < len(saved):
            forward = saved[index]
            if forward.__class__ is tuple:
                if self.compare and _describe(tensor) != forward:
                    raise ReversibleError(
                        _mismatch(self.record.part.name, index, forward, _describe(tensor))
                    )
                if tensor.requires_grad:
                    found = tensor.detach()
                if self.caught is not None:
                    self.caught[index] = found, tensor._version
            elif (
                self.compare
                and forward is not None
                and tensor is not forward
                and tensor._base is not forward
            ):
                # Rule 6 sets parameters back, so another one was chosen by state that it does not
                # know.
                raise ReversibleError(
                    f"{self.record.part.name}: saved tensor {index} was a parameter in the forward "
                    f"pass, shape {tuple(forward.shape)}, and is another tensor in the replay. "
                    f"Call backward before anything that changes what the branch computes, such as "
                    f"the choice of another adapter."
                )
        elif not self.partial and self.compare:
            raise ReversibleError(_mismatch(self.record.part.name, index, None, _describe(tensor)))
        if self.early and count == len(saved):
            self.stopped = True
            raise _Stop
        return found

    def check(self, expected: int) -> None:
        if self.count < expected or (self.compare and self.count != expected and not self.partial):
            raise ReversibleError(
                f"{self.record.part.name}: the replay saved {self.count} tensors for backward "
                f"where the forward saved {expected}. The branch did not do the same work twice: "
                f"look for a condition on state that the first call changed, or randomness of "
                f"Python or NumPy."
            )


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _checksum(tree: Any) -> Tensor:
    sums = [checksum(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return torch.stack(sums) if sums else torch.empty(0)


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    try:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except RuntimeError:  # A sparse tensor has no strides.
        return tensor.shape, None, tensor.dtype, tensor.device


def _memory(tensor: Tensor) -> int:
    """The identity of a tensor's memory, whichever view of it this is."""
    try:
        identity: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # A sparse tensor has none of its own.
        identity = id(tensor)
    return identity


def _mismatch(name: str, index: int, forward: Any, replay: Any) -> str:
    def text(described: Any) -> str:
        if described is None:
            return "nothing"
        shape, strides, dtype, device = described
        return f"{tuple(shape)} {dtype} on {device}, strides {strides}"

    return (
        f"{name}: saved tensor {index} is {text(replay)} in the replay but was {text(forward)} in "
        f"the forward pass. The branch did not do the same work twice: look for a condition on "
        f"state that the first call changed, or randomness of Python or NumPy."
    )


def _same(mine: Any, given: Any) -> bool:
    """Whether a block received the stream that the step before it left, perhaps as another tensor object."""
    if mine is given:
        return True
    if not isinstance(mine, Tensor):
        mine, spec = pytree.tree_flatten(mine)
        given, given_spec = pytree.tree_flatten(given)
        return bool(spec == given_spec) and all(
            _same(a, b) for a, b in zip(mine, given, strict=True)
        )
    return (
        isinstance(given, Tensor)
        and mine.dtype is given.dtype
        and mine.shape == given.shape
        and mine.stride() == given.stride()
        and mine.data_ptr() == given.data_ptr()
        and mine._version == given._version
    )
