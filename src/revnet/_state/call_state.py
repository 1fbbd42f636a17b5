"""What a branch saw when it was called, recorded so that a replay sees the same (rule 6 of the engine)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .._errors import ReversibleError


class RandomState:
    """State of the CPU generator and of the generators of `devices`, at one moment."""

    __slots__ = ("cpu", "devices")

    def __init__(self, devices: Sequence[torch.device]) -> None:
        # Words compare six times as fast as bytes.
        self.cpu = torch.default_generator.get_state().view(torch.int64)
        self.devices = [(device, _read_generator(device)) for device in devices]

    def same(self, other: RandomState) -> bool:
        """Whether no generator has been drawn from in between."""
        return self.devices == other.devices and torch.equal(self.cpu, other.cpu)

    def set(self) -> None:
        torch.default_generator.set_state(self.cpu.view(torch.uint8))
        for device, state in self.devices:
            _write_generator(device, state)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Draw from this state inside; leave the generators as they were found."""
        found = RandomState([device for device, _ in self.devices])
        self.set()
        try:
            yield
        finally:
            found.set()


def _read_generator(device: torch.device) -> Any:
    if device.type == "cuda":
        # Seed and offset are host integers: reading them neither allocates nor synchronises.
        generator = torch.cuda.default_generators[_index(device)]
        return generator.initial_seed(), generator.get_offset()
    return _Bytes(torch.get_device_module(device.type).get_rng_state(device))


def _write_generator(device: torch.device, state: Any) -> None:
    if device.type == "cuda":
        generator = torch.cuda.default_generators[_index(device)]
        seed, offset = state
        if generator.initial_seed() != seed:
            generator.manual_seed(seed)
        generator.set_offset(offset)
    else:
        torch.get_device_module(device.type).set_rng_state(state.tensor, device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Bytes:
    """A generator state that compares by content."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bytes) and torch.equal(self.tensor, other.tensor)

    __hash__ = None  # type: ignore[assignment]


class AutocastState:
    """Autocast of the CPU and of the device types in use."""

    __slots__ = ("types", "state")

    def __init__(self, device_types: Sequence[str]) -> None:
        self.types = list(dict.fromkeys(("cpu", *device_types)))
        self.state = self._read()

    def _read(self) -> list[tuple[bool, torch.dtype, bool]]:
        cache = torch.is_autocast_cache_enabled()
        return [
            (torch.is_autocast_enabled(t), torch.get_autocast_dtype(t), cache) for t in self.types
        ]

    def restored(self) -> contextlib.AbstractContextManager[Any] | None:
        """A context with the recorded state; None where that is the present one."""
        present = self._read()
        return None if present == self.state else self._restored(present)

    @contextlib.contextmanager
    def _restored(self, present: list[tuple[bool, torch.dtype, bool]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device_type, state, now in zip(self.types, self.state, present, strict=True):
                if now != state:
                    enabled, dtype, cache = state
                    stack.enter_context(
                        torch.autocast(
                            device_type, dtype=dtype, enabled=enabled, cache_enabled=cache
                        )
                    )
            yield


def modules_of(fn: nn.Module) -> list[nn.Module]:
    """Every distinct module that a branch may enter: those that it contains, and where it is a step, a method's own."""
    owner = getattr(vars(fn).get("fn"), "__self__", None)
    found = [fn, owner] if isinstance(owner, nn.Module) and owner is not fn else [fn]
    seen = set(found)
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


# In these, float streams lose too much to rounding.
LOW_PRECISION = (torch.bfloat16, torch.float16)


def _is_dtensor(tensor: Tensor | None) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _swapped_by_fsdp(recorded: Any, present: Any) -> bool:
    # FSDP2 exchanges sharded for gathered parameters between the calls. A sharded one is a DTensor;
    # with tensor parallelism the gathered one is, too, but on fewer dimensions of the mesh.
    if _is_dtensor(recorded) and _is_dtensor(present):
        return bool(
            recorded.device_mesh != present.device_mesh or recorded.placements != present.placements
        )
    return _is_dtensor(recorded) or _is_dtensor(present)


# Until torch 2.13, FSDP2 does not cast the inputs and outputs of a module that is called between
# its pre- and its post-backward (fixed in pytorch #159359). That is where replays happen.
_FSDP_REPLAYS_UNCAST = torch.__version__ < torch.torch_version.TorchVersion("2.13")


@contextlib.contextmanager
def _fsdp_casts(modules: list[nn.Module]) -> Iterator[None]:
    """The casts of the mixed-precision policies of those modules that FSDP2 shards."""
    handles = []
    for module in modules:
        policy = module._get_fsdp_state()._mp_policy  # type: ignore[operator]
        if policy.cast_forward_inputs and policy.param_dtype is not None:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, dtype=policy.param_dtype: _cast((args, kwargs), dtype),
                    with_kwargs=True,
                )
            )
        if policy.output_dtype is not None:
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out, dtype=policy.output_dtype: _cast(out, dtype)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def _sharded_by_fsdp(modules: Sequence[nn.Module]) -> list[nn.Module]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (
        []
        if fsdp is None
        else [module for module in modules if isinstance(module, fsdp.FSDPModule)]
    )


