"""What the layers of one converted stack share: settings, the range of their streams, errors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .._engine import Options
from .._errors import ReversibleError
from .._execution import Execution, resolve
from .._program import callers_level
from .._state.structure import Memory
from .._streams.arithmetic import FixedArithmetic, FloatArithmetic
from .._streams.fixed import Fixed, fitting_fraction_bits
from .._streams.format import DEFAULT_FRACTION_BITS, Float
from .._streams.monitor import OutOfRange, RangeMonitor
from .._torch import is_exporting
from .rules import RULES, Momentum, TwoStreams

# How far the range reaches above the largest value of the first batch.
HEADROOM = 16
# Updates whose mean is below this many units of the default format take a finer one.
DIGITS = 64


class Stack:
    """One stack of converted layers.

    Args:
        name: of the container in the model.
        layers: the names of the layers in the model.
        kind: the name of their class.
        chosen: whether the user named the stack, so that a layer that does not fit is an error.
        rule: of `RULES`.
        bits: per layer.
        streams: `Fixed`, `Float`, or None to choose fraction bits from what the first batch shows.
        execution: per layer.
        options: of the calls.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str],
        kind: str,
        chosen: bool,
        rule: str,
        bits: Sequence[int],
        streams: Fixed | Float | None,
        execution: Sequence[str],
        options: Options,
    ) -> None:
        self.name = name
        self.layers = list(layers)
        self.kind = kind
        self.chosen = chosen
        self.rule_name = rule
        self.bits = list(bits)
        self.streams: Fixed | Float = Fixed() if streams is None else streams
        # Layers whose range is still to be seen.
        self.unseen = set(range(len(layers))) if streams is None else set()
        # Layers that nobody has called yet, of which one may turn out to be none.
        self.untried = set(range(len(layers)))
        self.largest = 0.0
        # Whether updates are so small that the default format would round most of them away.
        self.fine = False
        # Layers that run as they are, and why.
        self.outside: dict[int, str] = {}
        # Layers that began a call since one last continued the call of another.
        self.began: set[int] = set()
        self.options = options
        self.monitor = RangeMonitor()
        self.memory = Memory()
        self.warned: set[str] = set()
        self.execution = list(execution)

    @property
    def rule(self) -> Momentum | TwoStreams:
        """The rule of the steps."""
        return RULES[self.rule_name]

    @property
    def execution(self) -> list[str]:
        """The name of the execution of each layer."""
        return self._execution

    @execution.setter
    def execution(self, names: list[str]) -> None:
        resolve(names, len(self.layers))
        self._execution = names
        self._executions: list[Execution] | None = None

    def set_execution(self, place: int, name: str) -> None:
        """Set the execution of one layer."""
        self.execution = [*self.execution[:place], name, *self.execution[place + 1 :]]

    @property
    def executions(self) -> list[Execution]:
        """The execution of each step."""
        if self._executions is None:
            count = self.rule.steps_per_layer
            names = [name for name in self.execution for _ in range(count)]
            self._executions = resolve(names, len(names))
        return self._executions

    def arithmetic(self) -> FixedArithmetic | FloatArithmetic:
        """Return the arithmetic of a new call, after a look at what earlier calls found."""
        if isinstance(self.streams, Float):
            return FloatArithmetic()
        self.monitor.flush()
        self._raise(self.monitor.poll(), self.streams)
        # An exported program has no monitor to tell.
        return FixedArithmetic(self.streams, None if is_exporting() else self.monitor)

    def check(self) -> None:
        """Wait for the device and raise if a stream left its range."""
        if isinstance(self.streams, Fixed):
            self._raise(self.monitor.check(), self.streams)

    def tried(self, place: int) -> None:
        """Note that a layer has been called, and need be watched no more."""
        self.untried.discard(place)
        self.unseen.discard(place)

    def fits(self, largest: float, update: float) -> bool:
        """Note magnitudes around a layer; return whether the format fits them.

        Args:
            largest: of what it reads and returns.
            update: the mean magnitude of what it adds.
        """
        if not isinstance(self.streams, Fixed) or not largest < float("inf"):
            return True
        self.largest = max(self.largest, largest)
        self.fine = self.fine or 0 < update < DIGITS * Fixed().unit
        return bool(self.streams == self._fitting())

    def fit(self) -> None:
        """Choose fraction bits for the magnitudes seen."""
        self.streams = self._fitting()

    def _fitting(self) -> Fixed:
        bits = fitting_fraction_bits(HEADROOM * self.largest)
        if bits is None:
            raise ReversibleError(
                f"{self.name}: activations reach {self.largest:.3g}, and no format of fixed "
                f"streams holds {HEADROOM} times that. Use streams='float'."
            )
        # Finer formats than the default leave twice the bits over.
        return Fixed(bits if self.fine else min(bits, DEFAULT_FRACTION_BITS))

    def _raise(self, found: OutOfRange | None, fixed: Fixed) -> None:
        for step, share in self.monitor.vanishing().items():
            warnings.warn(
                f"{self.step_name(step)}: {share:.0%} of its nonzero updates are smaller than half "
                f"of 2^-{fixed.fraction_bits}, the resolution of the streams, and change nothing. "
                f"Use more fraction bits, as in streams=revnet.Fixed(fraction_bits=37).",
                stacklevel=callers_level(),
            )
        if found is None:
            return
        self.monitor.reset()
        bits = fitting_fraction_bits(found.magnitude)
        remedy = "Look for the cause in this layer."
        if bits is not None:
            bits = fitting_fraction_bits(HEADROOM * found.magnitude) or bits
            remedy = f"Set streams=revnet.Fixed(fraction_bits={bits})."
        raise ReversibleError(
            f"{self.step_name(found.step)}: a stream left the range of {fixed}, "
            f"±{fixed.limit:.6g}: the largest value was {found.magnitude:.6g}. The output of that "
            f"forward pass is NaN there. {remedy}"
        )

    def step_name(self, step: int) -> str:
        """Return the name of the layer that a step belongs to."""
        if step < 0:
            return f"the input of {self.name}"
        return self.layers[step // self.rule.steps_per_layer]

    def warn_once(self, key: str, message: str) -> None:
        """Warn, at the first time of this key."""
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, stacklevel=callers_level())

    def note(self, place: int, continued: bool) -> None:
        """Note whether a layer continued the call of another; warn if no layer does."""
        if continued:
            self.began.clear()
            return
        self.began.add(place)
        inside = set(range(len(self.layers))) - self.outside.keys()
        # The first batch may begin anew because it chooses the range.
        if len(inside) > 1 and self.began >= inside and not self.unseen:
            self.began.clear()
            self.warn_once("alone", f"{self.name}: {_ALONE}")

    def numbers(self) -> dict[str, Any]:
        """Return what resuming needs, as numbers and names."""
        fixed = self.streams.fraction_bits if isinstance(self.streams, Fixed) else None
        return {
            "rule": self.rule_name,
            "bits": list(self.bits),
            "execution": list(self.execution),
            "fraction_bits": fixed,
            "largest": self.largest,
            "fine": self.fine,
            "unseen": sorted(self.unseen),
            "outside": {str(place): reason for place, reason in self.outside.items()},
        }

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        """Take up what `numbers` returned."""
        self.rule_name, self.bits = numbers["rule"], list(numbers["bits"])
        self.execution = list(numbers["execution"])
        fixed = numbers["fraction_bits"]
        self.streams = Float() if fixed is None else Fixed(fixed)
        self.largest, self.fine = numbers["largest"], numbers["fine"]
        self.unseen = set(numbers["unseen"])
        self.outside = {int(place): reason for place, reason in numbers["outside"].items()}


_ALONE = (
    "no layer was given the very tensor that another layer of the stack had returned, so each "
    "began anew: gradients are right, but no memory is saved. Layers that hand on two streams, "
    "that something between them changes, or that have a checkpoint of their own, gain nothing "
    "from a conversion: unconvert them, or name other stacks in `layers`."
)


def low_precision(dtype: torch.dtype) -> bool:
    """Check whether a tensor of this dtype has fewer digits than float32."""
    return dtype in (torch.bfloat16, torch.float16)
