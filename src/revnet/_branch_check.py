"""The checks of a branch by itself, before it becomes part of a network."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._errors import ReversibleError
from ._reversible import Reversible
from ._state.random import RandomState, devices_of
from ._step import Step, branch_output
from ._streams.fixed import Fixed, fitting_fraction_bits
from ._tile import Tile, keywords_of_tiles, sizes_of, tile_of


def check_branch(branch: nn.Module, x: Tensor, seed: int = 0, **kwargs: Any) -> None:
    """Raise where a branch is not what a residual block takes.

    Checked are what it returns, that it leaves its inputs alone, that a replay repeats its output
    in every bit, and that it adds no residual of its own: the block does, and a second one trains
    to something else without an error.

    The residual is looked for in the graph of autograd: the input that reaches the output through
    additions, scalings, norms, reshapes and a last activation alone. It is not seen inside a custom
    `torch.autograd.Function` or a fused kernel, nor where it passes an operator of another kind
    (padding, pooling, concatenation). A branch that ends so on purpose, as a nested reversible
    sequence does, need not pass.

    Args:
        branch: maps a stream to a tensor of its shape, or to `(tensor, aux)`. A copy is called,
            where it can be copied.
        x: a stream, floating-point, in the mode and under the autocast of the training.
        seed: of the randomness of each call.
        **kwargs: keywords of the branch.

    Raises:
        ReversibleError: what is wrong, and what to do.

    Example:
        >>> check_branch(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(2, 8))
    """
    name = type(branch).__name__
    devices = {x.device.index or 0} if x.is_cuda else set()
    with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad(), _uncompiled():
        torch.manual_seed(seed)
        leaf = x.detach().clone().requires_grad_()
        out = _checked_output(_twin(branch), name, leaf, kwargs)
        if _adds_its_input(out, leaf):
            raise ReversibleError(
                f"{name} adds its input to its output: it has a residual connection of its own. "
                f"The block adds the streams: return the update alone, f(x) in place of x + f(x)."
            )
        torch.manual_seed(seed)
        _repeats(_twin(branch), name, x, kwargs)


def check_tiles(
    branch: nn.Module,
    x: Tensor,
    tile: int | Tile,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> None:
    """Raise where a branch does not treat the tokens of different tiles independently.

    First the graph of autograd tells whether the output of a tile depends on another tile, in the
    mode that the branch is in. Then the output of each tile by itself is compared with that of the
    call over all tokens: it differs where a branch knows places by counting. A branch that draws
    random numbers is compared in evaluation mode.

    Args:
        branch: maps a stream to a tensor of its shape, or to `(tensor, aux)`. A copy is called,
            where it can be copied.
        x: a stream, floating-point, of a few tiles.
        tile: tokens in a tile, or a `Tile`.
        tolerance: largest difference, relative to the largest output; by default 1000 times the
            precision of the dtype, and a tenth at most.
        seed: of the randomness of each call.
        **kwargs: keywords of the branch.

    Raises:
        ReversibleError: the branch mixes tokens; the message names the branch and the tile. Or a
            keyword cannot be cut.
        ValueError: `x` has one tile.

    Example:
        >>> check_tiles(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(1, 6, 8), 2)
    """
    name, cut = type(branch).__name__, tile_of(tile)
    assert cut is not None
    sizes = sizes_of(cut, [x.shape], name)
    if len(sizes) == 1:
        raise ValueError(
            f"check_tiles: x has {sizes[0]} tokens in dimension {cut.dim}, one tile of {cut.size}: "
            f"give a longer x, or a smaller tile"
        )
    devices = {x.device.index or 0} if x.is_cuda else set()
    with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad(), _uncompiled():
        torch.manual_seed(seed)
        twin, leaf = _twin(branch), x.detach().clone().requires_grad_()
        before = RandomState(devices_of([leaf]))
        out = branch_output(twin(leaf, **kwargs), leaf)[0]
        if not before.same(RandomState(devices_of([leaf]))):
            twin = _twin(branch).eval()
        _depend_on_themselves(name, cut, sizes, out, leaf)
        _equal_the_whole(twin, name, cut, sizes, leaf.detach(), kwargs, tolerance)


def _depend_on_themselves(
    name: str, tile: Tile, sizes: tuple[int, ...], out: Tensor, leaf: Tensor
) -> None:
    for number, part in enumerate(out.split(list(sizes), tile.dim)):
        if not part.requires_grad:
            return
        weight = torch.rand_like(part) + 0.5
        (grad,) = torch.autograd.grad(part, leaf, weight, retain_graph=True, allow_unused=True)
        if grad is None:
            continue
        for other, found in enumerate(grad.split(list(sizes), tile.dim)):
            if other != number and found.count_nonzero():
                raise ReversibleError(
                    f"{name} mixes tokens: the output of tile {number} of {len(sizes)} depends on "
                    f"the input of tile {other}. Run this branch without tile; a norm or a mixture "
                    f"of experts runs in tiles where it looks at one token at a time"
                )


def _equal_the_whole(
    branch: nn.Module,
    name: str,
    tile: Tile,
    sizes: tuple[int, ...],
    x: Tensor,
    kwargs: Mapping[str, Any],
    tolerance: float | None,
) -> None:
    if tolerance is None:
        tolerance = min(0.1, 1000 * torch.finfo(x.dtype).eps)
    keywords = keywords_of_tiles(tile, sizes, x.shape, kwargs, name)
    with torch.no_grad():
        whole = branch_output(branch(x, **kwargs), x)[0]
        largest = whole.abs().amax().item()
        parts = zip(x.split(list(sizes), tile.dim), whole.split(list(sizes), tile.dim), strict=True)
        for number, (part, expected) in enumerate(parts):
            out = branch_output(branch(part.contiguous(), **keywords[number]), part)[0]
            if out.shape != expected.shape:
                raise ReversibleError(
                    f"{name} returns {tuple(out.shape)} for tile {number} of {len(sizes)}, of "
                    f"shape {tuple(part.shape)}: a branch returns the shape of its stream"
                )
            error = (out - expected).abs().amax().item()
            if not error <= tolerance * largest:
                raise ReversibleError(
                    f"{name} gives another output for tile {number} of {len(sizes)} by itself than "
                    f"for all tokens, by {error:.2g} where the largest is {largest:.2g}: it mixes "
                    f"tokens, or counts their places. Give it what differs between tokens as a "
                    f"keyword, such as positions, or run it without tile"
                )


@contextlib.contextmanager
def _uncompiled() -> Any:
    """Run compiled modules as they were written: a compiled graph is one node."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _twin(branch: nn.Module) -> nn.Module:
    """Return a copy, whose state may change; the branch itself where it cannot be copied."""
    try:
        return copy.deepcopy(branch)
    except Exception:
        return branch


