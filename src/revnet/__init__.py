"""Reversible residual networks for PyTorch: activation memory that does not grow with depth."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._block import ReversibleBlock as ReversibleBlock
    from ._conversion.convert import Conversion as Conversion
    from ._conversion.convert import convert as convert
    from ._conversion.convert import unconvert as unconvert
    from ._couplings import Additive as Additive
    from ._couplings import Affine as Affine
    from ._couplings import Bijection as Bijection
    from ._couplings import Coupling as Coupling
    from ._couplings import Leapfrog as Leapfrog
    from ._couplings import Midpoint as Midpoint
    from ._couplings import Momentum as Momentum
    from ._cycle import ReversibleCycle as ReversibleCycle
    from ._errors import ReversibleError as ReversibleError
    from ._integrate import integrate as integrate
    from ._memory import MemoryReport as MemoryReport
    from ._memory import measure_memory as measure_memory
    from ._plan import Plan as Plan
    from ._planning.planner import plan as plan
    from ._reversible import Reversible as Reversible
    from ._routing import route_args as route_args
    from ._sequence import ReversibleSequence as ReversibleSequence
    from ._sequential import SequentialSequence as SequentialSequence
    from ._state.decisions import remember as remember
    from ._state.decisions import replaying as replaying
    from ._state.outputs import remember_outputs as remember_outputs
    from ._state.random import Deterministic as Deterministic
    from ._step import Step as Step
    from ._streams.fixed import Fixed as Fixed
    from ._streams.format import Float as Float
    from ._sum import Sum as Sum
    from ._tile import Tile as Tile
    from ._two_step import TwoStep as TwoStep

# Loaded on first use, so that `revnet --help` does not wait for what it does not need.
_MODULES = {
    "Additive": "_couplings",
    "Affine": "_couplings",
    "Bijection": "_couplings",
    "Conversion": "_conversion.convert",
    "Coupling": "_couplings",
    "Deterministic": "_state.random",
    "Fixed": "_streams.fixed",
    "Float": "_streams.format",
    "Leapfrog": "_couplings",
    "MemoryReport": "_memory",
    "Midpoint": "_couplings",
    "Momentum": "_couplings",
    "Plan": "_plan",
    "Reversible": "_reversible",
    "ReversibleBlock": "_block",
    "ReversibleCycle": "_cycle",
    "ReversibleError": "_errors",
    "ReversibleSequence": "_sequence",
    "SequentialSequence": "_sequential",
    "Step": "_step",
    "Sum": "_sum",
    "Tile": "_tile",
    "TwoStep": "_two_step",
    "convert": "_conversion.convert",
    "integrate": "_integrate",
    "measure_memory": "_memory",
    "plan": "_planning.planner",
    "remember": "_state.decisions",
    "remember_outputs": "_state.outputs",
    "replaying": "_state.decisions",
    "route_args": "_routing",
    "unconvert": "_conversion.convert",
}

__all__ = [*_MODULES]

# The version of the package, which the build reads here.
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
