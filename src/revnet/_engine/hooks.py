"""The hooks on saved tensors: those of a step's call, and those of its recomputation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import Parameter

from .._errors import ReversibleError
from .._torch import current_backward, current_node, storage_id, untraced
from .._trees import tree_leaves
from .tape import Record, Tape

# A recomputed tensor, and the version that it has unless somebody writes to it.
Saving = tuple[Tensor, int]


class PackHook:
    """The hooks under which one step runs; alive while autograd keeps something they packed.

    What it packs of a tensor that is recomputed is a number, of one that passes through the tensor
    and its version (rule 5).

    Args:
        record: the record of the step.
        sources: what the step reads, tensors or trees of tensors.
        tape: that of the call, before the step.
        recover: returns the tensor for a number, by a walk.
    """

    __slots__ = (
        "record",
        "saved",
        "number",
        "tape",
        "recover",
        "sources",
        "passing",
        "recomputed",
        "reading",
        "__weakref__",
    )

    def __init__(
        self,
        record: Record,
        sources: Sequence[Any],
        tape: Tape,
        recover: Callable[[Tape, PackHook, int], Saving],
    ) -> None:
        self.record = record
        self.saved = record.saved
        self.number = len(tape.records)
        self.tape = tape
        self.recover = recover
        # Tensors that the step reads, and those of which they are views: leaves, perhaps, but
        # recomputed.
        self.sources: list[Tensor] = []
        found = self.sources
        for value in sources:
            for leaf in (value,) if isinstance(value, Tensor) else tree_leaves(value):
                found.append(leaf)
                base = leaf._base
                if base is not None:
                    found.append(base)
        self.passing: Collection[int] = ()
        modules = record.state.modules
        if modules.objects.tensors:
            self.passing = modules.passing() - set(map(storage_id, found))
        # By backward call and by number. They are freed with their hook (rule 4).
        self.recomputed: dict[int, dict[int, Saving]] = {}
        # What the Function at work has read: it may read its saved tensors again.
        self.reading: tuple[int, int, dict[int, Saving]] | None = None

    @untraced
    def pack(self, tensor: Tensor) -> Any:
        # Called for each tensor that each step saves: every attribute counts.
        saved = self.saved
        root = tensor._base
        if root is None:
            root = tensor
        # Of most tensors this is the one to answer no.
        if root.is_leaf and root.requires_grad:
            for source in self.sources:
                if root is source:
                    break
            else:
                saved.append(root if isinstance(root, Parameter) else None)
                return tensor, tensor._version
        elif self.passing and storage_id(tensor) in self.passing:
            saved.append(None)
            return tensor, tensor._version
        try:
            # What `describe` returns, without a call.
            saved.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
        except RuntimeError:
            saved.append(describe(tensor))
        return len(saved) - 1

    @untraced
    def unpack(self, packed: Any) -> Tensor:
        if packed.__class__ is tuple:
            tensor, version = packed
        else:
            backward = current_backward()
            recomputed = self.recomputed.get(backward)
            found = None if recomputed is None else recomputed.pop(packed, None)
            if found is None:
                found = self._read_again(backward, packed) or self.recover(self.tape, self, packed)
            node = current_node()
            if isinstance(node, BackwardCFunction):
                self._keep(backward, node, packed, found)
            tensor, version = found
        if tensor._version != version:
            raise self._written(packed)
        return tensor  # type: ignore[no-any-return]

    def _read_again(self, backward: int, number: int) -> Saving | None:
        if self.reading is None or self.reading[0] != backward:
            return None
        return self.reading[2].get(number)

    def _keep(self, backward: int, node: Any, number: int, found: Saving) -> None:
        """Keep what a Function reads until another one reads: by number, as it holds this hook."""
        if self.reading is None or self.reading[:2] != (backward, id(node)):
            self.reading = backward, id(node), {}
        self.reading[2][number] = found

    def forget(self, backward: int) -> None:
        """Free what a backward call recomputed, at its end."""
        self.recomputed.pop(backward, None)
        self.reading = None

    def _written(self, packed: Any) -> ReversibleError:
        name, what = self.tape.name(self.number), "tensor that the branch itself made"
        if packed.__class__ is tuple:
            what = "parameter or keyword tensor"
        return ReversibleError(
            f"{name}: a {what} was changed in place before backward, which needs "
            "it. Call backward before the optimizer's step (or any other in-place write). In a "
            "branch, use the out-of-place operation."
        )


class Stop(Exception):
    """Stops a replay early.

    A subclass of Exception, because `always_call` hooks do not run for BaseException.
    """


class RecomputeHook:
    """Pack hook of a replay: compares what is saved with what forward saved, and collects it.

    Args:
        record: the record of the step.
        start: how many tensors were saved before.
        collected: where the tensors go, by number; None where they are not needed.
        compare: whether to compare.
        partial: whether the forward is still under way, and has not saved all as yet.
        early: stop at the last tensor.
    """

    __slots__ = ("record", "count", "collected", "compare", "partial", "early", "stopped", "error")

    def __init__(
        self,
        record: Record,
        start: int,
        collected: dict[int, Saving] | None,
        compare: bool,
        partial: bool = False,
        early: bool = False,
    ) -> None:
        self.record = record
        self.count = start
        self.collected = collected
        self.compare = compare
        self.partial = partial
        self.early = early
        self.stopped = False
        self.error: ReversibleError | None = None

    @untraced
    def pack(self, tensor: Tensor) -> Tensor:
        # Called for each tensor that each step saves: every attribute counts.
        index = self.count
        self.count = count = index + 1
        saved = self.record.saved
        found = tensor
        if index < len(saved):
            forward = saved[index]
            if forward.__class__ is tuple:
                if self.compare:
                    try:
                        # What `describe` returns, without a call.
                        described: Any = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
                    except RuntimeError:
                        described = describe(tensor)
                    if described != forward:
                        raise self._differs(
                            _mismatch(self.record.step.name, index, forward, described)
                        )
                if tensor.requires_grad:
                    found = tensor.detach()
                if self.collected is not None:
                    self.collected[index] = found, tensor._version
            elif (
                self.compare
                and forward is not None
                and tensor is not forward
                and tensor._base is not forward
            ):
                # Rule 6 restores parameters, so state that it does not know chose another one.
                raise self._differs(
                    f"{self.record.step.name}: saved tensor {index} was a parameter in the forward "
                    f"pass, shape {tuple(forward.shape)}, and is another tensor in the replay. "
                    "Call backward before anything that changes what the branch computes, such as "
                    "the choice of another adapter."
                )
        elif not self.partial and self.compare:
            raise self._differs(_mismatch(self.record.step.name, index, None, describe(tensor)))
        if self.early and count == len(saved):
            self.stopped = True
            raise Stop
        return found

    def _differs(self, message: str) -> ReversibleError:
        """Return an error, kept because the branch may put another one in its place."""
        self.error = ReversibleError(message)
        return self.error

    def check(self, expected: int) -> None:
        """Raise unless as many tensors were saved as in the forward pass, each like there."""
        if self.error is not None:
            # The branch has caught it.
            raise self.error
        missing = self.count < expected
        if missing or (self.compare and self.count != expected and not self.partial):
            raise ReversibleError(
                f"{self.record.step.name}: the replay saved {self.count} tensors for backward "
                f"where the forward saved {expected}. The branch did not do the same work twice: "
                "look for a condition on state that the first call changed, or randomness of "
                f"Python or NumPy.{_NEAR_TIE}"
            )


@untraced
def same_tensor(tensor: Tensor) -> Tensor:
    """Return `tensor`: the unpack hook of a replay, whose graph nobody differentiates."""
    return tensor


def describe(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a replay must save alike: shape, strides, dtype and device."""
    try:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except RuntimeError:  # A sparse tensor has no strides.
        return tensor.shape, None, tensor.dtype, tensor.device


