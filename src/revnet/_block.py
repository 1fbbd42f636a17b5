"""One block of a sequence: two residual branches on two streams."""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._compiled.function import active
from ._compiled.purity import HOOKS
from ._engine import Call
from ._execution import STORE
from ._program import (
    BoundSteps,
    Program,
    Settings,
    callers_level,
    check_stream,
)
from ._schemes import residual_steps, steps_per_block
from ._state.fsdp import LOW_PRECISION
from ._streams import tiled
from ._streams.arithmetic import FixedArithmetic, FloatArithmetic
from ._streams.format import Encoded
from ._torch import has_any_global_hook, saved_tensor_hooks
from ._trees import tree_leaves

# Where a block finds the call, its steps, and the hooks on saved tensors around the call, when a
# sequence enters it by its `__call__`.
entered = threading.local()

# How the streams of a call are held, and what fixed ones hold beside their values, by `id` of the
# value: a wrapper around a block hands on the value alone when it runs the block again.
_held: dict[int, tuple[weakref.ref[Tensor], FloatArithmetic | FixedArithmetic, Any]] = {}


def _remember_held(call: Call) -> None:
    for value, encoded in call.streams:
        if isinstance(value, Tensor):
            forget = partial(_held.pop, id(value))
            encoded = tiled.joined(call.arithmetic, encoded)
            residual = encoded.residual if isinstance(encoded, Encoded) else None
            _held[id(value)] = weakref.ref(value, forget), call.arithmetic, residual


def enter_call(call: Call, streams: Sequence[Any], settings: Settings, branch: str) -> None:
    """Continue from a block's inputs; warn if a hook has cast them to low precision."""
    call.enter(*streams)
    if call.arithmetic.exact or not call.recording or settings.warned:
        return
    dtypes = [leaf.dtype for stream in streams for leaf in tree_leaves(stream)]
    low = [dtype for dtype in dtypes if dtype in LOW_PRECISION]
    rebuilds = any(execution.rebuilds for execution in settings.executions)
    if low and rebuilds and settings.streams == "auto":
        settings.warned = True
        block = branch.partition(",")[0]
        warnings.warn(
            f"{block}: a hook cast the streams to {str(low[0]).removeprefix('torch.')}, but "
            f"streams='auto' chose float streams for an input of higher precision. Rebuilt in low "
            f"precision they make gradients wrong: use streams='fixed', or cast inside the "
            f"branches.",
            stacklevel=callers_level(),
        )


