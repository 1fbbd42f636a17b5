"""One block of a sequence: two residual branches on two streams."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from ._compiled.function import active
from ._compiled.purity import hooked
from ._couplings import Additive
from ._engine import Call
from ._execution import STORE
from ._program import (
    BoundSteps,
    Program,
    Settings,
    callers_level,
    check_stream,
)
from ._state.fsdp import LOW_PRECISION
from ._step import BoundStep
from ._streams.arithmetic import FixedArithmetic, FloatArithmetic
from ._streams.format import Held
from ._torch import saved_tensor_hooks

_ADDITIVE = Additive()


def residual_steps(
    branches: Iterable[nn.Module],
    keywords: Iterable[Mapping[str, Any]],
    first: int = 0,
    name: str = "",
    updates: tuple[int, int] = (0, 1),
) -> BoundSteps:
    """Return the steps of a block: each branch updates one stream and reads the other."""
    f, g = branches
    f_args, g_args = keywords
    a, b = updates
    return [
        (first, BoundStep(f"{name}branch f", f, _ADDITIVE, a, (b,), dict(f_args))),
        (first + 1, BoundStep(f"{name}branch g", g, _ADDITIVE, b, (a,), dict(g_args))),
    ]


# Where a block finds the call, its steps, and the hooks on saved tensors around the call, when a
# sequence enters it by its `__call__`.
entered = threading.local()

# What fixed streams hold beside their values, by `id` of the value: a wrapper around a block hands
# on the value alone when it runs the block again.
_residuals: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def _remember_residuals(call: Call) -> None:
    for value, encoded in call.streams:
        if isinstance(encoded, Held) and isinstance(value, Tensor):
            forget = partial(_residuals.pop, id(value))
            _residuals[id(value)] = weakref.ref(value, forget), encoded.residual


def enter_call(call: Call, streams: Sequence[Any], settings: Settings, branch: str) -> None:
    """Continue from a block's inputs; warn if a hook has cast them to low precision."""
    call.enter(*streams)
    if call.arithmetic.exact or not call.recording or settings.warned:
        return
    low = [stream.dtype for stream in streams if stream.dtype in LOW_PRECISION]
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
        self.register_load_state_dict_pre_hook(_unwrap_deterministic)

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
            call, steps, hooks = found
            # A checkpoint around the block has hooks of its own, or switches gradients off.
            within = call.recording and (
                saved_tensor_hooks() != hooks or not torch.is_grad_enabled()
            )
            enter_call(call, (x1, x2), self._settings, steps[0][1].name)
            if within:
                _remember_residuals(call)
            del x1, x2
            # The keywords may have gone through hooks of the block.
            for (index, step), keywords in zip(steps, (f_args, g_args), strict=True):
                if keywords is not step.kwargs:
                    step = step._replace(kwargs=dict(keywords))
                call.step(index, step, within)
            y1, y2 = call.start()
            return y1, y2
        y1, y2, *_ = self._run((x1, x2), {"f_args": f_args, "g_args": g_args})
        return y1, y2

    def inverse(
        self, y1: Tensor, y2: Tensor, f_args: Mapping[str, Any] = {}, g_args: Mapping[str, Any] = {}
    ) -> tuple[Tensor, Tensor]:
        """Return the streams before the block. Differentiable; randomness is not repeated."""
        x1, x2 = self._undo((y1, y2), self._parts((y1, y2), {"f_args": f_args, "g_args": g_args}))
        return x1, x2

    @property
    def _executions(self) -> list[Any]:
        if self._place is None:
            return self._settings.executions
        settings, first = self._place
        return settings.executions[first : first + 2]

    def _take_place(self, settings: Settings, first: int) -> None:
        """Do from now on what a sequence does, however the block is called."""
        self._settings = settings
        self._place = settings, first

    def _call(self, streams: Sequence[Any], arithmetic: FloatArithmetic | FixedArithmetic) -> Call:
        again = self._place is not None and saved_tensor_hooks() is not None
        if not again:
            return super()._call(streams, arithmetic)
        # A wrapper around the block runs it again, and manages what it saves.
        call = Call(streams, arithmetic, self._settings.options, [STORE, STORE])
        for i, (value, encoded) in enumerate(call.streams):
            known = _residuals.get(id(streams[i]))
            if known is not None and isinstance(encoded, Held):
                call.streams[i] = value, Held(value, known[1])
        return call

    def _parts(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundSteps:
        check_streams(*streams)
        return residual_steps(
            (self.f, self.g), (kwargs.get("f_args", {}), kwargs.get("g_args", {}))
        )

    def extra_repr(self) -> str:
        return ""


def _unwrap_deterministic(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Accept checkpoints of classes that wrap each branch: keys `f.net.…` for our `f.…`."""
    expected = {prefix + key for key in module.state_dict()}
    for branch in ("f", "g"):
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


def runs_only_steps(block: nn.Module) -> bool:
    """Whether calling a block would run its steps and nothing else: no hooks, say."""
    own = "forward" in vars(block) or block._compiled_call_impl is not None
    return (
        type(block) is ReversibleBlock
        and not own
        and not hooked((block,))
        and not has_any_global_hook()
    )


def check_streams(x1: Any, x2: Any) -> None:
    check_stream(x1, "x1")
    check_stream(x2, "x2")
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.device != x2.device:
        raise ValueError(
            f"the streams differ: x1 is {tuple(x1.shape)} {x1.dtype} on {x1.device}, "
            f"x2 is {tuple(x2.shape)} {x2.dtype} on {x2.device}"
        )
