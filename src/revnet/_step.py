"""The primitive: one lifting step, and what it does to streams as they are held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

from torch import nn

from ._couplings import Additive, Coupling
from ._source import received
from ._tile import Cut, Tile, tile_of
from ._torch import compile_branch
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
        args: keywords of the program's call that `fn` takes by position, behind its sources.
        kwargs: keywords of `fn`, each with that of the program's call which it is given:
            `kwargs={"mask": "msa_mask"}` calls `fn(x, mask=msa_mask)`. One that the call lacks
            is left out.
        constants: keywords of `fn` with their values, the same in every call.
        tile: tokens on which `fn` runs at a time, or a `Tile`; by default it runs on all at once.
            For branches that treat tokens independently, and rules that add to the target.

    Raises:
        ValueError: a negative stream, a keyword of `fn` that is named twice, or a step that cannot
            be cut into tiles.
        TypeError: `fn` is not callable, a stream no integer, or `coupling` no `Coupling`.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        target: int = 0,
        source: int | Sequence[int] | None = None,
        coupling: Coupling | None = None,
        *,
        args: Sequence[str] = (),
        kwargs: Mapping[str, str] = {},
        constants: Mapping[str, Any] = {},
        tile: int | Tile | None = None,
    ) -> None:
        super().__init__()
        if source is None:
            source = () if fn is None else 1
        self.fn = fn
        try:
            # Any kind of integer, and nothing that is only equal to one.
            self.target = index(target)
            sources = source if isinstance(source, Iterable) else (source,)
            self.source = tuple(map(index, sources))
        except TypeError:
            raise TypeError(
                f"Step: target {target!r}, source {source!r}: streams are counted by integers"
            ) from None
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
        if min((self.target, *self.source)) < 0:
            raise ValueError(
                f"Step: target {self.target}, source {self.source}: streams are counted from 0"
            )
        self.tile = tile_of(tile)
        if self.tile is not None:
            if fn is None or not self.source:
                raise ValueError("Step: tile needs a branch that reads a stream")
            check_tiled(self.coupling, "Step")
        self.args = tuple(args)
        self.kwargs = dict(kwargs)
        self.constants = dict(constants)
        names = [*self.args, *self.kwargs, *self.constants]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"Step: {', '.join(map(repr, twice))} is named more than once among args, kwargs "
                f"and constants"
            )

    def forward(self, *sources: Any, **kwargs: Any) -> Any:
        """The output of the branch as the coupling takes it."""
        if self.fn is not None:
            given = [kwargs.pop(name) for name in self.args if name in kwargs]
            return received(self.coupling, self.fn(*sources, *given, **kwargs), sources)
        return sources[0] if sources else None

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the branch; see `Reversible.compile`."""
        if isinstance(self.fn, nn.Module):
            compile_branch(self.fn, *args, **options)
        elif self.fn is not None:
            super().compile(*args, **options)

    @property
    def reads(self) -> int:
        """Return how many streams the branch is given."""
        return len(self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """The keywords of a program's call that this step asks for."""
        return (*self.args, *self.kwargs.values())

    def keywords(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords that this step takes from those of a call, and its constants.

        Raises:
            TypeError: one that is passed by position is there, and one before it is not.
        """
        found = dict(self.constants)
        found |= {own: given[name] for own, name in self.kwargs.items() if name in given}
        absent = [name for name in self.args if name not in given]
        if absent and any(name in given for name in self.args[self.args.index(absent[0]) :]):
            raise TypeError(
                f"the call lacks {absent[0]!r}, which a branch takes by position, before others: "
                f"args={self.args}"
            )
        return found | {name: given[name] for name in self.args if name in given}

    def extra_repr(self) -> str:
        taken = f"target={self.target}, source={self.source}"
        if self.args or self.kwargs:
            taken += f", args={self.args}, kwargs={self.kwargs}"
        if self.tile is not None:
            taken += f", tile={self.tile}"
        return f"{taken}, constants={list(self.constants)}" if self.constants else taken


def check_tiled(coupling: Coupling, where: str) -> None:
    """Raise `ValueError` unless a rule can be applied to one tile at a time."""
    if not coupling.translates:
        raise ValueError(
            f"{where}: tile works with rules that add to the target, such as Additive(), and not "
            f"with {coupling}: leave out tile, or use another coupling"
        )


class HandOn(nn.Module):
    """The branch of the library's own steps that add one stream to another."""

    def forward(self, source: Any) -> Any:
        """Return the source."""
        return source


# One for all steps that add a velocity to the state.
SOURCE = HandOn()


def hands_on(fn: Any) -> bool:
    """Check whether a branch hands on its source, so that evaluating it costs nothing."""
    return type(fn) is HandOn or (isinstance(fn, Step) and fn.fn is None)


class BoundStep(NamedTuple):
    """A step of one call, with its keywords: see `Step`."""

    name: str
    fn: Any
    coupling: Coupling
    target: int
    source: tuple[int, ...]
    kwargs: dict[str, Any]
    # How many tokens the branch reads at a time, None for all; of one of these tiles, which.
    tile: Tile | None = None
    cut: Cut | None = None
    # Of one branch of a sum, which.
    part: int = 0
    # The name of the step of which this is a tile, or a branch of a sum.
    whole: str = ""
