"""The primitive: one lifting step, and what it does to streams as they are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ._couplings import Additive, Coupling
from ._source import received
from ._trees import branch_output as branch_output


class Step(nn.Module):
    """`streams[target] = coupling.combine(streams[target], fn(*streams[source], **kwargs))`.

    Args:
        fn: the branch: a module (or any callable) that reads the source streams and returns the
            update of the target, or `(update, aux)`. It must not change its inputs in place. None
            hands on the source itself (nothing, where there is none).
        target: index of the stream that is updated.
        source: index of the stream that `fn` reads, or several; by default stream 1, and none where
            `fn` is None. A step that reads its target cannot be undone, and keeps it.
        coupling: the rule of the update; `Additive()` by default.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        target: int = 0,
        source: int | Sequence[int] | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__()
        if source is None:
            source = () if fn is None else 1
        self.fn = fn
        self.target = target
        self.source = (source,) if isinstance(source, int) else tuple(source)
        self.coupling = Additive() if coupling is None else coupling
        if fn is not None and not callable(fn):
            raise TypeError(
                f"Step: fn is {type(fn).__name__}, but a branch is a module or another callable"
            )
        if not isinstance(self.coupling, Coupling):
            raise TypeError(
                f"Step: coupling is {self.coupling!r}, which is not a Coupling: did you leave out "
                f"the ()?"
            )
        if min((target, *self.source)) < 0:
            raise ValueError(
                f"Step: target {target}, source {self.source}: streams are counted from 0"
            )

    def forward(self, *sources: Any, **kwargs: Any) -> Any:
        """The output of the branch as the coupling takes it."""
        if self.fn is not None:
            return received(self.coupling, self.fn(*sources, **kwargs), sources)
        return sources[0] if sources else None

    def extra_repr(self) -> str:
        return f"target={self.target}, source={self.source}"


class BoundStep(NamedTuple):
    """A step of one call, with its keywords: see `Step`."""

    name: str
    fn: Any
    coupling: Coupling
    target: int
    source: tuple[int, ...]
    kwargs: dict[str, Any]