def _checked_output(
    branch: nn.Module, name: str, leaf: Tensor, kwargs: Mapping[str, Any]
) -> Tensor:
    """Return the update, after a look at what it is and at what became of the inputs."""
    given = leaf.clone()
    keywords = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), dict(kwargs))
    out, _ = branch_output(branch(given, **keywords), leaf)
    names = ("its input", "a keyword").__getitem__
    unchanged((given, keywords), (leaf, dict(kwargs)), name, names)
    if given._version:
        raise ReversibleError(IN_PLACE.format(name, names(0)))
    if not isinstance(out, Tensor):
        raise ReversibleError(
            f"{name} returns {type(out).__name__}: a branch returns a tensor, or a pair (tensor, "
            f"aux)"
        )
    if (out.shape, out.device) != (leaf.shape, leaf.device):
        raise ReversibleError(
            f"{name} returns {tuple(out.shape)} on {out.device} for {tuple(leaf.shape)} on "
            f"{leaf.device}: a branch returns the shape of its stream, to which it is added"
        )
    autocast = leaf.device.type != "meta" and torch.is_autocast_enabled(leaf.device.type)
    if out.dtype != leaf.dtype and not autocast:
        raise ReversibleError(
            f"{name} returns {out.dtype} for {leaf.dtype}: a branch returns the dtype of its "
            f"stream. Use torch.autocast, or cast at the end"
        )
    return out


