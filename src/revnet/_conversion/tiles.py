"""Parts of converted layers, such as MLPs, that run on some thousand tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._engine.gates import Gates
from .._errors import ReversibleError
from .find import Found
from .layer import derived_class

# How many tokens a part runs on at a time.
TILE = "_revnet_tile"


def parts_of(found: Sequence[Found], tile: Mapping[str, int]) -> list[tuple[nn.Module, int]]:
    """Return the parts of all layers that run in tiles, each with its number of tokens.

    Args:
        found: the stacks of layers.
        tile: the number of tokens by the name of the part within each layer.

    Raises:
        ReversibleError: no layer has a part of this name, or it has a forward of its own.
        ValueError: not a positive number of tokens.
    """
    parts = []
    for name, tokens in tile.items():
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError(f"tile {tokens!r} of {name!r}: expected a positive number of tokens")
        named = [
            (key, dict(layer.named_modules(remove_duplicate=False)).get(name))
            for each in found
            for key, layer in each.layers.items()
        ]
        chosen = [(key, part) for key, part in named if part is not None]
        if not chosen or not name:
            raise ReversibleError(
                f"no layer has a part {name!r}, which tile names: name a module within each layer, "
                f"as in tile={{'mlp': 4096}}"
            )
        for key, part in chosen:
            if "forward" in vars(part):
                raise ReversibleError(
                    f"{key}.{name} has a forward of its own on the instance, which tile would "
                    f"replace: call revnet.convert before what set it"
                )
            parts.append((part, tokens))
    return parts


def cut_into_tiles(parts: Sequence[tuple[nn.Module, int]]) -> None:
    """Let each part run on that many tokens at a time."""
    for part, tokens in dict(parts).items():
        # Layers may share a part.
        vars(part)[TILE] = tokens
        own: Any = type(part)
        part.__class__ = tiled_class(own)


@cache
def tiled_class(own: Any) -> Any:
    """Return the class of parts of this class that run in tiles: equal but for `forward`."""

    @wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, own, args, kwargs)

    made = derived_class(own, tiled_class, {})
    made.forward = forward
    return made


def _run(part: nn.Module, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a part tile by tile, where it is given more than one."""
    tokens: int = vars(part)[TILE]
    x = args[0] if args else None
    if (
        not isinstance(x, Tensor)
        or x.dim() < 2
        or x.shape[-2] <= tokens
        # A compiler plans the memory of its graph itself.
        or torch.compiler.is_compiling()
    ):
        return own.forward(part, *args, **kwargs)
    name = f"{own.__name__} in tiles"
    others = [*args[1:], *kwargs.values()]
    if any(isinstance(other, Tensor) for other in others):
        raise ReversibleError(
            f"{name} is given a second tensor, of which nobody says whether it is one per token: "
            f"leave it out of tile"
        )
    gates = Gates(part, x.device.type, name)
    call = partial(_call, part, own, gates, args[1:], kwargs)
    if torch.is_grad_enabled():
        # Backward evaluates one tile at a time, within the replay of the layer.
        call = partial(checkpoint, call, use_reentrant=False)
    outs = [call(piece) for piece in x.split(tokens, -2)]
    for out in outs:
        if not isinstance(out, Tensor):
            raise ReversibleError(
                f"{name} returns {type(out).__name__}, and not a tensor: leave it out of tile"
            )
    return torch.cat(outs, -2)


def _call(
    part: nn.Module, own: Any, gates: Gates, args: Sequence[Any], kwargs: dict[str, Any], x: Tensor
) -> Any:
    with gates.open():
        return own.forward(part, x, *args, **kwargs)