def cast_to_low_precision(modules: Sequence[nn.Module]) -> bool:
    """Whether FSDP2 hands any of these modules its inputs, or on its outputs, in bfloat16 or float16."""
    policies = [module._get_fsdp_state()._mp_policy for module in _sharded_by_fsdp(modules)]  # type: ignore[operator]
    dtypes = {policy.param_dtype for policy in policies if policy.cast_forward_inputs}
    return not dtypes.union(policy.output_dtype for policy in policies).isdisjoint(LOW_PRECISION)


# Replays exclude one another, since they set modules and global generators back: backward may run
# in several threads.
REPLAYING = threading.RLock()

# Types of the usual attributes of a module, none of them a tensor.
_NO_TENSORS = frozenset(map(type, (None, True, 0, 0.0, "", (), [], {}, OrderedDict(), set())))


class ModuleState:
    """Parameters, buffers and training flags of a branch as its call saw them.

    Made before the call, completed by `settle` after it. Tensors without gradient that are plain
    attributes count among the buffers. Buffers that the call changed stay as copies of their value
    before it, those that it made as what stood in their place, all others as references with their
    version.
    """

    __slots__ = ("modules", "training", "found", "parameters", "buffers", "written")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.training = [module.training for module in modules]
        # Owner, name, parameter, its version, and whether it requires a gradient.
        self.parameters: list[tuple[dict[str, Any], str, Tensor, int, bool]] = []
        # Owner, name, buffer (or what stood in its place), its version unless the call changed it,
        # and what a replay starts from if it may write.
        self.buffers: list[tuple[dict[str, Any], str, Any, int | None, Tensor | None]] = []
        # The attributes of each module, until `settle`: they may hold the graph.
        self.found: list[dict[str, Any]] = []
        # The attributes of each module in which the call set some, such as a loss: a replay's would
        # hold its graph.
        self.written: list[dict[str, Any]] = []
        for module in modules:
            own = module.__dict__
            self.found.append(own.copy())
            if buffers := own["_buffers"]:
                self._add(buffers, buffers)
            if not _NO_TENSORS.issuperset(map(type, own.values())):
                self._add(own, [name for name, x in _tensors(own) if not x.requires_grad])

    def _add(self, owner: dict[str, Any], names: Iterable[str]) -> None:
        self.buffers += [
            (owner, name, buffer, None, None)
            if (buffer := owner[name]) is None or (not is_lazy(buffer) and buffer.is_inference())
            # A lazy module gives it memory in its first call.
            else (
                owner,
                name,
                buffer,
                buffer._version,
                buffer if is_lazy(buffer) else buffer.detach().clone(),
            )
            for name in names
        ]

    def settle(self) -> None:
        # Read after the call, because a lazy module creates its parameters in its first call.
        self.parameters = [
            (owner, name, parameter, parameter._version, parameter.requires_grad)
            for module in self.modules
            if (owner := module._parameters)
            for name, parameter in owner.items()
            if parameter is not None
        ]
        for module, found in zip(self.modules, self.found, strict=True):
            own = module.__dict__
            if len(own) == len(found) and all(map(operator.is_, own.values(), found.values())):
                continue
            self.written.append(own)
            self.buffers += [
                (own, name, before, None, None)
                for name, x in _tensors(own)
                if not x.requires_grad
                and not isinstance(before := found.get(name, _ABSENT), Tensor)
            ]
        self.found = []
        if not self.buffers:
            return
        # Batch norm writes its statistics without a new version. Where a counter tells, all buffers
        # of the module are taken to have moved; where nothing tells, a replay in training mode
        # still writes to copies only.
        moved = {
            id(owner)
            for owner, name, buffer, version, _ in self.buffers
            if (version is not None and buffer._version != version) or owner.get(name) is not buffer
        }
        training = {id(module._buffers) for module in self.modules if module.training}
        self.buffers = [
            (owner, name, buffer, None, before)
            if id(owner) in moved
            else (
                owner,
                name,
                buffer,
                version,
                buffer
                if id(owner) in training and before is not None and buffer.is_floating_point()
                else None,
            )
            for owner, name, buffer, version, before in self.buffers
        ]

    def restored(self, where: str) -> contextlib.AbstractContextManager[Any] | None:
        """The modules as the call found them inside, as they are now afterwards; None where that is the same.

        Raises:
            ReversibleError: a parameter, or a buffer that the call left alone, was changed in place
                since.
        """
        plain = [module.training for module in self.modules] == self.training
        for owner, name, parameter, version, flag in self.parameters:
            present = owner.get(name)
            if parameter._version != version and (
                not isinstance(parameter, nn.Parameter)
                or _is_dtensor(parameter)
                or not _swapped_by_fsdp(parameter, present)
            ):
                raise ReversibleError(_changed(where, "parameter", name))
            plain = plain and present is parameter and parameter.requires_grad is flag
        for owner, name, buffer, found, start in self.buffers:
            if found is not None and buffer._version != found:
                raise ReversibleError(_changed(where, "buffer", name))
            plain = plain and start is None and owner.get(name, _ABSENT) is buffer
        uncast = _sharded_by_fsdp(self.modules) if _FSDP_REPLAYS_UNCAST else []
        return None if plain and not uncast and not self.written else self._restored(uncast)

    @contextlib.contextmanager
    def _restored(self, uncast: list[nn.Module]) -> Iterator[None]:
        training = [module.training for module in self.modules]
        written = [(own, own.copy()) for own in self.written]
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        for owner, name, parameter, _, _ in self.parameters:
            present = owner.get(name)
            if present is not parameter and not _swapped_by_fsdp(parameter, present):
                swapped.append((owner, name, present))
                owner[name] = parameter
        for owner, name, buffer, _, start in self.buffers:
            present = owner.get(name, _ABSENT)
            if start is not None or present is not buffer:
                swapped.append((owner, name, present))
                _put(owner, name, buffer if start is None else start.clone())
        toggled = [
            parameter
            for _, _, parameter, _, flag in self.parameters
            if parameter.requires_grad is not flag and parameter.is_leaf
        ]
        for parameter in toggled:
            parameter.requires_grad_(not parameter.requires_grad)
        _set_training(self.modules, self.training)
        try:
            with _fsdp_casts(uncast):
                yield
        finally:
            for owner, name, present in reversed(swapped):
                _put(owner, name, present)
            for own, before in written:
                for name in own.keys() - before.keys():
                    del own[name]
                own.update(before)
            for parameter in toggled:
                parameter.requires_grad_(not parameter.requires_grad)
            _set_training(self.modules, training)


