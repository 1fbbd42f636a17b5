"""Programs of steps: any, sequences of residual blocks, and their plain twin."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._couplings import Additive, tree_leaves
from ._distributed import shared_generator
from ._engine import Call, ContextFn, Options
from ._errors import ReversibleError
from ._execution import EXECUTIONS, Plan, resolve
from ._routing import Routes, check_keywords, check_routes, route_args
from ._steps import FixedArithmetic, FloatArithmetic, Step, undo
from ._streams import Fixed, Float, OutOfRange, RangeMonitor, fitting_fraction_bits
from ._traced import Part, active, outside, run_traced

Execution = str | Sequence[str] | Plan
Streams = str | Fixed | Float

_ADDITIVE = Additive()


class _Door(threading.local):
    """Hands the call that is under way to the block that a sequence enters by its `__call__`."""

    call: Call | None = None
    index: int = 0

    def enter(self, call: Call, index: int, block: nn.Module, streams: Any, *branch_args: Any) -> Any:
        self.call, self.index = call, index
        try:
            return block(*streams, *branch_args)
        finally:
            self.call = None

    def take(self) -> tuple[Call | None, int]:
        call, self.call = self.call, None
        index, self.index = self.index, 0
        return call, index


_door = _Door()


class ReversibleBlock(nn.Module):
    """Two residual branches on two streams: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Args:
        f, g: modules that map a stream to a tensor of the same shape, or to `(tensor, aux)`.

    Reference: Gomez et al. 2017, arXiv:1707.04585.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, nn.Module):
                raise TypeError(f"branch {name} is {type(branch).__name__}, but a branch is an nn.Module")
        self.f = f
        self.g = g
        self.register_load_state_dict_pre_hook(_unwrap_deterministic)

    def forward(
        self, x1: Tensor, x2: Tensor, f_args: Mapping[str, Any] = {}, g_args: Mapping[str, Any] = {}
    ) -> tuple[Tensor, Tensor]:
        """The streams after the block.

        Args:
            x1, x2: any shape, floating-point, equal shapes.
            f_args, g_args: keywords of `f` and of `g`.

        Returns:
            `(y1, y2)`; as part of a sequence, and alone, their activations are rebuilt in backward.
        """
        if active():
            _check_streams(x1, x2)
            parts = [
                Part("branch f", self.f, _ADDITIVE, 0, (1,), dict(f_args)),
                Part("branch g", self.g, _ADDITIVE, 1, (0,), dict(g_args)),
            ]
            engine = partial(self.forward, x1, x2, f_args, g_args)
            y1, y2, *_ = run_traced(parts, (x1, x2), FloatArithmetic(), ("invert", "invert"), engine)
            return y1, y2
        call, i = _door.take()
        if call is not None:
            call.enter(x1, x2)
            del x1, x2
            self._steps(call, i, f_args, g_args, f"block {i}, ")
            return call.streams[0][0], call.streams[1][0]
        _check_streams(x1, x2)
        with Call((x1, x2), FloatArithmetic(), Options(), ("invert", "invert")) as call:
            self._steps(call, 0, f_args, g_args, "")
            y1, y2 = call.finish()
        return y1, y2

    def _steps(self, call: Call, i: int, f_args: Mapping[str, Any], g_args: Mapping[str, Any], name: str) -> None:
        call.step(2 * i, self.f, 0, (1,), _ADDITIVE, dict(f_args), f"{name}branch f")
        call.step(2 * i + 1, self.g, 1, (0,), _ADDITIVE, dict(g_args), f"{name}branch g")

    def inverse(
        self, y1: Tensor, y2: Tensor, f_args: Mapping[str, Any] = {}, g_args: Mapping[str, Any] = {}
    ) -> tuple[Tensor, Tensor]:
        """The streams before the block, from those after it; differentiable. Randomness is not repeated."""
        streams = [y1, y2]
        undo(streams, self.g, 1, (0,), _ADDITIVE, g_args)
        undo(streams, self.f, 0, (1,), _ADDITIVE, f_args)
        return streams[0], streams[1]


