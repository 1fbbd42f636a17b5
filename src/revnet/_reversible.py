"""Programs of any steps on any streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from torch import nn

from ._engine import ContextFn
from ._program import (
    BoundSteps,
    DeterminismCheck,
    Execution,
    Program,
    Streams,
    Values,
    check_stream,
)
from ._routing import StepRoutes, check_names, check_step_routes, keywords_of, sliced
from ._slices import part_of
from ._source import rule_of
from ._step import BoundStep, Step
from ._streams.arithmetic import FloatArithmetic
from ._taps import positions_of
from ._tile import Tile
from ._trees import tree_leaves

P = TypeVar("P", bound="StepProgram")


class StepProgram(Program):
    """What programs share that consist of `Step` objects in any order."""

    def __init__(
        self, steps: Iterable[Step], args_route: StepRoutes, options: tuple[Any, ...]
    ) -> None:
        program = list(steps)
        if not program:
            raise ValueError("steps is empty: give at least one revnet.Step")
        for i, step in enumerate(program):
            if not isinstance(step, Step):
                raise TypeError(
                    f"step {i} is {type(step).__name__}, but a program consists of revnet.Step"
                )
        check_names(args_route)
        check_step_routes(args_route, len(program))
        super().__init__(len(program), *options)
        self.args_route: Any = args_route if isinstance(args_route, str) else dict(args_route)
        self._arrange(program)

    def _arrange(self, program: Sequence[Step]) -> None:
        """Register each step once, in the order in which they first occur."""
        places = {step: place for place, step in enumerate(dict.fromkeys(program))}
        self.steps = nn.ModuleList(places)
        self._order = [places[step] for step in program]
        self._width = 1 + max(max((step.target, *step.source)) for step in places)
        undoes = FloatArithmetic().undoes
        self._needs_fixed = any(
            step.coupling.scales and not undoes(step.coupling) for step in places
        )

    @property
    def _own_branches(self) -> Iterable[nn.Module]:
        return self.steps

    @property
    def _makes_rules(self) -> bool:
        return any(step.coupling.reads_source for step in cast(list[Step], self.steps))

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Step]:
        return (cast(Step, self.steps[place]) for place in self._order)

    def _slice(self, kind: type[P], index: slice) -> P:
        """Return a program of some steps: the same steps, settings of its own."""
        steps = cast(list[Step], list(self.steps))
        chosen = range(len(self))[index]
        part = part_of(self, kind, chosen)
        part._arrange([steps[self._order[i]] for i in chosen])
        part.args_route = sliced(self.args_route, chosen, group=1)
        return part

    @property
    def _tiling(self) -> Mapping[Any, Tile]:
        steps = enumerate(cast(list[Step], self.steps))
        return {i: step.tile for i, step in steps if step.tile is not None}

    @_tiling.setter
    def _tiling(self, tiles: Mapping[Any, Tile]) -> None:
        for i, tile in tiles.items():
            cast(Step, self.steps[i]).tile = tile

    def inverse(self, *streams: Any, return_aux: bool = False, **kwargs: Any) -> tuple[Any, ...]:
        """Return the streams before the first step, from those after the last.

        A pass like `forward`, in reverse order: its activations are rebuilt in backward by the
        executions of the steps, and in fixed streams its gradients equal those of stored execution
        in every bit. Randomness of the forward pass is not repeated: call it in `eval()`, or
        without dropout.

        Args:
            streams: as `forward` returned them.
            return_aux: append the dict from step to extra output, `{}` if no branch returned any.
                The outputs are those of the forward pass: `log_det` is that of the step, not of its
                inverse.
            **kwargs: as in `forward`.

        Raises:
            ReversibleError: a step reads its own target.
        """
        found = self._invert(streams, self._parts(streams, kwargs))
        streams, aux = found[: len(streams)], found[len(streams) :]
        return (*streams, *(aux or ({},))) if return_aux else streams

    def _parts(self, streams: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundSteps:
        if len(streams) < self._width:
            raise ValueError(f"got {len(streams)} streams, but the steps refer to {self._width}")
        if not any(map(tree_leaves, streams)):
            raise ValueError("the streams hold no tensors: give at least one")
        for i, stream in enumerate(streams):
            for leaf in tree_leaves(stream):
                check_stream(leaf, f"stream {i}")
        steps = cast(list[Step], list(self.steps))
        program = [steps[place] for place in self._order]
        flat = keywords_of(self.args_route, kwargs, program, group=1)
        return [
            (
                i,
                BoundStep(
                    f"step {i}", step, rule_of(step.coupling), *_place(step), flat[i], step.tile
                ),
            )
            for i, step in enumerate(program)
        ]


class Reversible(StepProgram):
    """Steps over any number of streams, whose activation memory does not grow with depth.

    Streams are tensors, or trees (dicts, lists, tuples) of tensors, of any shapes. The same `Step`
    object may occur many times: its parameters are registered once.

    Args:
        steps: in the order in which they are applied.
        args_route: for each keyword of the forward pass, whether the branch of each step takes it:
            one boolean for all steps, or one per step. `"signature"` and names in place of
            booleans are as in `ReversibleSequence`. What a `Step` takes by its own `args` and
            `kwargs` needs no route.
        streams: `"auto"`, `"fixed"`, `"float"` or a `revnet.Fixed`; see `ReversibleSequence`.
            `"auto"` is fixed also for float32 where a step scales its target, which float streams
            cannot undo.
        execution: `"invert"`, `"store"`, `"checkpoint"`, `"select"` or `"offload"` for all steps,
            one of them per step, or a `revnet.Plan`; see `ReversibleSequence`. Where a step is to
            `"invert"` but cannot be undone in the streams of the call, it keeps its target: see
            `revnet.Coupling`.
        preserve_rng_state, context_fn: as in `ReversibleSequence`.
        determinism_check: `"default"`, `"none"` or `"exact"`; see `ReversibleSequence`.

    Raises:
        ValueError: no steps, a route of another length, or an unknown option.
        TypeError: a step that is not a `Step`.

    Example:
        >>> steps = [Step(nn.Linear(8, 8), target=i % 3, source=(i + 1) % 3) for i in range(6)]
        >>> net = Reversible(steps)
        >>> [tuple(y.shape) for y in net(*torch.randn(3, 2, 8))]
        [(2, 8), (2, 8), (2, 8)]
    """

    def __init__(
        self,
        steps: Iterable[Step],
        *,
        args_route: StepRoutes = {},
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: DeterminismCheck = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        options = (streams, execution, preserve_rng_state, determinism_check, context_fn)
        super().__init__(steps, args_route, options)

    if TYPE_CHECKING:

        def __call__(self, *streams: *Values, **kwargs: Any) -> tuple[*Values]: ...

    def with_aux(self, *streams: *Values, **kwargs: Any) -> tuple[tuple[*Values], dict[str, Any]]:
        """Call the module; return the streams, and the extra outputs, which may be none.

        The result has one form, and one type, whether branches return extra outputs or not.

        Args:
            *streams, **kwargs: as in `forward`, without `taps`.

        Returns:
            The tuple of streams, and a dict from step, such as "step 3", to extra output.
        """
        if kwargs.get("taps") is not None:
            raise TypeError("with_aux takes no taps: call the module itself")
        found: Any = self(*streams, **kwargs)
        count = len(streams)
        return found[:count], found[count] if len(found) > count else {}

    def forward(
        self, *streams: Any, taps: Sequence[int] | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """The streams after the last step.

        Args:
            streams: tensors, or trees of tensors, floating-point: as many as the steps refer to, or
                more.
            taps: steps after which all streams are read as well.
            **kwargs: passed to the branches that `args_route` names.

        Returns:
            As many streams; with `taps`, a list of the tuples of streams after these steps; and a
            dict from step to extra output if branches returned `(update, aux)`.
        """
        positions = None if taps is None else positions_of(taps, len(self), 1, "step")
        return self._run(streams, kwargs, positions)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> Reversible: ...
    def __getitem__(self, index: int | slice) -> Step | Reversible:
        """Return a step, or a program of some: the same steps, settings of its own.

        Slices are those of `ReversibleSequence`.
        """
        if isinstance(index, slice):
            return self._slice(Reversible, index)
        return cast(Step, self.steps[self._order[index]])


def _place(step: Step) -> tuple[int, tuple[int, ...]]:
    return step.target, step.source
