"""Sequences of residual blocks on two streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, cast, overload

from torch import Tensor, nn

from ._block import (
    ReversibleBlock,
    block_in,
    check_streams,
    enter_call,
    entered,
    runs_only_steps,
    take_keys,
)
from ._compiled.function import active
from ._couplings import Coupling
from ._engine import Call, ContextFn, rename, stands_for_streams
from ._program import (
    BoundSteps,
    DeterminismCheck,
    Execution,
    Streams,
    check_stream,
)
from ._routing import Routes
from ._schemes import (
    merged_streams,
    starting_streams,
    steps_per_block,
)
from ._sequential import BlockSequence, TileOption, pairs_of
from ._streams.arithmetic import FloatArithmetic
from ._taps import Taps, positions_of
from ._torch import saved_tensor_hooks
from ._trees import tree_leaves

# A stream: a tensor, or a tree of tensors.
T = TypeVar("T")
Split = Callable[[Any], tuple[Any, Any]]
Merge = Callable[[Any, Any], Any]


class ReversibleSequence(BlockSequence):
    """Residual blocks on two streams, trained with activation memory that does not grow with depth.

    Each block maps `(x1, x2)` to `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`, or does so by another rule.
    Streams are tensors, or trees (dicts, lists, tuples) of tensors.

    Args:
        blocks: `(f, g)` pairs of modules that map a stream to a tensor of its shape (or to
            `(tensor, aux)`).
        args_route: for each keyword of the forward pass, one pair `(to_f, to_g)` for all blocks,
            or one per block. An entry is a boolean, or the name under which the branch takes the
            keyword. `"signature"`, for one keyword or instead of them all, sends it to the
            branches whose forward names it or takes `**kwargs`; wrappers with `*args, **kwargs`
            and one child count as their child. Read in each call, so that it may be changed.
        layer_dropout: probability with which each block is skipped in training (stochastic depth).
        split: `"copy"` starts both streams as `x`; `"chunk"` halves `x` along `dim`; a function of
            `x` returns the two streams.
        merge: `"mean"`, `"sum"` or `"concat"` (along `dim`) of the two streams; or a function of
            both returns the output.
        dim: dimension of `"chunk"` and `"concat"`.
        coupling: the rule of all steps, additive by default. `Momentum` and `Leapfrog` take a
            branch as the force on a velocity (stream 0), which is then added to the state
            (stream 1): four steps per block. With these, `Midpoint` and `TwoStep`,
            `split="copy"` starts at rest in x, and `merge="mean"` returns the latest state.
        streams: `"fixed"` or a `revnet.Fixed` holds streams as integers, with gradients equal to
            stored execution in every bit; `"float"` holds the tensors themselves; `"auto"` is fixed
            under autocast, for bfloat16 and float16 inputs, and for float32 where torch may compute
            products in TF32, as it does in convolutions on CUDA; float otherwise.
        execution: what stays of each step until backward. `"invert"`: nothing, streams and
            activations are rebuilt; `"store"`: activations; `"checkpoint"`: the stream that the
            step updates, or where it scales a fixed stream those that it reads; `"offload"`: the
            stream that it updates, in host memory; `"select"`: results of matrix products and
            attention. One of them for all steps, one per step (`f` and `g` of each block in turn),
            or a `revnet.Plan`.
        preserve_rng_state: whether a replay repeats the randomness of the call. torch's global
            generators are repeated; Python's `random`, NumPy and a branch's own `torch.Generator`
            are not.
        determinism_check: `"default"` compares shape, dtype, device and strides of what a replay
            saves with what the forward saved; `"none"` does not; `"exact"` compares 64-bit
            checksums of the state (with float streams, of the branch outputs of steps whose input
            is kept) and may synchronise. It finds what is not repeated.
        context_fn: as in `torch.utils.checkpoint`: returns a pair of contexts, for the forward and
            for the replay of each branch.
        tile: tokens on which the branches run at a time, by letter: `{"g": 4096}`, or `{"g":
            revnet.Tile(4096, dim=1)}`. For branches that treat tokens independently; each tile is a
            step of its own, so that activations of one tile live at a time.

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
        split: Literal["copy", "chunk"] | Split = "copy",
        merge: Literal["mean", "sum", "concat"] | Merge = "mean",
        dim: int = -1,
        coupling: Coupling | None = None,
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: DeterminismCheck = "default",
        context_fn: ContextFn | None = None,
        tile: TileOption = {},
    ) -> None:
        pairs = pairs_of(blocks)
        if not callable(split) and split not in ("copy", "chunk"):
            raise ValueError(f"split {split!r} is not 'copy' or 'chunk', nor a function")
        if not callable(merge) and merge not in ("mean", "sum", "concat"):
            raise ValueError(f"merge {merge!r} is not 'mean', 'sum' or 'concat', nor a function")
        if coupling is not None and not isinstance(coupling, Coupling):
            raise TypeError(
                f"coupling is {coupling!r}, which is not a Coupling: did you leave out the ()?"
            )
        self._per_block = steps_per_block(coupling)
        options = (streams, execution, preserve_rng_state, determinism_check, context_fn)
        super().__init__(args_route, layer_dropout, len(pairs), *options)
        self.split = split
        self.merge = merge
        self.dim = dim
        own = [ReversibleBlock(f, g) for f, g in pairs]
        for i, block in enumerate(own):
            block._take_place(self._settings, self._per_block * i)
        self.blocks = nn.ModuleList(own)
        if coupling is not None:
            self.coupling = self._settings.coupling = coupling
            self._settings.begins = coupling.starts_at_rest and split == "copy"
            self._needs_fixed = coupling.scales and not FloatArithmetic().undoes(coupling)
        self.tile = tile

    def forward(self, x: Any, *, taps: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The merged streams after the last block.

        Args:
            x: any shape, floating-point, or a tree of such tensors; what `split` takes, if that is
                a function. With `split="chunk"`, even in size along `dim`.
            taps: blocks after which the merged streams are returned as well: hidden states, for
                deep supervision, say. They are differentiable, and the memory of each is its own.
                In a compiled graph the two streams stay there besides. Early exits are slices:
                `net[:4](x)`.
            **kwargs: passed to the branches that `args_route` names.

        Returns:
            A tensor of the dtype of `x`, of its shape unless `split` and `merge` say otherwise;
            `(y, aux)` if branches returned extra outputs, `aux` a dict from branch to output; with
            `taps`, `(y, hidden)` or `(y, hidden, aux)`, `hidden` a list of tensors like `y`, one
            for each of `taps` in its order.

        Raises:
            IndexError: `taps` names a block that is not there.
        """
        count = self._per_block
        positions = None if taps is None else positions_of(taps, len(self), count, "block")
        y1, y2, *more = self._run(self._split(x), kwargs, positions)
        y = self._merge(y1, y2)
        return (y, *more) if more else y

    def _tapped(self, *streams: Any) -> Any:
        return self._merge(*streams)

    def _split(self, x: Any) -> tuple[Any, Any]:
        if not callable(self.split):
            for leaf in tree_leaves(x) or [x]:
                check_stream(leaf, "x")
        self._check_plan(*(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)))
        streams = starting_streams(self.split, self.dim, self._settings.coupling, x)
        if self.split == "chunk" and isinstance(x, Tensor) and not active():
            merged = "concat", self.dim % x.dim()
            if stands_for_streams(x, merged):
                # Views would keep x, and branches would not read what those of one sequence read.
                streams = streams[0].clone(), streams[1].clone()
                rename([x], merged, streams, None)
        return streams

    def _merge(self, y1: Any, y2: Any) -> Any:
        y = merged_streams(self.merge, self.dim, self._settings.coupling, y1, y2)
        if self.merge == "concat" and isinstance(y, Tensor) and not active():
            rename([y1, y2], None, [y], ("concat", self.dim % y.dim()))
        return y

    def run(self, x1: Any, x2: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The streams after the last block, `(y1, y2)`, from those before the first.

        Args:
            x1, x2: any shape, equal, floating-point; or trees of tensors.

        Returns:
            `(y1, y2)`, or `(y1, y2, aux)` if branches returned extra outputs.
        """
        check_streams(x1, x2)
        return self._run((x1, x2), kwargs)

    def inverse(self, y1: T, y2: T, **kwargs: Any) -> tuple[T, T]:
        """Return the streams before the first block, `(x1, x2)`, from those after the last.

        A pass like `run`, in reverse order: its activations are rebuilt in backward, and in fixed
        streams its gradients equal those of stored execution in every bit. Randomness of `run` is
        not repeated: call it in `eval()`, or without dropout.
        """
        check_streams(y1, y2)
        parts = self._parts((y1, y2), kwargs, dropped=())
        x1, x2, *_ = self._invert((y1, y2), parts)
        return x1, x2

    @overload
    def __getitem__(self, index: int) -> ReversibleBlock: ...
    @overload
    def __getitem__(self, index: slice) -> ReversibleSequence: ...
    def __getitem__(self, index: int | slice) -> ReversibleBlock | ReversibleSequence:
        """Return a block, or a sequence of some: the same blocks, settings of its own.

        Options and routes are those of this sequence now; a `Plan` becomes a list of executions.
        What is set later, there or here, stays there. Hooks on this sequence do not run there.
        """
        if not isinstance(index, slice):
            return cast(ReversibleBlock, self.blocks[index])
        chosen = range(len(self))[index]
        part = self._part(ReversibleSequence, chosen)
        # A block keeps its place in this sequence, whose settings it follows when called alone.
        part.blocks = nn.ModuleList(self.blocks[i] for i in chosen)
        return part

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # That of a SequentialSequence is taken, too.
        take_keys(state_dict, prefix, given=("layers", "01"), own=("blocks", "fg"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.blocks

    @property
    def _branches(self) -> Sequence[Iterable[nn.Module]]:
        blocks = [x if isinstance(x, ReversibleBlock) else block_in(x) for x in self.blocks]
        # By the dict of children, as each attribute of a module is a call.
        children = [cast(dict[str, nn.Module], block._modules) for block in blocks]
        return [(child["f"], child["g"]) for child in children]

    @property
    def _called_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def _through(self, call: Call, parts: BoundSteps, taps: Taps | None) -> Sequence[Any]:
        doors, streams, count = self._called_blocks, (), self._per_block
        for i in range(0, len(parts), count):
            block = parts[i : i + count]
            first, f = block[0]
            if taps is not None:
                taps.reach(first, streams or call.values)
            door = doors[first // count]
            if runs_only_steps(door):
                if streams:
                    enter_call(call, streams, self._settings, f.name)
                    streams = ()
                call.steps(block)
                continue
            # Hooks may put keywords in, which are those of this call alone.
            block = [(k, part._replace(kwargs=dict(part.kwargs))) for k, part in block]
            f, g = block[0][1], block[count // 2][1]
            # What else runs in the block may draw random numbers.
            call.random = None
            entered.call = call, block, saved_tensor_hooks(), self._settings
            try:
                streams = door(*(streams or call.start()), f.kwargs, g.kwargs)
            finally:
                vars(entered).pop("call", None)
            call.random = None
        return streams

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split={self.split!r}, merge={self.merge!r}, dim={self.dim}"
