"""Sequences of residual blocks: two additive steps each, and their twin on one stream."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ._block import (
    ReversibleBlock,
    check_streams,
    enter_call,
    entered,
    residual_steps,
    runs_only_steps,
)
from ._distributed import shared_generator
from ._engine import Call, ContextFn
from ._execution import EXECUTIONS
from ._program import (
    BoundSteps,
    DeterminismCheck,
    Execution,
    Program,
    Streams,
    check_stream,
)
from ._routing import Routes, check_keywords, check_routes, route_args
from ._step import BoundStep
from ._torch import saved_tensor_hooks


class BlockSequence(Program):
    """What sequences of blocks share: routes and stochastic depth."""

    _name = "block"
    # Which stream each branch of a block updates.
    _updates = (0, 1)

    def __init__(self, args_route: Routes, layer_dropout: float, depth: int, *options: Any) -> None:
        if depth == 0:
            raise ValueError("blocks is empty: give at least one (f, g) pair")
        check_routes(args_route, depth)
        if not 0.0 <= layer_dropout < 1.0:
            raise ValueError(f"layer_dropout is {layer_dropout}, but a probability is in [0, 1)")
        super().__init__(2 * depth, *options)
        self.args_route = dict(args_route)
        self.layer_dropout = layer_dropout
        self._depth = depth

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, **kwargs: Any) -> Tensor: ...

    def with_aux(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Call the module; return its output, and the extra outputs, which may be none.

        The result has one form, and one type, whether branches return extra outputs or not.

        Args:
            x, **kwargs: as in `forward`.

        Returns:
            The output, and a dict from branch to extra output.
        """
        found: Any = self(x, **kwargs)
        return found if isinstance(found, tuple) else (found, {})

    @property
    def _branches(self) -> Sequence[Iterable[nn.Module]]:
        """The branches of each block."""
        raise NotImplementedError

    def _parts(
        self,
        streams: Sequence[Any],
        kwargs: Mapping[str, Any],
        dropped: Collection[int] | None = None,
    ) -> BoundSteps:
        check_keywords(self.args_route, kwargs)
        routed = route_args(self.args_route, kwargs, self._depth)
        if dropped is None:
            dropped = self._dropped()
        parts: list[tuple[int, BoundStep]] = []
        for i, (branches, keywords) in enumerate(zip(self._branches, routed, strict=True)):
            if i not in dropped:
                parts += residual_steps(
                    branches, keywords, 2 * i, f"{self._name} {i}, ", self._updates
                )
        return parts

    @property
    def _random_depth(self) -> bool:
        return self.training and self.layer_dropout > 0.0

    def _dropped(self) -> Collection[int]:
        if not self._random_depth:
            return ()
        draws = torch.rand(self._depth, generator=shared_generator(), device="cpu").tolist()
        return {i for i, draw in enumerate(draws) if draw < self.layer_dropout}

    def _step_name(self, step: int) -> str:
        return "the input" if step < 0 else f"{self._name} {step // 2}, branch {'fg'[step % 2]}"

    def extra_repr(self) -> str:
        dropout = f", layer_dropout={self.layer_dropout}" if self.layer_dropout else ""
        return f"depth={self._depth}, {super().extra_repr()}{dropout}"


