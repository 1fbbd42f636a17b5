"""The generators of the CPU and of accelerators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from ctypes import string_at
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ReversibleError
from .undo import Undo


class RandomState:
    """State of the CPU generator and of the generators of `devices`, at one moment."""

    __slots__ = ("cpu", "devices", "_contents")

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.cpu = torch.default_generator.get_state()
        self.devices = _read_generators(devices) if devices else []
        # What `_contents` returns, without a call; most states are compared with two others.
        self._contents: bytes | None = string_at(self.cpu.data_ptr(), self.cpu.nbytes)

    def same(self, before: RandomState) -> bool:
        """Check that no generator was drawn from since an earlier moment."""
        theirs = before._contents
        # That one may stay until backward, for which its tensor is enough.
        before._contents = None
        ours, theirs = self._contents or _contents(self.cpu), theirs or _contents(before.cpu)
        return ours == theirs and self.devices == before.devices

    def fingerprint(self) -> tuple[Any, ...]:
        """Return what tells this state from others, in a few bytes."""
        return hash(self._contents or _contents(self.cpu)), self.devices

    def now(self) -> RandomState:
        """Return the present state of the same generators."""
        return RandomState([device for device, _ in self.devices])

    def set(self) -> None:
        """Set the generators to this state."""
        torch.default_generator.set_state(self.cpu)
        for device, state in self.devices:
            _write_generator(device, state)

    def restore(self, undo: Undo) -> None:
        """Set the generators to this state until `undo` runs."""
        undo.add(self.now().set)
        self.set()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Draw from this state inside; leave the generators as they were before."""
        undo = Undo()
        try:
            self.restore(undo)
            yield
        finally:
            undo.run()


def _contents(state: Tensor) -> bytes:
    """Return what a state holds, without operators, each of which costs as much as a launch."""
    return string_at(state.data_ptr(), state.nbytes)


def _read_generators(devices: Sequence[torch.device]) -> list[tuple[torch.device, Any]]:
    return [(device, _read_generator(device)) for device in devices]


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


def devices_of(tensors: Sequence[Any]) -> list[torch.device]:
    """Return the accelerator devices among `tensors`, each once."""
    # Asking a device for its type takes longer than these attributes.
    found = {t.device for t in tensors if isinstance(t, Tensor) and not (t.is_cpu or t.is_meta)}
    return list(found)


class Deterministic(nn.Module):
    """Calls `net`, and can repeat a call with the same randomness.

    Args:
        net: any module.

    `forward(*args, record_rng=False, set_rng=False, **kwargs)`: with `record_rng`, the state of the
    CPU generator and of the generators of the devices of the tensors in `args` is kept; with
    `set_rng`, the call draws from the kept state and leaves the generators as they were.

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
