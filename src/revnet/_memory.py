"""The memory meter: bytes kept for backward, the peak, and the gradients, on CPU and CUDA."""

import dataclasses
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import compress
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


@dataclass(frozen=True)
class MemoryReport:
    """What one call takes, in bytes above what was allocated before it.

    Attributes:
        saved_bytes: allocated when the function has returned, without the storages that the
            returned value reaches: what waits for the backward pass.
        peak_bytes: the highest point, through the backward pass.
        grad_bytes: the `.grad` storages that the call created. They are part of `peak_bytes`.
    """

    saved_bytes: int
    peak_bytes: int
    grad_bytes: int


def measure_memory(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> MemoryReport:
    """Return the memory that `fn(*args, **kwargs)` and the backward pass of its result take.

    If `fn` returns tensors that need a gradient, alone or in containers, the backward pass of their
    sum runs too and leaves its gradients in `.grad`, as any backward pass does. A function may
    also run its own backward pass and return `None`; `saved_bytes` then counts the gradients that
    it left.

    On CPU the figures are the requests to torch's allocator, to the byte. Memory that was allocated
    before the call and is freed during it changes nothing, and threads that `fn` itself starts are
    not seen. If `fn` allocates on a CUDA device, the figures are those of the CUDA devices instead:
    `requested_bytes` of `torch.cuda.memory_stats`, summed over the devices. Unlike
    `allocated_bytes` these depend neither on rounding nor on which cached block is used. There,
    memory freed during the call lowers the figures, and the peak statistics of the devices are
    reset.

    Args:
        fn: called once.
        *args: passed to `fn`.
        **kwargs: passed to `fn`.

    Raises:
        RuntimeError: a torch profiler or another measurement is running in any thread. The meter
            is a profiler itself, and torch has one for the whole process.

    Example:
        >>> w = torch.ones(1000, requires_grad=True)
        >>> measure_memory(lambda: w.exp().sum())  # keeps w.exp() for the backward pass
        MemoryReport(saved_bytes=4000, peak_bytes=8004, grad_bytes=4000)
    """
    if profiler._is_profiler_enabled or not _one_at_a_time.acquire(blocking=False):
        raise RuntimeError(
            "measure_memory was called while a torch profiler or another measurement is running: "
            "let it end first"
        )
    try:
        return _measure(fn, args, kwargs)
    finally:
        _one_at_a_time.release()


_one_at_a_time = Lock()


def _measure(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> MemoryReport:
    cpu, cuda = CpuMeter(), CudaMeter()
    with cpu.watch(), cuda.watch():
        result = fn(*args, **kwargs)
    returned = list(storages_of(all_tensors_in(result)))
    saved = [meter.current - sum(map(meter.created, returned)) for meter in (cpu, cuda)]

    outputs = [t for t in all_tensors_in(result) if t.requires_grad]
    if outputs:
        # The gradient of a sum, as `sum().backward()` makes it, but made where it is not counted.
        ones = [t.detach().new_ones(()).expand_as(t) for t in outputs]
        with cpu.watch(), cuda.watch():
            torch.autograd.backward(outputs, ones)
    meter = cuda if cuda.used else cpu
    grads = sum(map(meter.created, storages_of(_gradients())))
    return MemoryReport(saved[cuda.used], meter.peak, grads)


class CpuMeter:
    """Follows the events of the CPU allocator, block by block.

    As the other meters it counts bytes above the start, over one or more watches, and ignores what
    happens between two watches.

    Attributes:
        current: bytes that were allocated under watch and are not freed.
        peak: the highest value of `current`.
    """

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._blocks: dict[int, int] = {}
        _quiet_kineto()

    @contextmanager
    def watch(self) -> Iterator[None]:
        with profiler.profile(use_kineto=True, profile_memory=True) as events:
            yield
        for address, size in _cpu_allocations(events):
            if size > 0:
                self._blocks[address] = size
                self.current += size
                self.peak = max(self.peak, self.current)
            else:
                # A block from before the watch does not count, and its size is not known: torch
                # learns sizes only while a profiler runs, and can mistake a block for one that an
                # earlier profile saw at this address.
                self.current -= self._blocks.pop(address, 0)

    def created(self, storage: torch.UntypedStorage) -> int:
        """Return the bytes of `storage` that were allocated under watch."""
        return self._blocks.get(storage.data_ptr(), 0) if storage.device.type == "cpu" else 0


class CudaMeter:
    """Reads the CUDA allocator's statistics, which count every thread, also those of backward.

    Attributes:
        current, peak: see `CpuMeter`.
        used: whether anything was allocated on CUDA devices under watch.
    """

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self.used = False
        self._older: set[StorageWeakRef] = set()
        if torch.cuda.is_initialized():
            # Garbage that is collected during the call would count as memory that the call freed.
            gc.collect()
            _reserve_blas_workspace()
            # The references keep no memory, only the identities: a new storage cannot be mistaken
            # for an older one.
            self._older = {
                StorageWeakRef(s) for s in storages_of(_all_tensors()) if s.device.type == "cuda"
            }
            self._older |= {
                StorageWeakRef(s) for s in storages_of(_gradients()) if s.device.type == "cuda"
            }

    @contextmanager
    def watch(self) -> Iterator[None]:
        for device in _cuda_devices():
            torch.cuda.reset_peak_memory_stats(device)
        start, _, allocations = _cuda_statistics()
        base = start - self.current
        yield
        current, peak, allocations_now = _cuda_statistics()
        self.current = current - base
        self.peak = max(self.peak, peak - base)
        self.used |= allocations_now > allocations

    def created(self, storage: torch.UntypedStorage) -> int:
        """Return the bytes of `storage` if it did not exist when the meter was made, else 0."""
        if storage.device.type != "cuda" or StorageWeakRef(storage) in self._older:
            return 0
        return storage.nbytes()


class FakeMeter(TorchDispatchMode):
    """Counts the storages of fake tensors, which have no memory, as operations make them.

    Attributes:
        current, peak: see `CpuMeter`.
        written: bytes of all storages that were made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.written = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages_of(all_tensors_in((args, kwargs)))}
        out = func(*args, **(kwargs or {}))
        for storage in storages_of(all_tensors_in(out)):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.written += size
        self.current += size
        self.peak = max(self.peak, self.current)

        def freed(_: Any) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)


@cache
def _quiet_kineto() -> None:
    """Keep the profiler's start and stop marks off stderr, unless the user asked for a level."""
    if "KINETO_LOG_LEVEL" not in os.environ:
        os.environ["KINETO_LOG_LEVEL"] = "6"
        # The first profile of the process reads the level, once.
        with profiler.profile(use_kineto=True):
            pass
        del os.environ["KINETO_LOG_LEVEL"]


def _cpu_allocations(events: profiler.profile) -> list[tuple[int, int]]:
    """Return the address and bytes of each allocation, in order of time.

    The bytes of a release are negative.
    """
    timed = []
    pending = events.kineto_results.experimental_event_tree() if events.kineto_results else []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        fields = event.extra_fields
        if (
            isinstance(fields, torch._C._profiler._ExtraFields_Allocation)
            and fields.device.type == "cpu"
        ):
            timed.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(timed, key=lambda event: event[0])]


def _cuda_devices() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _cuda_statistics() -> tuple[int, int, int]:
    """Return the bytes now, at the peak, and the number of allocations, summed over the devices."""
    current = peak = allocations = 0
    for device in _cuda_devices():
        statistics = torch.cuda.memory_stats(device)
        # The asynchronous allocator does not count requested bytes.
        native = torch.cuda.get_allocator_backend() == "native"
        counted = "requested_bytes" if native else "allocated_bytes"
        current += statistics.get(f"{counted}.all.current", 0)
        peak += statistics.get(f"{counted}.all.peak", 0)
        allocations += statistics.get("allocation.all.allocated", 0)
    return current, peak, allocations


def _reserve_blas_workspace() -> None:
    """Make cuBLAS and cuBLASLt allocate their workspaces, 32 MiB and 1 MiB on an H100.

    The first product of a thread would allocate them under watch, and they stay.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        x = torch.zeros((), device="cuda", requires_grad=True)
        square = torch.zeros(16, 16, device="cuda")

        def reserve(gradient: Tensor | None = None) -> Tensor | None:
            torch.cuda.current_blas_handle()
            torch.nn.functional.linear(square, square, square[0])
            return gradient

        # The backward pass has a thread of its own for each device, and there its hooks run.
        x.register_hook(reserve)
        reserve()
        torch.autograd.backward(x * 1)


def _all_tensors() -> list[Tensor]:
    """Return every tensor that Python can see."""
    # Compare types: isinstance would ask proxies for their __class__ and so run their code.
    types: set[type] = {Tensor}
    pending: list[type] = [Tensor]
    while pending:
        subclasses: list[type] = type.__subclasses__(pending.pop())
        types.update(subclasses)
        pending.extend(subclasses)
    objects = gc.get_objects()
    return list(compress(objects, map(types.__contains__, map(type, objects))))


def _gradients() -> list[Tensor]:
    """Return the `.grad` of every tensor that Python can see."""
    with torch._C.DisableTorchFunctionSubclass():
        # For other tensors torch warns that their .grad is not filled.
        owners = [t for t in _all_tensors() if t.requires_grad and (t.is_leaf or t.retains_grad)]
        return [t.grad for t in owners if t.grad is not None]


def all_tensors_in(value: Any) -> Iterator[Tensor]:
    """Go through the tensors that `value` reaches through containers and dataclasses."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            pending.extend(getattr(item, field.name) for field in dataclasses.fields(item))


def storages_of(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the distinct storages behind `tensors`."""
    storages: dict[int, torch.UntypedStorage] = {}
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            # A DTensor names its device mesh among its parts.
            parts = (getattr(tensor, name) for name in names)
            pending.extend(part for part in parts if isinstance(part, Tensor))
        elif torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            # Left over by a transform of torch.func, or by a compilation.
            pending.append(torch._C._functorch.get_unwrapped(tensor))
        elif tensor.layout is torch.sparse_coo:
            pending.extend((tensor._indices(), tensor._values()))
        elif torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
    return list(storages.values())