class ReversibleSequence(BlockSequence):
    """Residual blocks on two streams, trained with activation memory that does not grow with depth.

    Each block maps `(x1, x2)` to `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Args:
        blocks: `(f, g)` pairs of modules that map a stream to a tensor of its shape (or to
            `(tensor, aux)`).
        args_route: for each keyword of the forward pass, one pair `(to_f, to_g)` per block.
        layer_dropout: probability with which each block is skipped in training (stochastic depth).
        split: `"copy"` starts both streams as `x`; `"chunk"` halves `x` along `dim`.
        merge: `"mean"`, `"sum"` or `"concat"` (along `dim`) of the two streams.
        dim: dimension of `"chunk"` and `"concat"`.
        streams: `"fixed"` or a `revnet.Fixed` holds streams as integers, with gradients equal to
            stored execution in every bit; `"float"` holds the tensors themselves; `"auto"` is fixed
            under autocast and for bfloat16 and float16 inputs, float otherwise.
        execution: what stays of each step until backward. `"invert"`: nothing, streams and
            activations are rebuilt; `"store"`: activations; `"checkpoint"`: the stream that the
            step updates; `"offload"`: that stream, in host memory; `"select"`: results of matrix
            products and attention. One of them for all steps, one per step (`f` and `g` of each
            block in turn), or a `revnet.Plan`.
        preserve_rng_state: whether a replay repeats the randomness of the call. torch's global
            generators are repeated; Python's `random`, NumPy and a branch's own `torch.Generator`
            are not.
        determinism_check: `"default"` compares shape, dtype, device and strides of what a replay
            saves with what the forward saved; `"none"` does not; `"exact"` compares 64-bit
            checksums of the state (with float streams, of the branch outputs of steps whose input
            is kept) and may synchronise. It finds what is not repeated.
        context_fn: as in `torch.utils.checkpoint`: returns a pair of contexts, for the forward and
            for the replay of each branch.

    Raises:
        ValueError: a route of another length than `blocks`, or an unknown option.
        TypeError: a block that is not a pair of modules.

    Example:
        >>> net = ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)])
        >>> net(torch.randn(2, 8)).shape
        torch.Size([2, 8])

    Reference: Gomez et al. 2017, arXiv:1707.04585; Kitaev et al. 2020, arXiv:2001.04451.
    """

    def __init__(
        self,
        blocks: Iterable[Iterable[nn.Module]],
        args_route: Routes = {},
        *,
        layer_dropout: float = 0.0,
        split: Literal["copy", "chunk"] = "copy",
        merge: Literal["mean", "sum", "concat"] = "mean",
        dim: int = -1,
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: DeterminismCheck = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        pairs = _pairs(blocks)
        if split not in ("copy", "chunk"):
            raise ValueError(f"split {split!r} is not 'copy' or 'chunk'")
        if merge not in ("mean", "sum", "concat"):
            raise ValueError(f"merge {merge!r} is not 'mean', 'sum' or 'concat'")
        options = (streams, execution, preserve_rng_state, determinism_check, context_fn)
        super().__init__(args_route, layer_dropout, len(pairs), *options)
        self.split = split
        self.merge = merge
        self.dim = dim
        own = [ReversibleBlock(f, g) for f, g in pairs]
        for i, block in enumerate(own):
            block._take_place(self._settings, 2 * i)
        self.blocks = nn.ModuleList(own)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """The merged streams after the last block.

        Args:
            x: any shape, floating-point. With `split="chunk"`, even in size along `dim`.
            **kwargs: passed to the branches that `args_route` names.

        Returns:
            A tensor of the dtype of `x`, of its shape unless `split` and `merge` say otherwise;
            `(y, aux)` if branches returned extra outputs, `aux` a dict from branch to output.
        """
        y1, y2, *aux = self.run(*self._split(x), **kwargs)
        y = self._merge(y1, y2)
        return (y, *aux) if aux else y

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_stream(x, "x")
        self._check_plan(x)
        if self.split == "copy":
            return x, x
        size = x.shape[self.dim]
        if size % 2:
            raise ValueError(
                f"split='chunk' halves dimension {self.dim} of x, whose size {size} is odd"
            )
        x1, x2 = x.chunk(2, self.dim)
        return x1, x2

    def _merge(self, y1: Tensor, y2: Tensor) -> Tensor:
        if self.merge == "concat":
            return torch.cat((y1, y2), self.dim)
        # The overload with a number keeps no tensor for backward; `/ 2` would keep one.
        return torch.ops.aten.div.Scalar(y1 + y2, 2) if self.merge == "mean" else y1 + y2

    def run(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """The streams after the last block, `(y1, y2)`, from those before the first.

        Args:
            x1, x2: any shape, equal, floating-point.

        Returns:
            `(y1, y2)`, or `(y1, y2, aux)` if branches returned extra outputs.
        """
        check_streams(x1, x2)
        return self._run((x1, x2), kwargs)

    def inverse(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The streams before the first block, `(x1, x2)`, from those after the last.

        Exact up to rounding in floating point. Randomness is not repeated: call it in `eval()`, or
        without dropout.
        """
        check_streams(y1, y2)
        x1, x2 = self._undo((y1, y2), self._parts((y1, y2), kwargs, dropped=()))
        return x1, x2

    @property
    def _branches(self) -> Sequence[Iterable[nn.Module]]:
        return [(block.f, block.g) for block in cast(Iterable[ReversibleBlock], self.blocks)]

    @property
    def _called_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def _through(self, call: Call, parts: BoundSteps) -> Sequence[Any]:
        doors, streams = self._called_blocks, ()
        for i in range(0, len(parts), 2):
            block = parts[i : i + 2]
            (first, f), (_, g) = block
            door = doors[first // 2]
            if runs_only_steps(door):
                if streams:
                    enter_call(call, streams, self._settings, f.name)
                    streams = ()
                for index, part in block:
                    call.step(index, part)
                continue
            # What else runs in the block may draw random numbers.
            call.random = None
            entered.call = call, block, saved_tensor_hooks()
            try:
                streams = door(*(streams or call.start()), f.kwargs, g.kwargs)
            finally:
                vars(entered).pop("call", None)
            call.random = None
        return streams

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split={self.split!r}, merge={self.merge!r}, dim={self.dim}"


class SequentialSequence(BlockSequence):
    """The non-reversible twin: each layer maps `x` to `x + f(x)`, then to `x + g(x)`.

    Args:
        layers: `(f, g)` pairs of modules that map `x` to a tensor of its shape.
        args_route, layer_dropout: as in `ReversibleSequence`.
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
    ) -> None:
        pairs = _pairs(layers)
        super().__init__(args_route, layer_dropout, len(pairs), "float", execution)
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """Return `x` after the last layer, or `(x, aux)` if branches returned extra outputs."""
        check_stream(x, "x")
        y, *aux = self._run((x,), kwargs)
        return (y, *aux) if aux else y

    @property
    def _branches(self) -> Sequence[Iterable[nn.Module]]:
        return list(cast(Iterable[nn.ModuleList], self.layers))


def _pairs(blocks: Iterable[Iterable[nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
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