_NEAR_TIE = (
    " If it chooses by its input, as the router of a mixture of experts does, rounding has tipped "
    "a near tie: use streams='fixed', or revnet.remember_outputs(router)."
)


def _mismatch(name: str, index: int, forward: Any, replay: Any) -> str:
    return (
        f"{name}: saved tensor {index} is {_text(replay)} in the replay but was {_text(forward)} "
        "in the forward pass. The branch did not do the same work twice: look for a condition on "
        f"state that the first call changed, or randomness of Python or NumPy.{_NEAR_TIE}"
    )


def _text(described: Any) -> str:
    if described is None:
        return "nothing"
    shape, strides, dtype, device = described
    return f"{tuple(shape)} {dtype} on {device}, strides {strides}"


# Nodes of operators that save only what they were given, complete before they run.
_SAVE_INPUTS = frozenset(
    f"{name}Backward0"
    for name in ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Convolution", "Addmv", "Mv", "Dot")
)
_saves: dict[type, bool] = {}


def may_stop_at_last_save(outputs: Sequence[Any]) -> bool:
    """Check whether a replay may stop inside the operator that saves the last tensor.

    Some operators fill what they saved after saving it, such as the noise of RReLU: a replay that
    stops there would find memory without contents. Matrix products and convolutions save what they
    were given, and are worth being spared.

    Args:
        outputs: the tensors that the branch returned.
    """
    waiting = {node for out in outputs if (node := out.grad_fn) is not None}
    for _ in range(_FARTHEST):
        if not waiting:
            return False
        # The latest operator among those that are left.
        node = max(waiting, key=_sequence_number)
        waiting.remove(node)
        if _saves_tensors(type(node)):
            return type(node).__name__ in _SAVE_INPUTS
        waiting.update(parent for parent, _ in node.next_functions if parent is not None)
    return False


# Nodes to look at: between the output of a branch and its last product lie one or two.
_FARTHEST = 16


def _sequence_number(node: Any) -> int:
    number: int = node._sequence_nr()
    # Nodes of leaves have the largest number there is.
    return -1 if number >= 2**63 else number


def _saves_tensors(kind: type) -> bool:
    saves = _saves.get(kind)
    if saves is None:
        names = dir(kind)
        saves = issubclass(kind, BackwardCFunction) or any(
            name.startswith("_raw_saved_") for name in names
        )
        _saves[kind] = saves
    return saves


def tensors_in(out: Any) -> list[Tensor]:
    """Return the tensors that a branch returned."""
    if isinstance(out, Tensor):
        return [out]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
