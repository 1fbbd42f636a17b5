"""The primitive: one lifting step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ._couplings import Additive, Coupling


class Step(nn.Module):
    """`streams[target] = coupling.combine(streams[target], fn(*streams[source], **kwargs))`.

    Args:
        fn: the branch: a module (or any callable) that reads the source streams and returns the update of the target,
            or `(update, aux)`. It must not change its inputs in place.
        target: index of the stream that is updated.
        source: index of the stream that `fn` reads, or several, or none. To be inverted, a step does not read its
            target.
        coupling: the rule of the update; `Additive()` by default.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        target: int = 0,
        source: int | Sequence[int] = 1,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.target = target
        self.source = (source,) if isinstance(source, int) else tuple(source)
        self.coupling = Additive() if coupling is None else coupling

    def extra_repr(self) -> str:
        return f"target={self.target}, source={self.source}"