def _unwrap_deterministic(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Accept checkpoints of classes that wrap each branch, with keys `f.net.…` where ours are `f.…`."""
    expected = {prefix + key for key in module.state_dict()}
    for branch in ("f", "g"):
        start = f"{prefix}{branch}."
        wrapped = f"{start}net."
        found = [key for key in state_dict if key.startswith(start)]
        renamed = {key: start + key[len(wrapped) :] for key in found if key.startswith(wrapped)}
        if len(renamed) == len(found) and not expected.issuperset(found) and expected.issuperset(renamed.values()):
            for old, new in renamed.items():
                state_dict[new] = state_dict.pop(old)


class _Program(nn.Module):
    """What all programs share: how streams are held, and the choice of execution."""

    _allowed: Sequence[str] = EXECUTIONS
    # Whether a step can be undone in fixed streams alone.
    _needs_fixed = False

    def __init__(self, steps: int, execution: Execution, options: Options, streams: Streams = "float") -> None:
        super().__init__()
        if options.determinism_check not in ("default", "none", "exact"):
            raise ValueError(f"determinism_check {options.determinism_check!r} is not 'default', 'none' or 'exact'")
        self._count = steps
        self._options = options
        self.streams = _streams(streams)
        self._monitor = RangeMonitor()
        self.execution = execution

    def _check_plan(self, x: Tensor) -> None:
        """Raise where the input is larger than that for which the plan in force was made."""
        if isinstance(self._execution, Plan) and torch.is_grad_enabled():
            self._execution.check_input(x)

    def _call(self, *streams: Any) -> Call:
        self._check_plan(tree_leaves(streams[0])[0])
        return Call(streams, self._arithmetic(tree_leaves(streams[0])[0]), self._options, self._executions)

    def _traced(
        self, parts: Sequence[Part], streams: Sequence[Any], engine: Callable[[], Any], blocks: Sequence[nn.Module] = ()
    ) -> tuple[Any, ...]:
        """What a call returns where saved-tensor hooks are out of reach."""
        fixed = self._format(tree_leaves(streams[0])[0])
        # The monitor's memory is not of the graph: there, what leaves the range shows as NaN alone.
        arithmetic = FixedArithmetic(fixed, None) if isinstance(fixed, Fixed) else FloatArithmetic()
        obstacle = ""
        if self._options.context_fn is not None or self._options.determinism_check == "exact":
            obstacle = "context_fn and determinism_check='exact' take effect in the replays of the engine"
        found: tuple[Any, ...] = run_traced(parts, streams, arithmetic, self._executions, engine, blocks, obstacle)
        return found

    def _finish(self, call: Call, *streams: Any) -> tuple[Any, ...]:
        """The streams of a call, with what branches returned beside their outputs, if anything."""
        outputs = tuple(call.finish(*streams))
        self._monitor.flush()
        return (*outputs, call.aux) if call.aux else outputs

    def _arithmetic(self, x: Tensor) -> FloatArithmetic | FixedArithmetic:
        """How this call holds its streams, after a look at what earlier calls found."""
        fixed = self._format(x)
        if not isinstance(fixed, Fixed):
            return FloatArithmetic()
        self._raise(self._monitor.poll(), fixed)
        return FixedArithmetic(fixed, self._monitor)

    def _format(self, x: Tensor) -> Fixed | Float:
        """The format of streams that start as x."""
        if isinstance(self.streams, Fixed | Float):
            return self.streams
        low = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type)
        return Fixed() if low or (self._needs_fixed and x.dtype is torch.float32) else Float()

    def check(self) -> None:
        """Wait for the device and raise if a stream left the range of its format.

        Without this call, the error is raised by the first forward pass after the news has reached the host.

        Raises:
            ReversibleError: a branch whose update left the range, was infinite or not a number.
        """
        fixed = self.streams if isinstance(self.streams, Fixed) else Fixed()
        self._raise(self._monitor.check(), fixed)

    def _raise(self, found: OutOfRange | None, fixed: Fixed) -> None:
        for step, share in self._monitor.vanishing().items():
            warnings.warn(
                f"{self._step_name(step)}: {share:.0%} of its nonzero outputs are smaller than half of "
                f"2^-{fixed.fraction_bits}, the resolution of the streams, and change nothing. Use more fraction bits, "
                "as in streams=revnet.Fixed(fraction_bits=37).",
                stacklevel=3,
            )
        if found is None:
            return
        self._monitor.reset()
        bits = fitting_fraction_bits(found.magnitude)
        remedy = "Look for the cause in this branch."
        if bits is not None:
            remedy = f"Use streams=revnet.Fixed(fraction_bits={bits}) or fewer fraction bits."
        raise ReversibleError(
            f"{self._step_name(found.step)}: a stream left the range of {fixed}, ±{fixed.limit:.6g}: the largest value "
            f"was {found.magnitude:.6g}. The output of that forward pass is NaN there. {remedy}"
        )

    def _step_name(self, step: int) -> str:
        return "the input" if step < 0 else f"step {step}"

    @property
    def execution(self) -> Execution:
        """What stays of each step until backward; see `revnet.plan`. Switches at any time."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        self._executions = resolve(execution, self._count, self._allowed)
        self._execution = execution

    def extra_repr(self) -> str:
        streams = repr(self.streams)
        if self.streams == "auto":
            where = "below float64" if self._needs_fixed else "in low precision"
            streams += f" ({Fixed()!r} {where}, else {Float()!r})"
        return f"streams={streams}, execution={self.execution!r}"


class Reversible(_Program):
    """Steps over any number of streams, trained with activation memory that does not grow with their number.

    Streams are tensors, or trees (dicts, lists, tuples) of tensors, of any shapes. The same `Step` object may occur
    many times: its parameters are registered once.

    Args:
        steps: in the order in which they are applied.
        args_route: for each keyword of the forward pass, one boolean per step: whether its branch takes it.
        streams: as in `ReversibleSequence`; `"auto"` is fixed also for float32 where a step scales its target, which
            float streams cannot undo.
        execution: as in `ReversibleSequence`, for all steps or one per step. Where a step is asked to `"invert"` but
            cannot be undone in the streams of the call, it keeps its target: see `revnet.Coupling`.
        preserve_rng_state, determinism_check, context_fn: as in `ReversibleSequence`.

    Raises:
        ValueError: no steps, a route of another length, or an unknown option.
        TypeError: a step that is not a `Step`.

    Example:
        >>> net = Reversible([Step(nn.Linear(8, 8), target=i % 3, source=(i + 1) % 3) for i in range(6)])
        >>> [tuple(y.shape) for y in net(*torch.randn(3, 2, 8))]
        [(2, 8), (2, 8), (2, 8)]
    """

    def __init__(
        self,
        steps: Iterable[Step],
        *,
        args_route: Mapping[str, Sequence[bool]] = {},
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: str = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        program = list(steps)
        if not program:
            raise ValueError("steps is empty: give at least one revnet.Step")
        for i, step in enumerate(program):
            if not isinstance(step, Step):
                raise TypeError(f"step {i} is {type(step).__name__}, but a program consists of revnet.Step")
        for key, route in args_route.items():
            if len(route) != len(program):
                raise ValueError(
                    f"args_route[{key!r}] has {len(route)} entries for {len(program)} steps: give one boolean per step"
                )
        super().__init__(len(program), execution, Options(preserve_rng_state, determinism_check, context_fn), streams)
        distinct = list(dict.fromkeys(program))
        self.steps = nn.ModuleList(distinct)
        places = {step: place for place, step in enumerate(distinct)}
        self._order = [places[step] for step in program]
        self.args_route = dict(args_route)
        self._width = 1 + max(max((step.target, *step.source)) for step in distinct)
        undoes = FloatArithmetic().undoes
        self._needs_fixed = any(step.coupling.scales and not undoes(step.coupling) for step in distinct)

    def forward(self, *streams: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The streams after the last step.

        Args:
            streams: tensors, or trees of tensors, floating-point: as many as the steps refer to, or more.
            **kwargs: passed to the branches that `args_route` names.

        Returns:
            As many streams, and a dict from step to extra output if branches returned `(update, aux)`.
        """
        program = self._program(streams, kwargs)
        if active():
            parts = [
                Part(f"step {i}", step, step.coupling, step.target, step.source, keywords)
                for i, step, keywords in program
            ]
            return self._traced(parts, streams, partial(self.forward, *streams, **kwargs))
        with self._call(*streams) as call:
            del streams
            for i, step, keywords in program:
                call.step(i, step, step.target, step.source, step.coupling, keywords, f"step {i}")
            return self._finish(call)

    def inverse(self, *streams: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The streams before the first step, from those after the last; differentiable.

        Computed in floating point, so exact up to rounding. Randomness is not repeated: call it in `eval()`, or without
        dropout.
        """
        found = list(streams)
        for _, step, keywords in reversed(self._program(streams, kwargs)):
            undo(found, step, step.target, step.source, step.coupling, keywords)
        return tuple(found)

    def _program(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int, Step, dict[str, Any]]]:
        """The steps of one pass: index, step, keywords of its branch."""
        if len(streams) < self._width:
            raise ValueError(f"got {len(streams)} streams, but the steps refer to {self._width}")
        for i, stream in enumerate(streams):
            for leaf in tree_leaves(stream):
                _check_stream(leaf, f"stream {i}")
        check_keywords(cast(Any, self.args_route), kwargs)
        routed = {key: value for key, value in kwargs.items() if key in self.args_route}
        steps = cast(list[Step], list(self.steps))
        return [
            (i, steps[place], {key: value for key, value in routed.items() if self.args_route[key][i]})
            for i, place in enumerate(self._order)
        ]


class _Blocks(_Program):
    """What sequences of blocks share: routes and stochastic depth."""

    def __init__(
        self,
        args_route: Routes,
        layer_dropout: float,
        depth: int,
        execution: Execution,
        options: Options,
        streams: Streams = "float",
    ) -> None:
        if depth == 0:
            raise ValueError("blocks is empty: give at least one (f, g) pair")
        check_routes(args_route, depth)
        if not 0.0 <= layer_dropout < 1.0:
            raise ValueError(f"layer_dropout is {layer_dropout}, but a probability is in [0, 1)")
        super().__init__(2 * depth, execution, options, streams)
        self.args_route = dict(args_route)
        self.layer_dropout = layer_dropout
        self._depth = depth

    def _step_name(self, step: int) -> str:
        return "the input" if step < 0 else f"block {step // 2}, branch {'fg'[step % 2]}"

    def _blocks(self, kwargs: Mapping[str, Any]) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
        """The blocks of one forward pass, in order: index, keywords of the first branch, of the second."""
        check_keywords(self.args_route, kwargs)
        routed = route_args(self.args_route, kwargs, self._depth)
        dropped = self._dropped()
        return [(i, *routed[i]) for i in range(self._depth) if i not in dropped]

    @property
    def _draws_depth(self) -> bool:
        return self.training and self.layer_dropout > 0.0

    def _dropped(self) -> set[int]:
        if not self._draws_depth:
            return set()
        draws = torch.rand(self._depth, generator=shared_generator(), device="cpu").tolist()
        return {i for i, draw in enumerate(draws) if draw < self.layer_dropout}

    def extra_repr(self) -> str:
        dropout = f", layer_dropout={self.layer_dropout}" if self.layer_dropout else ""
        return f"depth={self._depth}, {super().extra_repr()}{dropout}"


class ReversibleSequence(_Blocks):
    """Residual blocks on two streams, trained with activation memory that does not grow with depth.

    Each block maps `(x1, x2)` to `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    Args:
        blocks: `(f, g)` pairs of modules that map a stream to a tensor of its shape (or to `(tensor, aux)`).
        args_route: for each keyword of the forward pass, one pair `(to_f, to_g)` per block.
        layer_dropout: probability with which each block is skipped in training (stochastic depth).
        split: `"copy"` starts both streams as `x`; `"chunk"` halves `x` along `dim`.
        merge: `"mean"`, `"sum"` or `"concat"` (along `dim`) of the two streams.
        dim: dimension of `"chunk"` and `"concat"`.
        streams: `"fixed"` or a `revnet.Fixed` holds streams as integers, with gradients equal to stored execution in
            every bit; `"float"` holds the tensors themselves; `"auto"` is fixed under autocast and for bfloat16 and
            float16 inputs, float otherwise.
        execution: `"invert"` rebuilds activations in backward, `"store"` keeps them, `"checkpoint"` keeps one stream
            per step; or one of them per step (`f` and `g` of each block in turn).
        preserve_rng_state: whether a replay repeats the randomness of the call. torch's global generators are repeated;
            Python's `random`, NumPy and a branch's own `torch.Generator` are not.
        determinism_check: `"default"` compares shape, dtype, device and strides of what a replay saves with what the
            forward saved; `"none"` does not; `"exact"` compares 64-bit checksums of the state (with float streams, of
            the branch outputs of steps whose input is kept) and may synchronise. It finds what is not repeated.
        context_fn: as in `torch.utils.checkpoint`: returns a pair of contexts, for the forward and for the replay of
            each branch.

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
        split: str = "copy",
        merge: str = "mean",
        dim: int = -1,
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: str = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        pairs = _pairs(blocks)
        if split not in ("copy", "chunk"):
            raise ValueError(f"split {split!r} is not 'copy' or 'chunk'")
        if merge not in ("mean", "sum", "concat"):
            raise ValueError(f"merge {merge!r} is not 'mean', 'sum' or 'concat'")
        options = Options(preserve_rng_state, determinism_check, context_fn)
        super().__init__(args_route, layer_dropout, len(pairs), execution, options, streams)
        self.split = split
        self.merge = merge
        self.dim = dim
        self.blocks = nn.ModuleList(ReversibleBlock(f, g) for f, g in pairs)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """The merged streams after the last block.

        Args:
            x: any shape, floating-point. With `split="chunk"`, even in size along `dim`.
            **kwargs: passed to the branches that `args_route` names.

        Returns:
            A tensor of the dtype of `x`, of its shape unless `split` and `merge` say otherwise; `(y, aux)` if branches
            returned extra outputs, `aux` a dict from branch to output.
        """
        y1, y2, *aux = self.run(*self._split(x), **kwargs)
        y = self._merge(y1, y2)
        return (y, *aux) if aux else y

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _check_stream(x, "x")
        self._check_plan(x)
        if self.split == "copy":
            return x, x
        size = x.shape[self.dim]
        if size % 2:
            raise ValueError(f"split='chunk' halves dimension {self.dim} of x, whose size {size} is odd")
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
        _check_streams(x1, x2)
        if active():
            engine: Callable[[], tuple[Any, ...]] = partial(self.run, x1, x2, **kwargs)
            if self._draws_depth and torch.compiler.is_dynamo_compiling():
                return tuple(outside(engine))
            parts = []
            for i, f_args, g_args in self._blocks(kwargs):
                block = cast(ReversibleBlock, self.blocks[i])
                parts.append(Part(f"block {i}, branch f", block.f, _ADDITIVE, 0, (1,), f_args))
                parts.append(Part(f"block {i}, branch g", block.g, _ADDITIVE, 1, (0,), g_args))
            return self._traced(parts, (x1, x2), engine, list(self.blocks))
        blocks = self._blocks(kwargs)
        with self._call(x1, x2) as call:
            streams = call.start()
            del x1, x2
            for i, f_args, g_args in blocks:
                streams = _door.enter(call, i, self.blocks[i], streams, f_args, g_args)
            return self._finish(call, *streams)

    def inverse(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The streams before the first block, `(x1, x2)`, from those after the last.

        Exact up to rounding in floating point. Randomness is not repeated: call it in `eval()`, or without dropout.
        """
        _check_streams(y1, y2)
        check_keywords(self.args_route, kwargs)
        routed = route_args(self.args_route, kwargs, self._depth)
        for block, (f_args, g_args) in zip(reversed(self.blocks), reversed(routed), strict=True):
            y1, y2 = cast(ReversibleBlock, block).inverse(y1, y2, f_args, g_args)
        return y1, y2

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split={self.split!r}, merge={self.merge!r}, dim={self.dim}"


class SequentialSequence(_Blocks):
    """The non-reversible twin: each layer maps `x` to `x + f(x)`, then to `x + g(x)`.

    Args:
        layers: `(f, g)` pairs of modules that map `x` to a tensor of its shape.
        args_route, layer_dropout: as in `ReversibleSequence`.
        execution: `"store"` keeps activations; `"checkpoint"` keeps one stream per step.
    """

    _allowed = tuple(name for name in EXECUTIONS if name != "invert")

    def __init__(
        self,
        layers: Iterable[Iterable[nn.Module]],
        args_route: Routes = {},
        layer_dropout: float = 0.0,
        execution: Execution = "store",
    ) -> None:
        pairs = _pairs(layers)
        super().__init__(args_route, layer_dropout, len(pairs), execution, Options())
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """`x` after the last layer: same shape and dtype; `(x, aux)` if branches returned extra outputs."""
        _check_stream(x, "x")
        if active():
            engine = partial(self.forward, x, **kwargs)
            if self._draws_depth and torch.compiler.is_dynamo_compiling():
                return outside(engine)
            parts = []
            for i, f_args, g_args in self._blocks(kwargs):
                f, g = cast(nn.ModuleList, self.layers[i])
                parts.append(Part(f"layer {i}, branch f", f, _ADDITIVE, 0, (0,), f_args))
                parts.append(Part(f"layer {i}, branch g", g, _ADDITIVE, 0, (0,), g_args))
            y, *aux = self._traced(parts, (x,), engine)
            return (y, *aux) if aux else y
        blocks = self._blocks(kwargs)
        with self._call(x) as call:
            del x
            for i, f_args, g_args in blocks:
                f, g = cast(nn.ModuleList, self.layers[i])
                call.step(2 * i, f, 0, (0,), _ADDITIVE, f_args, f"layer {i}, branch f")
                call.step(2 * i + 1, g, 0, (0,), _ADDITIVE, g_args, f"layer {i}, branch g")
            y, *aux = self._finish(call)
            return (y, *aux) if aux else y


def _streams(streams: Streams) -> Streams:
    named: dict[Any, Streams] = {"auto": "auto", "fixed": Fixed(), "float": Float()}
    if isinstance(streams, Fixed | Float):
        return streams
    if streams not in named:
        raise ValueError(f"streams {streams!r} is not 'auto', 'fixed', 'float' or a revnet.Fixed")
    return named[streams]


def _pairs(blocks: Iterable[Iterable[nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    pairs = []
    for i, block in enumerate(blocks):
        pair = (block.f, block.g) if isinstance(block, ReversibleBlock) else block
        branches = tuple(pair) if isinstance(pair, Iterable) else (pair,)
        if len(branches) != 2 or not all(isinstance(branch, nn.Module) for branch in branches):
            raise TypeError(f"block {i} is {block!r}, but a block is a pair (f, g) of modules")
        pairs.append(branches)
    return pairs


def _check_stream(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, but a stream is a tensor")
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: a stream is a dense tensor. Pad it, and pass a mask by args_route."
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}, but a stream is floating-point")


def _check_streams(x1: Any, x2: Any) -> None:
    _check_stream(x1, "x1")
    _check_stream(x2, "x2")
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.device != x2.device:
        raise ValueError(
            f"the streams differ: x1 is {tuple(x1.shape)} {x1.dtype} on {x1.device}, "
            f"x2 is {tuple(x2.shape)} {x2.dtype} on {x2.device}"
        )
