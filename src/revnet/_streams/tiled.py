"""Streams in tiles: tensors of some tokens each, which steps replace one by one.

A stream is a pair of its value and how it is held. It is cut by the first tiled step that reads or
updates it. No tile is written in place: a step puts a new tile where the old one was, which is then
freed. A step that reads a whole stream concatenates the tiles for its call alone; what it adds is
added tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._couplings import ADDITIVE, Coupling, fitting
from .._errors import ReversibleError
from .._step import BoundStep
from .._tile import Cut, Tiles
from .._trees import tree_leaves, tree_map
from .arithmetic import FixedArithmetic, FloatArithmetic, Stream
from .format import Encoded

Arithmetic = FloatArithmetic | FixedArithmetic


def whole(value: Any) -> Any:
    """Return a value in one tensor."""
    return torch.cat(value.parts, value.dim) if isinstance(value, Tiles) else value


def shape_of(value: Any, name: str = "the stream") -> torch.Size:
    """Return the shape of a value, in tiles or not.

    Raises:
        ReversibleError: it is a tree of tensors.
    """
    if isinstance(value, Tensor):
        return value.shape
    if not isinstance(value, Tiles):
        raise ReversibleError(
            f"{name} is a tree of tensors, but tiles are cut from a tensor: leave out tile"
        )
    shape = list(value.parts[0].shape)
    shape[value.dim] = sum(value.sizes)
    return torch.Size(shape)


def device_of(stream: Stream) -> str:
    """Return the type of the device of a stream."""
    value = stream[0].parts[0] if isinstance(stream[0], Tiles) else stream[0]
    return str(value.device.type)


def sources(streams: list[Stream], step: BoundStep) -> list[Any]:
    """Return what the branch of a step reads; a stream that it reads twice is one tensor."""
    if step.cut is not None:
        return [streams[i][0].parts[step.cut.number] for i in step.source]
    values = [streams[i][0] for i in step.source]
    if any(isinstance(value, Tiles) for value in values):
        once = {i: whole(streams[i][0]) for i in step.source}
        values = [once[i] for i in step.source]
    return values


def read(arithmetic: Arithmetic, stream: Stream) -> Any:
    """Return the value of a stream, in tiles where it is held so."""
    value, encoded = stream
    if value is not None:
        return value
    if isinstance(encoded, Tiles):
        return encoded.map(arithmetic.read)
    return arithmetic.read(encoded)


def at(streams: list[Stream], i: int, cut: Cut | None) -> Stream:
    """Return stream i, or that tile of it on which a step works."""
    if cut is None:
        return streams[i]
    value, encoded = streams[i]
    return None if value is None else value.parts[cut.number], encoded.parts[cut.number]


def put(streams: list[Stream], i: int, cut: Cut | None, stream: Stream) -> None:
    """Put a stream, or a tile of it, in the place of the one before."""
    if cut is not None:
        stream = _with_part(streams[i], cut.number, stream)
    streams[i] = stream


def _with_part(stream: Stream, number: int, part: Stream) -> Stream:
    value, encoded = stream
    if part[0] is None:
        value = None
    elif value is not None:
        value = value.replaced(number, part[0])
    return value, encoded.replaced(number, part[1])


def arrange(arithmetic: Arithmetic, streams: list[Stream], step: BoundStep) -> None:
    """Hold the streams of a step as it works on them: in its tiles, or as they are.

    Raises:
        ReversibleError: a stream remembers how it was scaled.
    """
    if step.cut is not None:
        for i in {step.target, *step.source}:
            streams[i] = _split(arithmetic, streams[i], step.cut, step.whole)
        return
    value, encoded = streams[step.target]
    if not isinstance(encoded, Tiles):
        return
    if not step.coupling.translates:
        streams[step.target] = _joined(arithmetic, value, encoded)
    elif isinstance(value, Tensor):
        streams[step.target] = _as_encoded(arithmetic, value, encoded)


def _split(arithmetic: Arithmetic, stream: Stream, cut: Cut, name: str) -> Stream:
    value, encoded = stream
    if isinstance(encoded, Tiles):
        if encoded.dim == cut.dim and encoded.sizes == cut.sizes:
            return _as_encoded(arithmetic, value, encoded) if isinstance(value, Tensor) else stream
        value, encoded = _joined(arithmetic, value, encoded)
    values = _cut(arithmetic.read(encoded) if value is None else value, cut)
    if isinstance(encoded, Tensor):
        return values, values
    if not isinstance(encoded, Encoded):
        raise ReversibleError(
            f"{name}: a stream that another step multiplies cannot be cut into tiles, as fixed "
            f"streams remember what the product left over: leave out tile, or use "
            f"streams='float'"
        )
    return values, values.like(map(Encoded, values.parts, _cut(encoded.residual, cut).parts))


def _as_encoded(arithmetic: Arithmetic, value: Tensor, encoded: Tiles) -> Stream:
    """Return a stream whose value is one tensor, in the tiles in which the rest of it is held."""
    found = with_value(arithmetic, rest(arithmetic, encoded), value)
    return found.map(arithmetic.read), found


def _cut(tensor: Tensor, tiles: Cut | Tiles) -> Tiles:
    # Views would keep the whole tensor until the last of them is replaced, and with several samples
    # they have gaps, which branches would not read otherwise.
    parts = tensor.split(list(tiles.sizes), tiles.dim)
    copies = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return Tiles(tuple(copies), tiles.dim, tiles.sizes)


def _joined(arithmetic: Arithmetic, value: Any, encoded: Tiles) -> Stream:
    """Return a stream that is held in one piece."""
    value = whole(read(arithmetic, (value, encoded)))
    if not isinstance(encoded.parts[0], Encoded):
        return value, value
    return value, Encoded(value, torch.cat([part.residual for part in encoded.parts], encoded.dim))


def joined(arithmetic: Arithmetic, encoded: Any) -> Any:
    """Return how a stream is held, in one piece."""
    return _joined(arithmetic, None, encoded)[1] if isinstance(encoded, Tiles) else encoded


def surfaced(stream: Stream) -> Stream:
    """Return a stream whose value is one tensor, as others see it.

    Its tiles stay what they are: views of that tensor would keep all of it until the last of them
    is replaced.
    """
    return whole(stream[0]), stream[1]


def rest(arithmetic: Arithmetic, encoded: Any) -> Any:
    """Return how a stream is held, without its value."""
    return encoded.map(arithmetic.rest) if isinstance(encoded, Tiles) else arithmetic.rest(encoded)


def with_value(arithmetic: Arithmetic, found: Any, value: Any) -> Any:
    """Return the stream of which `rest` was returned, with this value."""
    if not isinstance(found, Tiles):
        return arithmetic.with_value(found, value)
    return found.like(map(arithmetic.with_value, found.parts, _cut(value, found).parts))


def detached(arithmetic: Arithmetic, encoded: Any, values: list[Tensor]) -> Any:
    """Return a held stream without its graph, and append the tensors of its value to `values`."""
    if isinstance(encoded, Tiles):
        return encoded.map(lambda part: detached(arithmetic, part, values))
    value = tree_map(Tensor.detach, arithmetic.read(encoded))
    values += tree_leaves(value)
    return arithmetic.with_value(encoded, value)


def combine(
    arithmetic: Arithmetic, step: BoundStep, streams: list[Stream], out: Any, index: int
) -> None:
    """Update the target of a step by the output of its branch; differentiable.

    Args:
        arithmetic: how streams are held.
        step: the step.
        streams: the streams before it, which become those after it.
        out: the output of the branch.
        index: of the step in the program.
    """
    target = at(streams, step.target, step.cut)
    if not isinstance(target[1], Tiles):
        put(streams, step.target, step.cut, arithmetic.combine(step.coupling, target, out, index))
        return
    increments = _increments(target[1], step.coupling, out)
    del target
    for number, increment in enumerate(increments):
        value, encoded = streams[step.target]
        part = value.parts[number], encoded.parts[number]
        part = arithmetic.combine(ADDITIVE, part, increment, index)
        # The old tile is freed here.
        streams[step.target] = _with_part((value, encoded), number, part)
        del value, encoded, part


def invert(arithmetic: Arithmetic, step: BoundStep, streams: list[Stream], out: Any) -> None:
    """Undo the update of a step; see `combine`."""
    encoded = at(streams, step.target, step.cut)[1]
    if not isinstance(encoded, Tiles):
        put(streams, step.target, step.cut, arithmetic.invert(step.coupling, encoded, out))
        return
    increments = _increments(encoded, step.coupling, out)
    del encoded
    streams[step.target] = None, streams[step.target][1]
    for number, increment in enumerate(increments):
        encoded = streams[step.target][1]
        part = arithmetic.invert(ADDITIVE, encoded.parts[number], increment)
        streams[step.target] = _with_part((None, encoded), number, part)
        del encoded, part


def _increments(encoded: Tiles, coupling: Coupling, out: Any) -> tuple[Tensor, ...]:
    """Return what a rule adds to each tile."""
    values = encoded.map(lambda part: part.value if isinstance(part, Encoded) else part)
    like = values.parts[0].detach().new_empty(()).expand(shape_of(values))
    increment: Tensor = fitting(like, coupling.increment(out))
    parts: tuple[Tensor, ...] = increment.split(list(encoded.sizes), encoded.dim)
    return parts
