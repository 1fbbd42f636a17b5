"""What sequences of blocks share, and the ordinary residual network: blocks on one stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from ._block import (
    ReversibleBlock,
    take_keys,
    unwrap_deterministic,
)
from ._compiled.function import active
from ._distributed import shared_generator
from ._errors import ReversibleError
from ._execution import EXECUTIONS
from ._program import (
    BoundSteps,
    Execution,
    Program,
    check_stream,
    output_and_aux,
)
from ._routing import Routes, check_names, check_routes, keywords_of, sliced
from ._schemes import (
    residual_steps,
    step_name,
)
from ._slices import P, part_of
from ._step import BoundStep, check_tiled
from ._taps import positions_of
from ._tile import Tile, tile_of
from ._torch import is_capturing

Split = Callable[[Any], tuple[Any, Any]]
Merge = Callable[[Any, Any], Any]
TileOption = Mapping[str, int | Tile | None]


class BlockSequence(Program):
    """What sequences of blocks share: routes and stochastic depth."""

    _name = "block"
    # Which stream each branch of a block updates.
    _updates = (0, 1)

    # How many steps a block is.
    _per_block = 2

    def __init__(self, args_route: Routes, layer_dropout: float, depth: int, *options: Any) -> None:
        if depth == 0:
            raise ValueError("blocks is empty: give at least one (f, g) pair")
        check_names(args_route)
        check_routes(args_route, depth)
        if not 0.0 <= layer_dropout < 1.0:
            raise ValueError(f"layer_dropout is {layer_dropout}, but a probability is in [0, 1)")
        super().__init__(self._per_block * depth, *options)
        self.args_route: Any = args_route if isinstance(args_route, str) else dict(args_route)
        self.layer_dropout = layer_dropout
        self._depth = depth

    if TYPE_CHECKING:

        @overload
        def __call__(self, x: Tensor, *, taps: None = None, **kwargs: Any) -> Tensor: ...
        @overload
        def __call__(
            self, x: Tensor, *, taps: Sequence[int], **kwargs: Any
        ) -> tuple[Tensor, list[Tensor]]: ...
        @overload
        def __call__(
            self, x: dict[Any, Any] | list[Any] | tuple[Any, ...], **kwargs: Any
        ) -> Any: ...
        def __call__(self, x: Any, **kwargs: Any) -> Any: ...

    def with_aux(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Call the module; return its output, and the extra outputs, which may be none.

        The result has one form, and one type, whether branches return extra outputs or not.

        Args:
            x, **kwargs: as in `forward`, without `taps`.

        Returns:
            The output, and a dict from branch to extra output.
        """
        return output_and_aux(self, x, kwargs)

    @property
    def _branches(self) -> Sequence[Iterable[nn.Module]]:
        """The branches of each block."""
        raise NotImplementedError

    @property
    def _own_branches(self) -> Iterable[nn.Module]:
        return [branch for branches in self._branches for branch in branches]

    def _parts(
        self,
        streams: Sequence[Any],
        kwargs: Mapping[str, Any],
        dropped: Collection[int] | None = None,
    ) -> BoundSteps:
        blocks, settings = self._branches, self._settings
        functions = [f for branches in blocks for f in branches]
        # Whether nothing but the branches decides the steps.
        plain = not (kwargs or self.args_route or dropped or self._random_depth or active())
        plain = plain and settings.coupling is None and not settings.tiles
        if plain and (known := self._memory.steps(functions)) is not None:
            return known
        flat = keywords_of(self.args_route, kwargs, functions)
        if dropped is None:
            dropped = self._dropped()
        parts: list[tuple[int, BoundStep]] = []
        for i, branches in enumerate(blocks):
            if i not in dropped:
                keywords = flat[2 * i : 2 * i + 2]
                parts += residual_steps(
                    branches,
                    keywords,
                    self._per_block * i,
                    f"{self._name} {i}, ",
                    self._updates,
                    settings.coupling,
                    settings.begins and i == 0,
                    settings.tiles,
                )
        if plain:
            self._memory.keep_steps(functions, parts)
        return parts

    @property
    def _blocks(self) -> nn.ModuleList:
        """The modules that hold the branches of each block."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._depth

    def __iter__(self) -> Iterator[Any]:
        return iter(self._blocks)

    def _part(self, kind: type[P], blocks: Sequence[int]) -> P:
        """Return a sequence of some of the blocks, still without its modules."""
        count = self._per_block
        steps = [step for i in blocks for step in range(count * i, count * (i + 1))]
        part: Any = part_of(self, kind, steps)
        # Only the first block of all begins at rest.
        part._settings.begins = part._settings.begins and blocks[0] == 0
        part._depth = len(blocks)
        part.args_route = sliced(self.args_route, blocks)
        return cast(P, part)

    @property
    def _random_depth(self) -> bool:
        return self.training and self.layer_dropout > 0.0

    def _dropped(self) -> Collection[int]:
        if not self._random_depth:
            return ()
        if is_capturing():
            raise ReversibleError(
                f"layer_dropout={self.layer_dropout} in a CUDA graph: blocks are drawn on the "
                f"host, so that every replay would leave out the same. Set net.layer_dropout = 0, "
                f"or capture parts of the sequence."
            )
        draws = torch.rand(self._depth, generator=shared_generator(), device="cpu").tolist()
        return {i for i, draw in enumerate(draws) if draw < self.layer_dropout}

    @property
    def tile(self) -> Mapping[str, Tile]:
        """How many tokens each branch of a block reads at a time. Switches at any time."""
        return self._settings.tiles

    @tile.setter
    def tile(self, tile: TileOption) -> None:
        for letter, given in tile.items():
            if letter not in ("f", "g"):
                raise ValueError(
                    f"tile names {letter!r}, but the branches of a {self._name} are f and g: "
                    f"tile={{'g': 4096}}"
                )
            if tile_of(given) is not None and self._settings.coupling is not None:
                check_tiled(self._settings.coupling, type(self).__name__)
        found = {letter: tile_of(given) for letter, given in tile.items()}
        self._settings.tiles = {letter: each for letter, each in found.items() if each is not None}

    @property
    def _tiling(self) -> Mapping[Any, Tile]:
        return self._settings.tiles

    @_tiling.setter
    def _tiling(self, tiles: Mapping[Any, Tile]) -> None:
        self._settings.tiles = tiles

    def _step_name(self, step: int) -> str:
        return "the input" if step < 0 else step_name(step, self._per_block, self._name)

    def extra_repr(self) -> str:
        dropout = f", layer_dropout={self.layer_dropout}" if self.layer_dropout else ""
        tile = f", tile={dict(self.tile)}" if self.tile else ""
        return f"depth={self._depth}, {super().extra_repr()}{dropout}{tile}"


class SequentialSequence(BlockSequence):
    """The non-reversible twin: each layer maps `x` to `x + f(x)`, then to `x + g(x)`.

    Args:
        layers: `(f, g)` pairs of modules that map `x` to a tensor of its shape.
        args_route, layer_dropout, tile: as in `ReversibleSequence`.
        execution: `"store"` keeps activations; `"checkpoint"` keeps one stream per step;
            `"offload"` keeps it in host memory; `"select"` keeps results of matrix products and
            attention. One of them for all steps, one per step, or a `revnet.Plan`.
    """

    _allowed = tuple(name for name in EXECUTIONS if name != "invert")
    _name = "layer"
    _updates = (0, 0)

    def __init__(
        self,
        layers: Iterable[Iterable[nn.Module]],
        args_route: Routes = {},
        layer_dropout: float = 0.0,
        execution: Execution = "store",
        tile: TileOption = {},
    ) -> None:
        pairs = pairs_of(layers)
        super().__init__(args_route, layer_dropout, len(pairs), "float", execution)
        self.tile = tile
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor, *, taps: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """Return `x` after the last layer, or `(x, aux)` if branches returned extra outputs.

        With `taps` the list of `x` after these layers comes second, as in `ReversibleSequence`.
        """
        check_stream(x, "x")
        positions = None if taps is None else positions_of(taps, len(self), 2, "layer")
        y, *more = self._run((x,), kwargs, positions)
        return (y, *more) if more else y

    def _tapped(self, *streams: Any) -> Any:
        return streams[0]

    @overload
    def __getitem__(self, index: int) -> nn.ModuleList: ...
    @overload
    def __getitem__(self, index: slice) -> SequentialSequence: ...
    def __getitem__(self, index: int | slice) -> nn.ModuleList | SequentialSequence:
        """Return the pair `(f, g)` of a layer, or a sequence of some layers that shares them.

        Slices are those of `ReversibleSequence`.
        """
        if not isinstance(index, slice):
            return cast(nn.ModuleList, self.layers[index])
        chosen = range(len(self))[index]
        part = self._part(SequentialSequence, chosen)
        part.layers = nn.ModuleList(self.layers[i] for i in chosen)
        return part

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # That of a ReversibleSequence is taken, too, whose branches may be wrapped.
        if take_keys(state_dict, prefix, given=("blocks", "fg"), own=("layers", "01")):
            for i, pair in enumerate(self.layers):
                unwrap_deterministic(pair, state_dict, f"{prefix}layers.{i}.", names="01")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def _branches(self) -> Sequence[Iterable[nn.Module]]:
        return list(cast(Iterable[nn.ModuleList], self.layers))


def pairs_of(blocks: Iterable[Iterable[nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    """Return the branches of each block.

    A pair is a tuple, a list or an `nn.ModuleList`. A module with a forward of its own may stand
    for one branch only: its forward would not run.
    """
    pairs = []
    for i, block in enumerate(blocks):
        module = isinstance(block, nn.Module) and not isinstance(block, ReversibleBlock)
        if module and getattr(type(block), "forward", None) is not nn.Module.forward:
            kind = type(block).__name__
            raise TypeError(
                f"block {i} is a module, {kind}, whose forward would not run: a block is a pair "
                f"(f, g) of modules. Give a tuple, (block[0], block[1]) for the parts of an "
                f"nn.Sequential, or ({kind}(...), g) where the module is one branch."
            )
        pair = (block.f, block.g) if isinstance(block, ReversibleBlock) else block
        branches = tuple(pair) if isinstance(pair, Iterable) else (pair,)
        if len(branches) != 2 or not all(isinstance(branch, nn.Module) for branch in branches):
            raise TypeError(f"block {i} is {block!r}, but a block is a pair (f, g) of modules")
        pairs.append(branches)
    return pairs
