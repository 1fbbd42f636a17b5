"""The private parts of torch that the library rests on, each in one place.

Every function says what breaks without it. All were seen in torch 2.11 to 2.15.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook

# Identifies the backward call that runs in this thread, -1 outside of one. Without it two backward
# calls would share what they recomputed (rule 3 of the engine).
current_backward: Callable[[], int] = torch._C._current_graph_task_id

# The node of the graph that backward runs in this thread. Without it a Function that reads its
# saved tensors twice would cost a replay for each time.
current_node: Callable[[], Any] = torch._C._current_autograd_node

# Where a tensor's memory starts, without a copy of memory that is shared until it is written to.
# Without it no copy could be postponed until the first write (see `_state/tensors.py`).
data_address: Callable[[Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]

# A tensor that shares its memory with another until one of both is written to.
lazy_clone: Callable[[Tensor], Tensor] = torch._lazy_clone

# The number of in-place writes to a tensor so far.
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")


def counted_writes(tensor: Tensor) -> int:
    """Return the number of in-place writes to a tensor; 0 for one of inference mode.

    Without it such a tensor, whose writes torch does not count, would raise.
    """
    return 0 if tensor.is_inference() else version_of(tensor)


# The present CUDA device, and the address of its present stream: `torch.cuda` looks them up in
# Python, for each launch of a kernel.
current_cuda_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)
current_cuda_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: 0
)

# Whether autocast is on for any type of device. Without it every replay would clear the cache of
# casts, whether or not there can be any.
is_autocasting: Callable[[], bool] = torch._C._is_any_autocast_enabled

# Whether a hook runs in the calls of all modules.
has_any_global_hook: Callable[[], bool] = _has_any_global_hook


# How many dispatch modes are at work, and whether one of pre-dispatch tracing may be, which has a
# stack of its own. Without them every step would look for a certain mode, which takes several times
# as long.
count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_before_dispatch: Callable[[], bool] = partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
)


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward call that runs in this thread ends.

    Without it recomputed state would outlive a backward call that did not reach the first step.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Keep Dynamo from compiling or inlining a function, and what that calls.

    Without it a compiled built-in module would have the engine's hooks compiled: Dynamo skips the
    frames of torch.nn, and then meets the hooks that torch calls inside of them. The mark lies on
    the code object, so that a call costs no more than before.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    strategy = dynamo._FrameExecStrategy(skip, skip)
    dynamo.set_code_exec_strategy(function.__code__, strategy)
    # Where Dynamo itself comes upon the function, as in compiled autograd, the graph breaks.
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "part of revnet's engine"  # type: ignore[attr-defined]
    return function


def compile_branch(branch: nn.Module, *args: Any, **options: Any) -> None:
    """Compile the calls of a branch, unless somebody else had it compiled.

    The module stays the same: like `Module.compile`, this sets what its `__call__` runs. Without
    it torch's own modules would stay as they are: up to torch 2.13 Dynamo skips the frames of
    torch.nn, and `Module.compile` gives it no other.
    """
    compiled = branch._compiled_call_impl
    # With disable=True, torch.compile returns what it was given.
    there = compiled is not None and compiled != branch._call_impl
    by_others = there and not hasattr(compiled, "_compiled_by_revnet")
    if by_others or "_orig_mod" in branch._modules or isinstance(branch, torch.jit.ScriptModule):
        return
    kind = type(branch)
    # Of a class that `exec` made it may be None.
    place = str(getattr(kind.forward, "__module__", None))
    skipped = place.startswith("torch.") and kind.compile is nn.Module.compile
    if skipped and not isinstance(branch, LazyModuleMixin):
        branch._compiled_call_impl = torch.compile(_entry(branch), *args, **options)
    else:
        branch.compile(*args, **options)
    compiled = branch._compiled_call_impl
    if isinstance(compiled, FunctionType):
        compiled._compiled_by_revnet = True  # type: ignore[attr-defined]


def _entry(module: nn.Module) -> Callable[..., Any]:
    """Return a function outside of torch that calls a module past what is compiled of it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    sizes = [parameter.shape for parameter in module.parameters()]
    code = _entry_code(call.__code__, (*map(type, module.modules()), *sizes))
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


_numbers = itertools.count()


@lru_cache(256)
def _entry_code(code: CodeType, structure: tuple[Any, ...]) -> CodeType:
    """Return a copy of code for modules of the same classes and sizes.

    Dynamo compiles a code object a few times only, and what it learns about varying shapes it
    remembers by the name.
    """
    return code.replace(co_name=f"{structure[0].__name__}_{next(_numbers)}")


def records_operators() -> bool:
    """Check whether operators are being noted down, by make_fx or jit.trace.

    Without it the recomputation would be noted down as well, and draw other random numbers.
    """
    if torch._C._is_tracing():
        return True
    return bool(count_modes() or is_before_dispatch()) and get_proxy_mode() is not None


