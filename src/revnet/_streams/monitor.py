"""Tell the host, without synchronisation, which step of fixed-point streams left the range."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._factors import Increment
from .format import unit


class OutOfRange(NamedTuple):
    """Name the first step at which a stream left its range, and the largest magnitude there.

    The magnitude may be infinity or NaN.
    """

    step: int
    magnitude: float


# A finding is one int64, so that one atomic maximum orders by step (the first wins) and then by
# magnitude (float32 bits order as integers do, NaN above infinity).
_LAST_STEP = 2**31 - 2


def key_of(step: int) -> int:
    """Return what orders the findings of a step before those of later steps."""
    return (_LAST_STEP - step) << 32


def _finding(key: int) -> OutOfRange:
    return OutOfRange(
        _LAST_STEP - (key >> 32), struct.unpack("<f", struct.pack("<I", key & 0xFFFFFFFF))[0]
    )


@dataclass
class _Cell:
    """Hold what one device writes and the host reads; on the CPU both are the same memory."""

    key: Tensor
    host: Tensor
    # Per step, the share of nonzero increments that the last sample saw rounded to zero, -1 until
    # it has arrived.
    vanished: dict[int, Tensor] = field(default_factory=dict)


class RangeMonitor:
    """Learn from the device, without synchronisation, which step left the range of its stream.

    One for a sequence. The memory on the devices is not copied and not pickled: a copy starts
    empty. Memory is allocated by `prepare`, or in the first call on a device; a CUDA graph can be
    captured after that.
    """

    def __init__(self) -> None:
        self._cells: dict[torch.device, _Cell] = {}
        # Where the findings of a CUDA device go, by its index.
        self.addresses: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._awaited: set[int] = set()
        self._reported: set[int] = set()

    @classmethod
    def writing_to(cls, key: Tensor) -> RangeMonitor:
        """Return a monitor whose findings go to this memory, int64 of one element."""
        monitor = cls()
        monitor._cells[key.device] = _Cell(key, key)
        return monitor

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def prepare(self, device: torch.device) -> _Cell:
        """Allocate the memory on this device, unless it exists.

        Raises:
            RuntimeError: a CUDA graph is being captured; allocated now, the memory would belong to
                the graph.
        """
        cell = self._cells.get(device)
        if cell is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "fixed-point streams in a CUDA graph: run the sequence once before capturing it"
                )
            # In-place writes to an inference tensor would fail in the next training step.
            with torch.inference_mode(False):
                key = torch.zeros(1, dtype=torch.int64, device=device)
                host = (
                    key
                    if device.type == "cpu"
                    else _host(torch.zeros(1, dtype=torch.int64), device)
                )
            cell = self._cells.setdefault(device, _Cell(key, host))
            if key.is_cuda:
                self.addresses[key.get_device()] = cell.key.data_ptr()
        return cell

    def observe(self, bad: Tensor, magnitude: Tensor, step: int) -> None:
        """Remember on the device the largest magnitude (float32) where `bad` holds at this step."""
        bad, magnitude = _local(bad), _local(magnitude)
        if bad.numel() == 0 or is_fake(bad):
            return
        marked = torch.where(bad, magnitude, -1.0)
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            self.note(_keys(marked, step))
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(marked):
            marked = torch._C._functorch.get_unwrapped(marked)
        # A transform allows no write to a tensor that it did not make, nor torch 2.11's vmap to see
        # the bits of one.
        with torch._C._DisableFuncTorch():
            self.note(_keys(marked, step))

    def note(self, found: Tensor) -> None:
        """Remember the largest of some findings, int64 of any shape, on their device."""
        key = self.prepare(found.device).key
        key.copy_(torch.maximum(key, found.amax()))

    def sample(self, increment: Tensor | Increment, fraction_bits: int, step: int) -> None:
        """Measure in calls 1, 2, 4, 8 … of a step how many increments are rounded to zero."""
        calls = self._calls[step] = self._calls.get(step, 0) + 1
        if calls & (calls - 1):
            return
        if isinstance(increment, Tensor):
            increment = Increment(increment)
        addend, less = _local(increment.addend.detach()), increment.less
        if addend.numel() == 0 or is_fake(addend):
            return
        if addend.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        some = _some(addend)
        if less is not None:
            some = some - _some(_local(less.detach()))
        some = some.abs() * increment.gain
        nonzero = some > 0
        small = nonzero & (some <= 0.5 * unit(fraction_bits))
        share = small.sum().double() / nonzero.sum()
        vanished = self.prepare(addend.device).vanished
        if step not in vanished:
            with torch.inference_mode(False):
                vanished[step] = _host(torch.empty((), dtype=torch.float64), addend.device)
        vanished[step].fill_(-1.0).copy_(share, non_blocking=True)
        self._awaited.add(step)

    def flush(self) -> None:
        """Enqueue the copy of the findings to the host."""
        if torch.compiler.is_compiling():
            return
        for cell in self._cells.values():
            if cell.host is not cell.key:
                cell.host.copy_(cell.key, non_blocking=True)

    def poll(self) -> OutOfRange | None:
        """Return the first finding whose copy has arrived; does not wait."""
        if torch.compiler.is_compiling():
            return None
        key = max((int(cell.host.item()) for cell in self._cells.values()), default=0)
        return _finding(key) if key else None

    def check(self) -> OutOfRange | None:
        """Wait for the devices and return the first finding."""
        key = max((int(cell.key.item()) for cell in self._cells.values()), default=0)
        return _finding(key) if key else None

    def reset(self) -> None:
        """Forget the findings.

        Waits for the devices, since a copy still under way would bring the findings back.
        """
        for device, cell in self._cells.items():
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            cell.key.zero_()
            cell.host.zero_()

    def vanishing(self) -> dict[int, float]:
        """Return the new steps where most nonzero increments were rounded to zero, and their share.

        Reads what has arrived at the host; does not wait.
        """
        if torch.compiler.is_compiling() or not self._awaited:
            return {}
        shares = {
            step: share
            for cell in self._cells.values()
            for step in self._awaited & cell.vanished.keys()
            if (share := float(cell.vanished[step])) != -1.0
        }
        self._awaited -= shares.keys()
        news = {
            step: share
            for step, share in shares.items()
            if share > 0.5 and step not in self._reported
        }
        self._reported |= news.keys()
        return news


def _keys(marked: Tensor, step: int) -> Tensor:
    """Return the findings of a step: its magnitudes (float32) that are not negative."""
    return torch.where(marked < 0, 0, marked.view(torch.int32).to(torch.int64) + key_of(step))


# Increments looked at in one sample.
_SAMPLE = 65536


def _some(x: Tensor) -> Tensor:
    """Return a sample of the elements of a tensor, in float64."""
    for dim in range(x.dim()):
        x = x.narrow(dim, 0, max(1, min(x.shape[dim], _SAMPLE * x.shape[dim] // x.numel())))
    return x.double()


def _host(x: Tensor, device: torch.device) -> Tensor:
    """Return host memory that a device can copy to while the host goes on."""
    return x.pin_memory() if device.type == "cuda" else x


def _local(x: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor; any other tensor as it is."""
    if torch.compiler.is_compiling():
        return x
    distributed = sys.modules.get("torch.distributed.tensor")
    return x.to_local() if distributed is not None and isinstance(x, distributed.DTensor) else x


def is_fake(x: Tensor) -> bool:
    """Return whether x is a fake tensor or one on the meta device, which have no memory."""
    if torch.compiler.is_compiling():
        return False
    if x.is_meta or type(x) is Tensor:
        return x.is_meta
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is not None and isinstance(x, fakes.FakeTensor)