def _tensors(own: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The attributes of a module that are tensors, with their names."""
    return [(name, x) for name, x in own.items() if isinstance(x, Tensor) and not x.is_inference()]


# Stands for an attribute that a module does not have.
_ABSENT = object()


def _put(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        owner.pop(name, None)
    else:
        owner[name] = value


def _set_training(modules: list[nn.Module], flags: list[bool]) -> None:
    for module, flag in zip(modules, flags, strict=True):
        module.training = flag


def _changed(where: str, kind: str, name: str) -> str:
    return (
        f"{where}: {kind} {name!r} was changed in place between forward and backward, so the "
        f"forward pass cannot be replayed. Call backward before the optimizer's step (or any other "
        f"in-place write)."
    )


class KeywordState:
    """Keywords of one call, containers copied, so that a replay reads what the call read and writes nothing back."""

    __slots__ = ("kwargs", "versions")

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.versions: list[tuple[Tensor, int, str]] = []
        self.kwargs = {name: self._copy(value, name) for name, value in kwargs.items()}

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            value = _detached(value)
            # One of inference mode has no version: autograd saves none, and nothing outside of that
            # mode writes to it.
            if not value.is_inference():
                self.versions.append((value, value._version, name))
            return value
        return _map_containers(lambda item: self._copy(item, name), value)

    def fresh(self) -> dict[str, Any]:
        """The keywords for one replay."""
        return {name: _copy_containers(value) for name, value in self.kwargs.items()}

    def check(self, where: str) -> None:
        for tensor, version, name in self.versions:
            if tensor._version != version:
                raise ReversibleError(_changed(where, "keyword tensor", name))


def _copy_containers(value: Any) -> Any:
    return _map_containers(_copy_containers, value)


def _detached(tensor: Tensor) -> Tensor:
    """The tensor without its graph.

    A replay needs the value alone. The graph of a tensor made by an earlier step of the same call
    would hold that call, and the call this tensor: a cycle through C++ that nothing collects.
    """
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()


def _map_containers(fn: Callable[[Any], Any], value: Any) -> Any:
    """`fn` of the items of a container, in another one of its kind; of anything else, itself."""
    if type(value) in (list, tuple, set):
        return type(value)(map(fn, value))
    if type(value) in (dict, OrderedDict, defaultdict):
        new = copy.copy(value)
        new.update([(key, fn(item)) for key, item in value.items()])
        return new
    if type(value) is deque:
        return deque(map(fn, value), value.maxlen)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(fn, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                # Also where it is frozen.
                object.__setattr__(new, field.name, fn(getattr(value, field.name)))
        return new
    return value


class Deterministic(nn.Module):
    """Calls `net`, and can repeat a call with the same randomness.

    Args:
        net: any module.

    `forward(*args, record_rng=False, set_rng=False, **kwargs)`: with `record_rng`, the state of the
    CPU generator and of the generators of the devices of the tensors in `args` is kept; with
    `set_rng`, the call draws from the kept state and leaves the generators as it found them.

    Raises:
        ReversibleError: `set_rng` before any `record_rng`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._recorded: RandomState | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorded": None}

    def forward(
        self, *args: Any, record_rng: bool = False, set_rng: bool = False, **kwargs: Any
    ) -> Any:
        if record_rng:
            self._recorded = RandomState(devices_of(args))
        if not set_rng:
            return self.net(*args, **kwargs)
        if self._recorded is None:
            raise ReversibleError(
                "Deterministic: set_rng=True, but no call was made with record_rng=True before."
            )
        with self._recorded.restored():
            return self.net(*args, **kwargs)


def devices_of(tensors: Sequence[Any]) -> list[torch.device]:
    """The accelerator devices among `tensors`, each once."""
    found = {
        t.device for t in tensors if isinstance(t, Tensor) and t.device.type not in ("cpu", "meta")
    }
    return list(found)
