"""The steps that one step consists of: its tiles, or the branches of a sum."""

from __future__ import annotations

from collections.abc import Sequence

from .._couplings import Additive, Leapfrog, Midpoint
from .._source import branch_of
from .._step import BoundStep
from .._streams import tiled
from .._streams.arithmetic import Stream
from .._sum import Sum
from .._tile import Cut, keywords_of_tiles, sizes_of
from .gates import Gates

_ADDITIVE = (Additive, Leapfrog, Midpoint)


def parts_of(step: BoundStep, streams: Sequence[Stream]) -> list[BoundStep]:
    """Return the steps that a step consists of, in the order in which they run.

    Args:
        step: the step.
        streams: those before it.

    Raises:
        ReversibleError: its streams or keywords cannot be cut into tiles.
    """
    if step.tile is not None:
        return _tiles(step, streams)
    if not isinstance(step.fn, Sum) or not _divides(step, step.fn):
        return [step]
    count = len(step.fn)
    return [
        step._replace(
            name=f"{step.name}, part {number} of {count}", fn=branch, part=number, whole=step.name
        )
        for number, branch in enumerate(step.fn)
    ]


def _tiles(step: BoundStep, streams: Sequence[Stream]) -> list[BoundStep]:
    assert step.tile is not None
    tile, name = step.tile, step.name
    shapes = [
        tiled.shape_of(streams[i][0], f"{name}: stream {i}") for i in (step.target, *step.source)
    ]
    sizes = sizes_of(tile, shapes, name)
    if len(sizes) == 1:
        return [step]
    keywords = keywords_of_tiles(tile, sizes, shapes[0], step.kwargs, name)
    return [
        step._replace(
            name=f"{name}, tile {number} of {len(sizes)}",
            kwargs=given,
            cut=Cut(number, tile.dim, sizes),
            whole=name,
        )
        for number, given in enumerate(keywords)
    ]


def gates_of(step: BoundStep, streams: Sequence[Stream]) -> Gates:
    """Return the gates that the tiles of a step share."""
    return Gates(branch_of(step.fn), tiled.device_of(streams[step.target]), step.name)


def _divides(step: BoundStep, branch: Sum) -> bool:
    """Check whether the branches of a sum can be steps of their own."""
    additive = type(step.coupling.state_owner) in _ADDITIVE
    return additive and step.target not in step.source and branch.divides
