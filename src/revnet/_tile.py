"""Tiles: a branch that treats tokens independently runs on some of them at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from ._errors import ReversibleError


@dataclasses.dataclass(frozen=True)
class Tile:
    """Run a branch on so many tokens at a time.

    The branch must treat tokens independently, as an MLP, a norm or a mixture of experts does:
    `revnet.testing.check_tiles` compares. Each tile is a step of its own. One tile's activations
    live at a time, in forward and in backward, and each tile is evaluated twice in all.

    Extra outputs of the tiles (`(update, aux)`) are added up, tensors and numbers alike: a branch
    returns sums over tokens there, not means.

    Gradients of parameters in bfloat16 and float16, and of parameters under autocast, are added up
    over the tiles in float32. Each parameter gets one gradient per step.

    Args:
        size: tokens in a tile; the last tile may have fewer.
        dim: dimension of the tokens in the streams that the branch reads and updates. A negative
            one is counted from the end of each.
        keywords: for a keyword of the branch the dimension of its tokens, or None where every tile
            gets all of it. A tensor that is not named here is cut where exactly one of its
            dimensions has as many entries as there are tokens, and goes to every tile where none
            has.

    Raises:
        ValueError: `size` is not positive.
        TypeError: `size` is not an integer.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> net = Reversible([Step(nn.Linear(8, 8)), Step(mlp, 1, 0, tile=Tile(256))])
        >>> [tuple(y.shape) for y in net(*torch.randn(2, 1, 1000, 8))]
        [(1, 1000, 8), (1, 1000, 8)]
    """

    size: int
    dim: int = -2
    keywords: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool):
            raise TypeError(f"Tile(size={self.size!r}): expected a number of tokens, such as 4096")
        if self.size < 1:
            raise ValueError(f"Tile(size={self.size}): expected at least one token")


def tile_of(given: int | Tile | None) -> Tile | None:
    """Return the tile that a number of tokens stands for."""
    return given if given is None or isinstance(given, Tile) else Tile(given)


class Cut(NamedTuple):
    """One tile of a step.

    Attributes:
        number: which one.
        dim: dimension of the tokens.
        sizes: tokens of each tile.
    """

    number: int
    dim: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tiles:
    """A stream, or how it is held, in tiles: a tree, as torch sees it.

    Attributes:
        parts: the tiles.
        dim: dimension of the tokens.
        sizes: tokens of each tile.
    """

    parts: tuple[Any, ...]
    dim: int
    sizes: tuple[int, ...]

    def map(self, fn: Callable[[Any], Any]) -> Tiles:
        """Return `fn` of each tile."""
        return self.like(map(fn, self.parts))

    def like(self, parts: Iterable[Any]) -> Tiles:
        """Return other parts in tiles of these sizes."""
        return Tiles(tuple(parts), self.dim, self.sizes)

    def replaced(self, number: int, part: Any) -> Tiles:
        """Return the same with another part in this place."""
        return self.like((*self.parts[:number], part, *self.parts[number + 1 :]))


pytree.register_pytree_node(
    Tiles,
    lambda tiles: (list(tiles.parts), (tiles.dim, tiles.sizes)),
    lambda parts, cut: Tiles(tuple(parts), *cut),
    serialized_type_name="revnet._tile.Tiles",
)


def sizes_of(tile: Tile, shapes: Sequence[Sequence[int]], name: str) -> tuple[int, ...]:
    """Return the tokens of each tile of a step.

    Args:
        tile: how many tokens at a time.
        shapes: of the streams that the step reads and updates.
        name: of the step, for errors.

    Raises:
        ReversibleError: the streams have another number of tokens each, or no such dimension.
    """
    for shape in shapes:
        if not -len(shape) <= tile.dim < len(shape):
            raise ReversibleError(
                f"{name}: a stream of shape {tuple(shape)} has no dimension {tile.dim} to cut into "
                f"tiles: give the dimension of its tokens, as in revnet.Tile({tile.size}, dim=-1)"
            )
    counts = {shape[tile.dim] for shape in shapes}
    if len(counts) != 1:
        raise ReversibleError(
            f"{name}: its streams, {', '.join(str(tuple(shape)) for shape in shapes)}, differ in "
            f"dimension {tile.dim}, so that they cannot be cut into the same tiles: give the "
            f"dimension of the tokens, or leave out tile="
        )
    (tokens,) = counts
    if tokens <= tile.size:
        return (tokens,)
    whole, rest = divmod(tokens, tile.size)
    return (tile.size,) * whole + ((rest,) if rest else ())


def keywords_of_tiles(
    tile: Tile, sizes: Sequence[int], shape: Sequence[int], kwargs: Mapping[str, Any], name: str
) -> list[dict[str, Any]]:
    """Return the keywords of a branch for each tile.

    Args:
        tile: of the step.
        sizes: tokens of each tile.
        shape: of the stream that the step updates.
        kwargs: the keywords of the whole step.
        name: of the step, for errors.

    Raises:
        ReversibleError: it is not clear whether a tensor has entries for tokens.
    """
    tokens, count = sum(sizes), len(sizes)
    found: list[dict[str, Any]] = [{} for _ in sizes]

    def cut(leaf: Any, key: str) -> Sequence[Any]:
        if key in tile.keywords:
            dim = tile.keywords[key]
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            inside = [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
            if any(_dim_of_tokens(part, tokens, shape, key, name) is not None for part in inside):
                raise _unclear(name, key, f"a {type(leaf).__name__} with a tensor", tokens)
            dim = None
        else:
            dim = _dim_of_tokens(leaf, tokens, shape, key, name)
        if dim is None or not isinstance(leaf, Tensor):
            return [leaf] * count
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != tokens:
            raise ReversibleError(
                f"{name}: keyword {key!r}, of shape {tuple(leaf.shape)}, has not {tokens} tokens "
                f"in dimension {dim}, as revnet.Tile(keywords={{{key!r}: {dim}}}) says"
            )
        parts: Sequence[Any] = leaf.split(list(sizes), dim)
        return parts

    for key, value in kwargs.items():
        leaves, spec = pytree.tree_flatten(value)
        parts = [cut(leaf, key) for leaf in leaves]
        for number, keywords in enumerate(found):
            keywords[key] = pytree.tree_unflatten([part[number] for part in parts], spec)
    return found


def _dim_of_tokens(leaf: Any, tokens: int, shape: Sequence[int], key: str, name: str) -> int | None:
    """Return the dimension in which a keyword has as many entries as there are tokens."""
    if not isinstance(leaf, Tensor):
        return None
    places = [dim for dim, size in enumerate(leaf.shape) if size == tokens]
    if not places:
        return None
    if len(places) > 1 or list(shape).count(tokens) > 1:
        raise _unclear(name, key, f"shape {tuple(leaf.shape)}", tokens)
    return places[0]


def _unclear(name: str, key: str, what: str, tokens: int) -> ReversibleError:
    return ReversibleError(
        f"{name}: keyword {key!r}, {what}, may or may not have entries for the {tokens} tokens of "
        f"the streams: say in which dimension, as in revnet.Tile(..., keywords={{{key!r}: 1}}), or "
        f"{{{key!r}: None}} where every tile gets all of it"
    )


def added(sum_so_far: Any, aux: Any, name: str) -> Any:
    """Return the extra outputs of some tiles and of one more, added up.

    Args:
        sum_so_far: of the tiles before, None for none.
        aux: of the next one.
        name: of that tile, for errors.

    Raises:
        ReversibleError: they cannot be added up.
    """
    if sum_so_far is None:
        return aux
    first, spec = pytree.tree_flatten(sum_so_far)
    second, other = pytree.tree_flatten(aux)
    pairs = list(zip(first, second, strict=False))
    if spec == other and all(map(_add_up, pairs)):
        return pytree.tree_unflatten([None if a is None else a + b for a, b in pairs], spec)
    raise ReversibleError(
        f"{name} returned an extra output that cannot be added to that of the tiles before it: "
        f"return numbers or tensors of the same shape from each tile, such as sums over tokens, or "
        f"leave out tile"
    )


def _add_up(pair: tuple[Any, Any]) -> bool:
    a, b = pair
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape
    if a is None or b is None:
        return a is b
    return isinstance(a, int | float | complex) and isinstance(b, int | float | complex)