IN_PLACE = (
    "{} changed {} in place. The streams that a step reads are needed to rebuild the activations: "
    "work on a copy, or use the out-of-place operation."
)


def unchanged(inputs: Any, before: Any, name: str, names: Callable[[int], str]) -> None:
    """Raise if a tensor among the inputs of `name` is not what it was before."""
    for i, (now, then) in enumerate(zip(inputs, before, strict=True)):
        for a, b in zip(pytree.tree_leaves(now), pytree.tree_leaves(then), strict=True):
            if isinstance(a, Tensor) and not a.is_meta and not torch.equal(a, b):
                raise ReversibleError(IN_PLACE.format(name, names(i)))


# Nodes that hand on their first input, but for its shape, its dtype and its scale.
_HANDS_ON = (
    *("Alias", "Clone", "Contiguous", "ToCopy", "Detach"),
    *("View", "UnsafeView", "Reshape", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze"),
    *("Flip", "Expand", "AsStrided", "Slice", "Div", "NativeDropout", "Neg"),
    *("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "FusedRmsNorm"),
)

# Activations that may follow the addition, as in residual networks of convolutions.
_ACTIVATIONS = (
    *("Relu", "LeakyRelu", "Prelu", "Rrelu", "Elu", "Gelu", "Silu", "Mish"),
    *("Hardtanh", "Hardswish", "Softplus", "Tanh", "Sigmoid"),
)


def _adds_its_input(out: Tensor, leaf: Tensor) -> bool:
    """Check whether `leaf` is a term of `out`, beside another one that was computed."""
    # A node may be reached with an addition above it, or without.
    waiting, seen = [(out.grad_fn, False)], set()
    while waiting:
        node, added = waiting.pop()
        if node is None or (node, added) in seen:
            continue
        seen.add((node, added))
        if getattr(node, "variable", None) is leaf:
            if added:
                return True
            continue
        inputs = [function for function, _ in node.next_functions]
        kind = node.name().rpartition("::")[2].partition("Backward")[0]
        if kind in ("Add", "Sub", "CopySlices"):
            # A bias is no second term. CopySlices is an addition in place to a view.
            terms = [each for each in inputs if each is not None and not _is_given(each, leaf)]
            both = len(terms) == 2
            waiting += [(each, added or both) for each in inputs]
        elif kind == "Mul":
            waiting += [
                (each, added)
                for each, factor in (inputs, inputs[::-1])
                if factor is None or _is_given(factor, leaf) or _is_norm(factor)
            ]
        elif kind in _HANDS_ON or (kind in _ACTIVATIONS and not added):
            waiting.append((inputs[0], added))
    return False


def _is_given(node: Any, leaf: Tensor) -> bool:
    """Check for a parameter, or another tensor that was not computed here."""
    return hasattr(node, "variable") and node.variable is not leaf


def _is_norm(node: Any) -> bool:
    return bool(node.name() == "RsqrtBackward0")


def _repeats(branch: nn.Module, name: str, x: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Raise unless a replay of the branch repeats its output in every bit."""
    if x.is_meta or not x.numel():
        return
    bits = fitting_fraction_bits(2 * x.detach().abs().amax().item() + 1)
    if bits is None:
        return
    # The first step is read behind the second, which has to be taken back for it.
    steps = [Step(_Sin(), 0, 1), Step(branch, 0, 1, kwargs={key: key for key in kwargs})]
    net = Reversible(steps, streams=Fixed(min(bits, 24)), determinism_check="exact")
    leaf = x.detach().clone().requires_grad_()
    keywords = pytree.tree_map_only(Tensor, Tensor.detach, dict(kwargs))
    out = net(torch.zeros_like(leaf), leaf, **keywords)[0]
    try:
        torch.autograd.grad(out.sum(), leaf)
    except ReversibleError as error:
        raise ReversibleError(
            f"{name} gives another result when it is called again, so that no replay can be right. "
            f"Draw from torch's global generators, not from those of Python, NumPy or its own; "
            f"keep state in buffers; on a GPU use torch.use_deterministic_algorithms(True). "
            f"The replay says: {error}"
        ) from error


class _Sin(nn.Module):
    """Needs its input in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()