def is_faking() -> bool:
    """Check for FakeTensorMode, under which nothing is drawn and generators cannot be read."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


# Switch gradients on or off in this thread. Without it each replay would make an object that does
# so for a `with`, which takes longer than an operator.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled


def is_capturing() -> bool:
    """Check whether the current CUDA stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def choose_attention_kernel_once() -> None:
    """Let torch put the kernels of attention into the order of this device.

    It does so in the first call of scaled_dot_product_attention. Without it the replays of that
    call would find another order, and choose another kernel.
    """
    if not is_capturing() and not is_faking():
        with torch.no_grad():
            query = torch.zeros(1, 1, 1, 8, dtype=torch.float16, device="cuda")
            torch._fused_sdp_choice(query, query, query)


def is_transformed() -> bool:
    """Check whether a transform of torch.func is at work, which allows no saved-tensor hooks."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def _vmap_levels() -> int:
    """Return how many vmaps of `is_grads_batched` are at work.

    Nothing only reads their number: both functions return the level that they lead to. Called by
    `map` they have no line between them, at which an interrupt would leave one level too many.
    """
    if not torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE):
        return 0
    levels: int
    _, levels = map(
        operator.call,
        (torch._C._vmapmode_increment_nesting, torch._C._vmapmode_decrement_nesting),
    )
    return levels


def outside_transforms() -> contextlib.AbstractContextManager[None]:
    """Leave the transforms of torch.func, and the vmap of `is_grads_batched`, while inside.

    Without it a replay for several gradients at once could not draw the numbers of its dropout.
    """
    levels = _vmap_levels()
    return _outside_transforms(levels) if levels or is_transformed() else _NO_CONTEXT


_NO_CONTEXT = contextlib.nullcontext()


@contextlib.contextmanager
def _outside_transforms(levels: int) -> Iterator[None]:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    # Twice, because an interrupt may come in the middle of the first.
    try:
        try:
            for _ in range(levels):
                torch._C._vmapmode_decrement_nesting()
            with temporarily_clear_interpreter_stack():
                yield
        finally:
            _return_to(levels)
    finally:
        _return_to(levels)


def _return_to(levels: int) -> None:
    # Counted, as an interrupt may have come before all were left, or after some were entered.
    for _ in range(levels - _vmap_levels()):
        torch._C._vmapmode_increment_nesting()


def is_forward_mode() -> bool:
    """Check for a level of forward-mode differentiation, whose tangents a replay would not see."""
    return forward_ad._current_level >= 0


def without_tangents() -> contextlib.AbstractContextManager[Any]:
    """Switch forward-mode differentiation off inside, as `no_grad` does not."""
    if torch.compiler.is_compiling() or not (is_forward_mode() or is_transformed()):
        return contextlib.nullcontext()
    return forward_ad._set_fwd_grad_enabled(False)


def is_exporting() -> bool:
    """Check whether torch.export is at work.

    Read as an attribute, since torch 2.11 takes the function for true in any graph.
    """
    return bool(torch.compiler._is_exporting_flag)


# Set the hooks on saved tensors, and take them away again: what the context manager
# `saved_tensors_hooks` does. Without them each step would make an object for its hooks.
push_saved_tensor_hooks: Callable[[Any, Any], None] = (
    torch._C._autograd._push_saved_tensors_default_hooks
)
pop_saved_tensor_hooks: Callable[[], None] = torch._C._autograd._pop_saved_tensors_default_hooks


def saved_tensor_hooks() -> Any:
    """Return the innermost pair of hooks on saved tensors, None where there is none.

    Without it a block could not tell that a wrapper, such as a checkpoint, stands around it.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def apply_outside_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the `apply` of a Function, for where no transform of torch.func is at work.

    Without it a step of fixed streams would cost two operators more: the `apply` of torch looks
    first for such transforms, and into each argument for what an earlier one may have left.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


# Returns whether scripts that run in this thread are optimised; an argument sets it. Without it the
# first replay of a script would raise: torch.jit profiles the first call of a script and optimises
# it for the second, which saves other tensors for backward.
optimize_scripts: Callable[..., bool] = torch._C._get_graph_executor_optimize


def storage_id(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, whichever view of it this is."""
    try:
        identity: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # A sparse tensor has none of its own.
        identity = id(tensor)
    return identity


def is_dtensor(tensor: Any) -> bool:
    """Check for a distributed tensor without importing torch.distributed.tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Any) -> bool:
    """Check that a tensor is of no subclass, such as a distributed or a fake one."""
    return type(tensor) in _PLAIN


def are_plain(tensors: Iterable[Any]) -> bool:
    """Check that no tensor is of a subclass."""
    return all(map(is_plain, tensors))
