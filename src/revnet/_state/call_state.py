"""Everything that a replay of one step must see again: the kinds of state, composed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from operator import is_
from typing import Any

import torch

from .._errors import ReversibleError
from .._step import BoundStep
from . import fsdp
from .decisions import Decisions, replays, thread
from .environment import Environment
from .modules import ModuleState
from .random import RandomState
from .results import RecordResults, ReplayResults, Results, unrecorded
from .structure import Structure
from .undo import Undo

ContextFn = Callable[
    [], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]
]

_NOTHING = contextlib.nullcontext()


class StepState:
    """What one call of a step saw.

    Record it before the call, run the call inside `recording`, `settle` after it. Before a replay
    `check` refuses what no replay can undo, and `restore` puts everything in place until its `Undo`
    runs. The replay runs inside `replaying`, and `verify` compares what both did.

    Args:
        step: the step.
        structure: its modules.
        environment: settings of the process.
        random: the generators before the call, None where they are not to be restored.
        results: the results that are to be kept, if any.
        context_fn: makes contexts for the call and its replay.
    """

    __slots__ = (
        "name",
        "quiet",
        "environment",
        "modules",
        "random",
        "random_after",
        "decisions",
        "results",
        "contexts",
        "unaided",
        "_player",
    )

    def __init__(
        self,
        step: BoundStep,
        structure: Structure,
        environment: Environment,
        random: RandomState | None,
        results: Results | None,
        context_fn: ContextFn | None,
    ) -> None:
        self.name = step.name
        self.quiet = structure.quiet
        self.environment = environment
        self.modules = ModuleState(structure, step.kwargs, step.name)
        self.random = random
        self.random_after: tuple[Any, ...] | None = None
        self.decisions = Decisions(step.name)
        self.results = results
        self.contexts = None if context_fn is None else context_fn()
        self.unaided = context_fn is None and results is None
        self._player: ReplayResults | None = None

    @contextlib.contextmanager
    def recording(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """Run the branch inside; `decisions` alone does the same where it is `unaided`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.decisions)
            if self.contexts is not None:
                stack.enter_context(self.contexts[0])
            if self.results is not None:
                stack.enter_context(RecordResults(self.results, devices))
            yield

    def recording_rule(self, devices: Sequence[torch.device]) -> Any:
        """Run the rule of the step inside, which may draw and decide as the branch does."""
        return _NOTHING if self.quiet else self._recording_rule(devices)

    @contextlib.contextmanager
    def _recording_rule(self, devices: Sequence[torch.device]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.decisions)
            if self.results is not None:
                stack.enter_context(RecordResults(self.results, devices))
            yield

    def settle(self, random_after: RandomState | None) -> None:
        """Note what the call changed.

        Args:
            random_after: the generators after the call.
        """
        structure = self.modules.structure
        if (
            not structure.simple
            or self.modules.kwargs
            or list(map(len, structure.tables)) != structure.table_sizes
            or not all(map(is_, map(dict.get, *structure.without), repeat(None)))
        ):
            self.modules.settle()
        if self.results is not None:
            self.results.settle()
        if self.random is not None and random_after is not None:
            if random_after.same(self.random):
                self.random = None
            elif not self.modules.lazy:  # Such modules draw their parameters in their first call.
                self.random_after = random_after.fingerprint()

    def check(self) -> None:
        """Raise where something was changed that no replay can undo."""
        self.modules.check(self.name)

    def restore(self, undo: Undo) -> dict[str, Any]:
        """Put everything into the state that the call saw, until `undo` runs.

        Returns:
            The keywords for the replay.
        """
        active = thread.active
        undo.add(partial(self._leave, replays.depth, active.decisions, self.decisions.place))
        replays.depth += 1
        self.decisions.place = 0
        self._player = None
        self.environment.restore(undo)
        keywords = self.modules.restore(undo)
        if self.random is not None:
            self.random.restore(undo)
        return keywords

    def _leave(self, depth: int, active: tuple[Decisions, ...], place: int | None) -> None:
        replays.depth, thread.active.decisions, self.decisions.place = depth, active, place

    def replaying(self, running: bool) -> Any:
        """Run the branch inside.

        Args:
            running: whether the call itself is still under way.
        """
        uncast = fsdp.sharded(self.modules.modules) if fsdp.REPLAYS_UNCAST else []
        if not uncast and self.unaided:
            return self.decisions
        return self._replaying(running, uncast)

    @contextlib.contextmanager
    def _replaying(self, running: bool, uncast: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.decisions)
            if uncast:
                stack.enter_context(fsdp.casts(uncast))
            if self.contexts is not None:
                stack.enter_context(self.contexts[1])
            if self.results is not None:
                if running:
                    stack.enter_context(unrecorded(self.results))
                else:
                    self._player = ReplayResults(self.results, self.name)
                    stack.enter_context(self._player)
            yield

    def verify(self) -> None:
        """Raise unless the branch drew as many random numbers in the replay as in the call."""
        if self._player is not None and self.quiet:
            self._player.check()
        if self.random_after is None or not self.quiet:
            return
        assert self.random is not None
        if self.random.now().fingerprint() != self.random_after:
            raise ReversibleError(
                f"{self.name}: the replay drew another number of random numbers than the forward "
                "pass, so that its dropout masks, say, are others. Look for a condition on the "
                "time, on files, or on what another thread changes."
            )

    def mark(self) -> Any:
        """Return how far the replay of the branch has come, for a rule that does more than add."""
        random = None if self.random is None else self.random.now()
        count = 0 if self._player is None else self._player.count
        modules = ModuleState(self.modules.structure, {}, self.name)
        return random, self.decisions.place, count, modules

    @contextlib.contextmanager
    def replaying_rule(self, mark: Any, plays: bool, again: bool) -> Iterator[None]:
        """Run the rule of the step, or its inverse, inside, from this mark on.

        Args:
            mark: how far the branch came.
            plays: whether it runs the operations of the forward pass.
            again: whether the rule has run since, and may have changed its modules.
        """
        random, self.decisions.place, count, modules = mark
        if again:
            modules.settle()
            # What this changes is taken back at the end of the replay, with everything else.
            modules.restore(Undo())
        if random is not None:
            random.set()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.decisions)
            if self._player is not None and plays:
                self._player.count = count
                stack.enter_context(self._player)
            yield
