"""How a stream is held: as floating point, or as integers that add and subtract without loss.

`Fixed` exists in three implementations of one arithmetic, equal in every bit: plain torch operations (the reference,
which compilers fuse), a Triton kernel (`_kernels.py`), and for the CPU a variant that works in place, in few passes.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

# An integer type holds magnitudes below 2 to this power; its smallest value is the sentinel for "not a number". Sums
# are taken in 64 bits, of which one stays free so that a sum of two magnitudes in range never wraps.
_RANGE_BITS = {torch.int32: 31, torch.int64: 62}
_SENTINEL = {dtype: torch.iinfo(dtype).min for dtype in _RANGE_BITS}

DEFAULT_FRACTION_BITS = 40


@dataclass(frozen=True)
class Float:
    """Streams held as the floating-point tensors themselves: `(x + f) - f` is then close to x, not equal to it."""


@dataclass(frozen=True)
class Fixed:
    """Streams held as integers, value = integer × 2^-fraction_bits, so that subtracting undoes adding in every bit.

    A branch output is rounded to the nearest multiple of 2^-fraction_bits (ties to even) and added as an integer. NaN,
    infinity, and magnitudes beyond `limit` become a sentinel that reads as NaN and that no later addition removes:
    nothing wraps around.

    Args:
        fraction_bits: from 0 to 31 (int32) or 62 (int64). The rounding error of an addition is at most
            2^-(fraction_bits + 1). The default, 40, adds bfloat16 numbers from 2^-33 and float32 numbers from 2^-17 on
            without any rounding, and holds ±4.1 million.
        dtype: torch.int32 or torch.int64. Left out: int32 where fraction_bits is 16 or less, int64 otherwise. int32
            halves the memory and the traffic of a stream; with 16 fraction bits it holds ±32,767.

    Raises:
        TypeError, ValueError: another dtype; fraction bits that the dtype does not have.

    Reference: MacKay et al. 2018, "Reversible Recurrent Neural Networks" (arXiv:1810.10999), section 4.2.
    """

    fraction_bits: int = DEFAULT_FRACTION_BITS
    dtype: torch.dtype = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        bits, dtype = self.fraction_bits, cast(Any, self.dtype)
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise TypeError(f"Fixed(fraction_bits={bits!r}): expected an integer")
        if dtype is None:
            dtype = torch.int32 if bits <= 16 else torch.int64
            object.__setattr__(self, "dtype", dtype)
        if dtype not in _RANGE_BITS:
            raise ValueError(f"Fixed(dtype={dtype!r}): expected torch.int32 or torch.int64")
        if not 0 <= bits <= _RANGE_BITS[dtype]:
            raise ValueError(
                f"Fixed(fraction_bits={bits}, dtype={dtype}): expected 0 to {_RANGE_BITS[dtype]} fraction bits"
            )

    @property
    def limit(self) -> float:
        """The largest magnitude a stream can hold, rounded down to a float64."""
        largest = 2 ** _RANGE_BITS[self.dtype] - 1
        unused = max(0, largest.bit_length() - 53)
        return math.ldexp(largest >> unused << unused, -self.fraction_bits)

    def encode(self, x: Tensor, monitor: RangeMonitor | None = None, step: int = -1) -> Tensor:
        """Return x as integers; x: any floating dtype and shape, strides as an elementwise operation on x."""
        return self._encode(x, None, monitor, step)[0]

    def decode(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of held integers, rounded to `dtype`, NaN where the sentinel stands."""
        if held.is_cuda and _fusible(held):
            value = torch.empty_like(held, dtype=dtype)
            if self._launched(_like(held, value), None, None, value, 1, None, 0):
                return value
        return self._read(held, held != _SENTINEL[self.dtype], dtype)

    def add(
        self,
        held: Tensor,
        increment: Tensor,
        dtype: torch.dtype,
        monitor: RangeMonitor | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return `(held + round(increment · 2^fraction_bits), its value)` in one pass over the memory.

        Args:
            held: integers of this format, any shape and strides.
            increment: floating point, of held's shape or broadcast to it.
            dtype: of the value returned.
            monitor: told, without synchronisation, about sums that leave the range and increments that vanish.
            step: the number that the monitor reports.

        Returns:
            The new integers and their value, both with the strides of an elementwise operation on held.
        """
        if _fusible(held, increment):
            if monitor is not None:
                monitor.sample(increment, self, step)
            return self._fused(held, increment, 1, dtype, monitor, step)
        return self._combine(held, increment, 1, dtype, monitor, step)

    def subtract(self, held: Tensor, increment: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what `add` was given, and its value: the exact inverse of an addition that stayed in range."""
        if _fusible(held, increment):
            return self._fused(held, increment, -1, dtype, None, 0)
        return self._combine(held, increment, -1, dtype, None, 0)

    def _encode(
        self, x: Tensor, dtype: torch.dtype | None, monitor: RangeMonitor | None, step: int
    ) -> tuple[Tensor, Any]:
        """Return the integers and, where a dtype is given, their value, in one pass over the memory."""
        if _fusible(x):
            return self._fused(None, x, 1, dtype, monitor, step)
        counts, fits = self._quantise(x)
        if monitor is not None:
            monitor.observe(~fits, _magnitude(x), step)
        held = torch.where(fits, counts, _SENTINEL[self.dtype]).to(self.dtype)
        return held, None if dtype is None else self._read(counts, fits, dtype)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x · 2^fraction_bits rounded to int64, zero where it does not fit, and where it fits."""
        x = _rounded(x) if torch.compiler.is_compiling() else x.to(_wide(x.dtype))
        scaled = torch.round(x * 2.0**self.fraction_bits)
        fits = scaled.abs() < 2.0 ** _RANGE_BITS[self.dtype]
        return torch.where(fits, scaled, 0.0).to(torch.int64), fits

    def _combine(
        self,
        held: Tensor,
        increment: Tensor,
        sign: int,
        dtype: torch.dtype,
        monitor: RangeMonitor | None,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """The reference: what the fused implementations equal in every bit."""
        counts, fits = self._quantise(increment)
        bound, sentinel = 2 ** _RANGE_BITS[self.dtype], _SENTINEL[self.dtype]
        # held comes first in every operation: the first operand decides the strides of the result.
        known = held != sentinel
        addend = torch.where(known, sign * counts, 0)
        total = held.to(torch.int64) + addend
        inside = known & fits & (total < bound) & (total > -bound)
        if monitor is not None:
            value = total.abs().to(torch.float32) * 2.0**-self.fraction_bits
            monitor.observe(known & ~inside, torch.where(fits, value, _magnitude(increment)), step)
        return torch.where(inside, total, sentinel).to(self.dtype), self._read(total, inside, dtype)

    def _read(self, held: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
        value = torch.where(inside, held.to(_wide(dtype)) * 2.0**-self.fraction_bits, math.nan)
        # No `to` that changes nothing: in a compiled Function, torch 2.11 takes the two names of the result for two
        # outputs, one of them without a gradient, and both lose it.
        return value if value.dtype == dtype else value.to(dtype)

    def _fused(
        self,
        held: Tensor | None,
        increment: Tensor,
        sign: int,
        dtype: torch.dtype | None,
        monitor: RangeMonitor | None,
        step: int,
    ) -> tuple[Tensor, Any]:
        """Combine (or, without held, encode) over dense memory; the value is None where no dtype is asked for."""
        new = torch.empty_like(increment if held is None else held, dtype=self.dtype)
        value = None if dtype is None else torch.empty_like(new, dtype=dtype)
        if new.numel() == 0 or _is_fake(new):
            return new, value
        held = None if held is None else _like(held, new)
        increment = _like(increment, new)
        if new.device.type == "cpu":
            self._combine_in_cache(held, increment, new, value, sign, monitor, step)
        elif not self._launched(held, increment, new, value, sign, monitor, step):
            self._combine_into(held, increment, new, value, sign, monitor, step)
        return new, value

    def _launched(
        self,
        held: Tensor | None,
        increment: Tensor | None,
        new: Tensor | None,
        value: Tensor | None,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> bool:
        launch = _launcher()
        finding = None if monitor is None or new is None else monitor.prepare(new.device).key
        return launch is not None and launch(
            held, increment, new, value, finding, sign, self.fraction_bits, _RANGE_BITS[self.dtype], _key(step)
        )

    def _combine_into(
        self,
        held: Tensor | None,
        increment: Tensor,
        new: Tensor,
        value: Tensor | None,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> None:
        """The reference, written to memory that exists."""
        origin = torch.zeros_like(new) if held is None else held
        dtype = torch.float32 if value is None else value.dtype
        result, read = self._combine(origin, increment, sign, dtype, monitor, step)
        new.copy_(result)
        if value is not None:
            value.copy_(read)

    def _combine_in_cache(
        self,
        held: Tensor | None,
        increment: Tensor,
        new: Tensor,
        value: Tensor | None,
        sign: int,
        monitor: RangeMonitor | None,
        step: int,
    ) -> None:
        """Combine on the CPU in place, piece by piece, with as few passes as possible.

        Two reductions per piece show that every number is far inside the range; a piece where they do not is left to
        the reference. A quarter of the range is far enough: no sum of an increment below it with a valid integer or the
        sentinel, wrapped or not, comes out below it unless it is right.
        """
        scale, quarter = 2.0**self.fraction_bits, 2.0 ** (_RANGE_BITS[self.dtype] - 2)
        size = new.numel()
        length = min(size, _PIECE * torch.get_num_threads())
        # Where the value has the type that the arithmetic needs, its own memory serves.
        wides = {_wide(x.dtype) for x in (increment, value) if x is not None}
        scratch = {wide: torch.empty(length, dtype=wide) for wide in wides if value is None or value.dtype != wide}
        flat = [None if x is None else x.as_strided((size,), (1,)) for x in (held, increment, new, value)]
        for start in range(0, size, length):
            count = min(length, size - start)
            old, addend, into, read = (x if x is None or count == size else x[start : start + count] for x in flat)
            assert addend is not None
            assert into is not None
            room = {wide: memory[:count] for wide, memory in scratch.items()}
            if read is not None and read.dtype not in room:
                room[read.dtype] = read
            scaled = room[_wide(addend.dtype)]
            if addend.dtype == scaled.dtype:
                torch.mul(addend, sign * scale, out=scaled)
            else:
                scaled.copy_(addend).mul_(sign * scale)
            ordinary = _within(scaled.round_(), quarter)
            if ordinary:
                into.copy_(scaled)
                if old is not None:
                    into.add_(old)
                if read is not None:
                    wide = room[_wide(read.dtype)]
                    wide.copy_(into).mul_(1.0 / scale)
                    ordinary = _within(wide, quarter / scale)
                    if wide is not read:
                        read.copy_(wide)
            if not ordinary:
                self._combine_into(old, addend, into, read, sign, monitor, step)


# Elements per thread and piece. Smaller pieces stay in a level-2 cache but cost more in calls than that saves; this
# bounds the scratch memory and stays in a level-3 cache. A multiple of the length that torch gives to a thread.
_PIECE = 262144


def _within(x: Tensor, bound: float) -> bool:
    low, high = torch.aminmax(x)
    return low.item() > -bound and high.item() < bound  # False for NaN


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which scaling a number of this type by a power of two is exact."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounded(x: Tensor) -> Tensor:
    """Return x in its wide type, of 16-bit numbers the values that the 16 bits hold.

    Inductor keeps 16-bit intermediates in float32 where it fuses. The addition and its inverse need not be fused alike:
    without this rounding, which changes no number that was stored, they would not see the same increment.
    """
    wide = x.to(_wide(x.dtype))
    if x.dtype not in (torch.bfloat16, torch.float16):
        return wide
    dropped = 16 if x.dtype == torch.bfloat16 else 13
    finite = torch.where(wide.isfinite(), wide, 0.0)
    bits = finite.view(torch.int32)
    bits = (bits + (2 ** (dropped - 1) - 1) + ((bits >> dropped) & 1)) & -(2**dropped)
    rounded = bits.view(torch.float32)
    if x.dtype == torch.float16:
        rounded = torch.where(finite.abs() < 2.0**-14, torch.round(finite * 2.0**24) * 2.0**-24, rounded)
        rounded = torch.where(rounded.abs() > 65504.0, rounded * math.inf, rounded)
    return torch.where(wide.isfinite(), rounded, wide)


def _magnitude(x: Tensor) -> Tensor:
    return x.abs().to(torch.float32)


def _like(x: Tensor, pattern: Tensor) -> Tensor:
    """Return x with the memory layout of a dense tensor, x itself where it has it."""
    same = x.stride() == pattern.stride() or (x.is_contiguous() and pattern.is_contiguous())
    if same and x.shape == pattern.shape and not x.is_neg():
        return x
    return torch.empty_like(pattern, dtype=x.dtype).copy_(x)


def _fusible(*tensors: Tensor) -> bool:
    """Whether there is a fused implementation, and the memory may be worked on: not traced, not batched.

    Fake tensors have no memory, and take what the fused implementation would.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    for x in tensors:
        if _is_fake(x):
            continue
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        if x.device.type != "cpu" and (not x.is_cuda or _launcher() is None):
            return False
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is None or proxies.get_proxy_mode() is None


@cache
def _launcher() -> Callable[..., bool] | None:
    try:
        from ._kernels import launch
    except ImportError:
        return None
    return launch


def fitting_fraction_bits(magnitude: float, dtype: torch.dtype) -> int | None:
    """Return the largest number of fraction bits with which `dtype` holds this magnitude, None where none does."""
    if not math.isfinite(magnitude):
        return None
    bits = _RANGE_BITS[dtype]
    fraction_bits = min(bits, bits - math.frexp(magnitude)[1])
    if round(math.ldexp(abs(magnitude), fraction_bits)) >= 2**bits:
        fraction_bits -= 1
    return fraction_bits if fraction_bits >= 0 else None


class OutOfRange(NamedTuple):
    """The first step at which a stream left its range, and the largest magnitude there (infinity and NaN included)."""

    step: int
    magnitude: float


# A finding is one int64, so that one atomic maximum orders by step (the first wins) and then by magnitude (float32 bits
# order as integers do, NaN above infinity).
_LAST_STEP = 2**31 - 2


def _key(step: int) -> int:
    return (_LAST_STEP - step) << 32


def _finding(key: int) -> OutOfRange:
    return OutOfRange(_LAST_STEP - (key >> 32), struct.unpack("<f", struct.pack("<I", key & 0xFFFFFFFF))[0])


@dataclass
class _Cell:
    """What one device writes and the host reads. On the CPU both are the same memory."""

    key: Tensor
    host: Tensor
    # Per step, the share of nonzero increments that the last sample saw rounded to zero, -1 until it has arrived.
    vanished: dict[int, Tensor] = field(default_factory=dict)


class RangeMonitor:
    """Learns from the device, without synchronisation, which step left the range of its stream.

    One for a sequence. The memory on the devices is not copied and not pickled: a copy starts empty. Memory is
    allocated by `prepare`, or in the first call on a device; a CUDA graph can be captured after that.
    """

    def __init__(self) -> None:
        self._cells: dict[torch.device, _Cell] = {}
        self._calls: dict[int, int] = {}
        self._awaited: set[int] = set()
        self._reported: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def prepare(self, device: torch.device) -> _Cell:
        """Allocate the memory on this device, unless it exists.

        Raises:
            RuntimeError: a CUDA graph is being captured; allocated now, the memory would belong to the graph.
        """
        cell = self._cells.get(device)
        if cell is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("fixed-point streams in a CUDA graph: run the sequence once before capturing it")
            # In-place writes to an inference tensor would fail in the next training step.
            with torch.inference_mode(False):
                key = torch.zeros(1, dtype=torch.int64, device=device)
                host = key if device.type == "cpu" else _host(torch.zeros(1, dtype=torch.int64), device)
            cell = self._cells.setdefault(device, _Cell(key, host))
        return cell

    def observe(self, bad: Tensor, magnitude: Tensor, step: int) -> None:
        """Remember, on the device, the largest magnitude (float32) where `bad` holds, as found at this step."""
        bad, magnitude = _local(bad), _local(magnitude)
        if bad.numel() == 0 or _is_fake(bad):
            return
        found = torch.where(bad, magnitude.view(torch.int32).to(torch.int64) + _key(step), 0)
        while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(found):
            found = torch._C._functorch.get_unwrapped(found)
        key = self.prepare(found.device).key
        key.copy_(torch.maximum(key, found.amax()))

    def sample(self, increment: Tensor, fixed: Fixed, step: int) -> None:
        """Measure, in the 1st, 2nd, 4th, 8th ... call of a step, how many of some increments are rounded to zero."""
        increment = _local(increment.detach())
        calls = self._calls[step] = self._calls.get(step, 0) + 1
        if calls & (calls - 1) or increment.numel() == 0 or _is_fake(increment):
            return
        if increment.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        some = increment
        for dim in range(some.dim()):
            some = some.narrow(dim, 0, max(1, min(some.shape[dim], _SAMPLE * some.shape[dim] // some.numel())))
        some = some.abs().to(_wide(some.dtype))
        nonzero = some > 0
        small = nonzero & (some * 2.0**fixed.fraction_bits <= 0.5)
        share = small.sum().double() / nonzero.sum()
        vanished = self.prepare(increment.device).vanished
        if step not in vanished:
            with torch.inference_mode(False):
                vanished[step] = _host(torch.empty((), dtype=torch.float64), increment.device)
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
        """Forget the findings. Waits for the devices, since a copy still under way would bring them back."""
        for device, cell in self._cells.items():
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            cell.key.zero_()
            cell.host.zero_()

    def vanishing(self) -> dict[int, float]:
        """Return the steps, not yet returned, where most nonzero increments were rounded to zero, and their share.

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
        news = {step: share for step, share in shares.items() if share > 0.5 and step not in self._reported}
        self._reported |= news.keys()
        return news


# Increments looked at in one sample.
_SAMPLE = 65536


def _host(x: Tensor, device: torch.device) -> Tensor:
    """Host memory that a device can copy to while the host goes on."""
    return x.pin_memory() if device.type == "cuda" else x


def _local(x: Tensor) -> Tensor:
    """This rank's part of a distributed tensor; any other tensor as it is."""
    if torch.compiler.is_compiling():
        return x
    distributed = sys.modules.get("torch.distributed.tensor")
    return x.to_local() if distributed is not None and isinstance(x, distributed.DTensor) else x


def _is_fake(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is not None and isinstance(x, fakes.FakeTensor)


class _FixedAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        value: Tensor, held: Tensor, increment: Tensor, fixed: Fixed, monitor: RangeMonitor | None, step: int
    ) -> tuple[Tensor, Tensor]:
        new_held, new_value = fixed.add(held, increment, value.dtype, monitor, step)
        return new_value, new_held

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.increment_dtype = inputs[2].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return grad, None, None if grad is None else grad.to(ctx.increment_dtype), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        batched = (_batch_first(x, dim, info.batch_size) for x, dim in zip(args[:3], in_dims[:3], strict=True))
        return _FixedAdd.apply(*batched, *args[3:]), (0, 0)


class _FixedAddNow(torch.autograd.Function):
    """The same without transforms: `setup_context` binds the arguments by inspection, in each call."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        held: Tensor,
        increment: Tensor,
        fixed: Fixed,
        monitor: RangeMonitor | None,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        output = _FixedAdd.forward(value, held, increment, fixed, monitor, step)
        _FixedAdd.setup_context(ctx, (value, held, increment), output)
        return output

    backward = _FixedAdd.backward


class _FixedEncode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, fixed: Fixed, monitor: RangeMonitor | None, step: int) -> tuple[Tensor, Tensor]:
        held, value = fixed._encode(x, x.dtype, monitor, step)
        return value, held

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return grads[0], None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _FixedEncode.apply(_batch_first(args[0], in_dims[0], info.batch_size), *args[1:]), (0, 0)


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def fixed_add(
    value: Tensor, held: Tensor, increment: Tensor, fixed: Fixed, monitor: RangeMonitor | None = None, step: int = 0
) -> tuple[Tensor, Tensor]:
    """Return `(new value, new held)` of `fixed.add`, differentiable: the gradient passes straight through.

    The gradient of the new value goes unchanged to `value` and, in increment's dtype, to `increment`; nothing is saved.

    Args:
        value: what the stream's branch reads, floating point.
        held: the same stream as integers, of value's shape.
        increment: floating point, of held's shape or broadcast to it.
        fixed: the format of held.
        monitor: see `Fixed.add`.
        step: see `Fixed.add`.
    """
    if increment.shape != held.shape:
        increment = increment.expand(held.shape)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    add = _FixedAdd if transformed else _FixedAddNow
    new_value, new_held = add.apply(value, held, increment, fixed, monitor, step)
    return new_value, new_held


def fixed_encode(x: Tensor, fixed: Fixed, monitor: RangeMonitor | None = None, step: int = -1) -> tuple[Tensor, Tensor]:
    """Return `(value, held)` of x, where value is held read in x's dtype, differentiable straight through."""
    value, held = _FixedEncode.apply(x, fixed, monitor, step)
    return value, held


# The multipliers of SplitMix64 (Steele et al. 2014), and its increment as the step from one index to the next.
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_INDEX = -0x61C8864680B583EB
_PIECE_OF_CHECKSUM = 1 << 22


def checksum(x: Tensor) -> Tensor:
    """Return a 64-bit checksum of the bits and places of x's elements, int64 of no dimension, on x's device.

    Each element's bits are mixed with its index by a bijection of 64 bits and the results are added: one changed
    element always changes the sum, any other change with probability 1 - 2^-64. Independent of strides, and equal on
    every device.

    Args:
        x: integers or floating point, any shape.
    """
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().reshape(-1).view(width)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), _PIECE_OF_CHECKSUM):
        piece = bits[start : start + _PIECE_OF_CHECKSUM].to(torch.int64)
        mixed = torch.arange(start + 1, start + 1 + piece.numel(), device=x.device) * _INDEX + piece
        for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
            mixed = (mixed ^ _shifted(mixed, shift)) * multiplier
        total += (mixed ^ _shifted(mixed, 31)).sum()
    return total


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros: with copies of the sign, mixing would not be a bijection."""
    return x.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