class ReversibleBlock(Program):
    """Two residual branches on two streams: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Args:
        f, g: modules that map a stream to a tensor of the same shape, or to `(tensor, aux)`.

    Reference: Gomez et al. 2017, arXiv:1707.04585.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        # The settings of the sequence of which this is a block, and the index of its first step.
        self._place: tuple[Settings, int] | None = None
        super().__init__(2, "auto", "invert")
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, nn.Module):
                raise TypeError(
                    f"branch {name} is {type(branch).__name__}, but a branch is an nn.Module"
                )
        self.f = f
        self.g = g
        self.register_load_state_dict_pre_hook(unwrap_deterministic)

    if TYPE_CHECKING:

        def __call__(
            self,
            x1: Tensor,
            x2: Tensor,
            f_args: Mapping[str, Any] = {},
            g_args: Mapping[str, Any] = {},
        ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x1: Tensor, x2: Tensor, f_args: Mapping[str, Any] = {}, g_args: Mapping[str, Any] = {}
    ) -> tuple[Tensor, Tensor]:
        """The streams after the block.

        Args:
            x1, x2: any shape, floating-point, equal shapes.
            f_args, g_args: keywords of `f` and of `g`.

        Returns:
            `(y1, y2)`; as part of a sequence, and alone, their activations are rebuilt in backward.
        """
        # In a graph, sequences take the steps themselves.
        found = None if active() else vars(entered).pop("call", None)
        if found is not None:
            call, steps, hooks, settings = found
            # A checkpoint around the block has hooks of its own, or switches gradients off.
            within = call.recording and (
                saved_tensor_hooks() != hooks or not torch.is_grad_enabled()
            )
            enter_call(call, (x1, x2), settings, steps[0][1].name)
            if within:
                _remember_held(call)
            del x1, x2
            # The keywords may have gone through hooks of the block.
            given = {0: f_args, len(steps) // 2: g_args}
            for place, (index, step) in enumerate(steps):
                keywords = given.get(place, step.kwargs)
                if keywords is not step.kwargs:
                    step = step._replace(kwargs=dict(keywords))
                call.step(index, step, within)
            y1, y2 = call.start()
            return y1, y2
        y1, y2, *aux = self._run((x1, x2), {"f_args": f_args, "g_args": g_args})
        if aux and self._place is None and not active() and not self._settings.warned:
            self._settings.warned = True
            warnings.warn(
                f"{', '.join(aux[0])} returned (update, aux), but a block that is called by itself "
                f"returns its streams alone: aux is dropped. Return the update alone, or use "
                f"revnet.ReversibleSequence([block]), which hands aux on.",
                stacklevel=callers_level(),
            )
        return y1, y2

    def inverse(
        self, y1: Tensor, y2: Tensor, f_args: Mapping[str, Any] = {}, g_args: Mapping[str, Any] = {}
    ) -> tuple[Tensor, Tensor]:
        """Return the streams before the block: a pass like `forward`, in reverse order.

        Its activations are rebuilt in backward. Randomness of the forward pass is not repeated.
        """
        parts = self._parts((y1, y2), {"f_args": f_args, "g_args": g_args})
        x1, x2, *_ = self._invert((y1, y2), parts)
        return x1, x2

    @property
    def _own_branches(self) -> Iterable[nn.Module]:
        return self.f, self.g

    @property
    def _executions(self) -> list[Any]:
        if self._place is None:
            return self._settings.executions
        settings, first = self._place
        return settings.executions[first : first + steps_per_block(settings.coupling)]

    def _take_place(self, settings: Settings, first: int) -> None:
        """Do from now on what a sequence does, however the block is called."""
        self._settings = settings
        self._place = settings, first

    def _call(self, streams: Sequence[Any], arithmetic: FloatArithmetic | FixedArithmetic) -> Call:
        again = self._place is not None and saved_tensor_hooks() is not None
        if not again:
            return super()._call(streams, arithmetic)
        # A wrapper around the block runs it again, and manages what it saves. A slice, whose
        # streams may be held otherwise than here, shares its blocks with the whole sequence.
        if (known := _held.get(id(streams[0]))) is not None:
            arithmetic = known[1]
        stored = [STORE] * len(self._executions)
        call = Call(streams, arithmetic, self._settings.options, stored)
        for i, (value, encoded) in enumerate(call.streams):
            known = _held.get(id(streams[i]))
            if known is not None and known[2] is not None and isinstance(encoded, Encoded):
                call.streams[i] = value, Encoded(value, known[2])
        return call

    def _parts(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundSteps:
        check_streams(*streams)
        keywords = kwargs.get("f_args", {}), kwargs.get("g_args", {})
        settings = self._settings
        begins = settings.begins and self._place is not None and self._place[1] == 0
        return residual_steps(
            (self.f, self.g),
            keywords,
            coupling=settings.coupling,
            begins=begins,
            tiles=settings.tiles,
        )

    def extra_repr(self) -> str:
        return ""


def unwrap_deterministic(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *args: Any,
    names: Sequence[str] = "fg",
) -> None:
    """Accept checkpoints of classes that wrap each branch: keys `f.net.…` for our `f.…`."""
    expected = {prefix + key for key in module.state_dict()}
    for branch in names:
        start = f"{prefix}{branch}."
        wrapped = f"{start}net."
        found = [key for key in state_dict if key.startswith(start)]
        renamed = {key: start + key[len(wrapped) :] for key in found if key.startswith(wrapped)}
        if (
            len(renamed) == len(found)
            and not expected.issuperset(found)
            and expected.issuperset(renamed.values())
        ):
            for old, new in renamed.items():
                state_dict[new] = state_dict.pop(old)


def take_keys(
    state_dict: dict[str, Any], prefix: str, given: tuple[str, str], own: tuple[str, str]
) -> bool:
    """Rename the keys of a sequence of the other kind; return whether there were any.

    Args:
        state_dict: changed in place. Left alone if it has keys of both kinds.
        prefix: of the sequence.
        given: the name of the list of blocks and one letter per branch, as in `("blocks", "fg")`.
        own: those that they become.
    """
    if any(key.startswith(f"{prefix}{own[0]}.") for key in state_dict):
        return False
    pattern = re.compile(rf"{re.escape(prefix + given[0])}\.(\d+)\.([{given[1]}])\.(.*)", re.DOTALL)
    found = [match for key in state_dict if (match := pattern.fullmatch(key))]
    for match in found:
        branch = own[1][given[1].index(match[2])]
        state_dict[f"{prefix}{own[0]}.{match[1]}.{branch}.{match[3]}"] = state_dict.pop(match[0])
    return bool(found)


def block_in(module: nn.Module) -> ReversibleBlock:
    """Return the block that a wrapper holds.

    Raises:
        TypeError: it holds none, or several.
    """
    found = [part for part in module.modules() if isinstance(part, ReversibleBlock)]
    if len(found) != 1:
        raise TypeError(
            f"blocks holds a {type(module).__name__} with {len(found)} ReversibleBlocks inside: an "
            "entry of blocks is a ReversibleBlock, or a module that wraps one and calls it"
        )
    return found[0]


def runs_only_steps(block: nn.Module) -> bool:
    """Whether calling a block would run its steps and nothing else: no hooks, say."""
    own = vars(block)
    return (
        type(block) is ReversibleBlock
        and "forward" not in own
        and block._compiled_call_impl is None
        and not any(map(own.get, HOOKS))
        and not has_any_global_hook()
    )


def check_streams(x1: Any, x2: Any, names: tuple[str, str] = ("x1", "x2")) -> None:
    """Raise unless the streams are equal in shape, or trees of floating-point tensors."""
    for name, stream in zip(names, (x1, x2), strict=True):
        for leaf in tree_leaves(stream) or [stream]:
            check_stream(leaf, name)
    if not isinstance(x1, Tensor) or not isinstance(x2, Tensor):
        return
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.device != x2.device:
        raise ValueError(
            f"the streams differ: {names[0]} is {tuple(x1.shape)} {x1.dtype} on {x1.device}, "
            f"{names[1]} is {tuple(x2.shape)} {x2.dtype} on {x2.device}"
        )
