"""Residual layers on several streams, which they update in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast, overload

from torch import Tensor, nn

from ._block import check_streams
from ._engine import ContextFn
from ._program import DeterminismCheck, Execution, Streams, check_stream, output_and_aux
from ._reversible import StepProgram
from ._routing import StepRoutes
from ._step import Step
from ._taps import positions_of
from ._trees import tree_leaves, tree_map


class _Layer(Step):
    """A layer that reads the sum of several streams."""

    @property
    def reads(self) -> int:
        """Return how many streams the layer is given."""
        return 1

    def forward(self, *sources: Any, **kwargs: Any) -> Any:
        """Return what the layer adds to its target."""
        return super().forward(_sum(sources), **kwargs)


class ReversibleCycle(StepProgram):
    """Residual layers that update several streams in turn, and read the sum of the others.

    On n streams, layer k maps

        s[j] = x / (n - 1)                                      before the first layer
        s[k mod n] += layer_k(sum of s[j] over j != k mod n)
        y = (n - 1) / n * sum of s[j]                           after the last

    so that it reads the input and what all layers before it added, but for every n-th. On two
    streams, as in `ReversibleSequence`, it misses every second. What the forward pass keeps is n
    streams, whatever the depth. Layers may be whole layers of attention and MLP, without their
    residual connection. Any number of layers will do.

    Args:
        layers: modules that map a stream to what is added to it, a tensor of the same shape (or
            `(tensor, aux)`).
        num_streams: n, at least 2.
        args_route: for each keyword of the forward pass, whether each layer takes it; see
            `Reversible`.
        streams, execution, preserve_rng_state, determinism_check, context_fn: as in
            `ReversibleSequence`; a step is a layer.

    Raises:
        ValueError: no layers, fewer than two streams, or an unknown option.
        TypeError: a layer that is not a module.

    Example:
        >>> net = ReversibleCycle([nn.Linear(8, 8) for _ in range(5)])
        >>> net(torch.randn(2, 8)).shape
        torch.Size([2, 8])

    Reference: with two streams Gomez et al. 2017, arXiv:1707.04585.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        num_streams: int = 3,
        *,
        args_route: StepRoutes = {},
        streams: Streams = "auto",
        execution: Execution = "invert",
        preserve_rng_state: bool = True,
        determinism_check: DeterminismCheck = "default",
        context_fn: ContextFn | None = None,
    ) -> None:
        if num_streams < 2:
            raise ValueError(f"num_streams is {num_streams}: a cycle has at least two streams")
        steps: list[Step] = []
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layer {i} is {type(layer).__name__}, but a layer is a module")
            target = i % num_streams
            others = [stream for stream in range(num_streams) if stream != target]
            steps.append(_Layer(layer, target=target, source=others))
        if not steps:
            raise ValueError("layers is empty: give at least one module")
        options = (streams, execution, preserve_rng_state, determinism_check, context_fn)
        super().__init__(steps, args_route, options)
        self.num_streams = num_streams

    def forward(self, x: Any, *, taps: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The merged streams after the last layer.

        Args:
            x: any shape, floating-point; or a tree of such tensors.
            taps: layers after which the merged streams are returned as well; see
                `ReversibleSequence`.
            **kwargs: passed to the layers that `args_route` names.

        Returns:
            A tensor of the shape and dtype of `x`; `(y, aux)` if layers returned extra outputs,
            `aux` a dict from step to output; with `taps`, `(y, hidden)` or `(y, hidden, aux)`,
            `hidden` a list of tensors like `y`.
        """
        positions = None if taps is None else positions_of(taps, len(self), 1, "layer")
        found = self._run(self._split(x), kwargs, positions)
        y, more = self._tapped(*found[: self.num_streams]), found[self.num_streams :]
        return (y, *more) if more else y

    def run(self, *streams: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The streams after the last layer, from those before the first.

        Args:
            streams: `num_streams` tensors of one shape, or trees of them.
            **kwargs: as in `forward`.

        Returns:
            As many streams; and a dict from step to extra output if layers returned any.
        """
        self._check_streams(streams)
        return self._run(streams, kwargs)

    def inverse(self, *streams: Any, return_aux: bool = False, **kwargs: Any) -> tuple[Any, ...]:
        """Return the streams before the first layer, from those that `run` returned.

        What `forward` returns is merged, and has no inverse. Otherwise as `Reversible.inverse`.

        Args:
            streams: `num_streams` of them.
            return_aux: append the dict from step to extra output, `{}` if no layer returned any.
            **kwargs: as in `forward`.
        """
        self._check_streams(streams)
        return super().inverse(*streams, return_aux=return_aux, **kwargs)

    def _check_streams(self, streams: Sequence[Any]) -> None:
        if len(streams) != self.num_streams:
            raise ValueError(
                f"got {len(streams)} streams, but num_streams is {self.num_streams}: run and "
                f"inverse take all streams; forward splits its input, and merges them"
            )
        for i, stream in enumerate(streams):
            check_streams(streams[0], stream, ("stream 0", f"stream {i}"))

    def _split(self, x: Any) -> list[Any]:
        for leaf in tree_leaves(x) or [x]:
            check_stream(leaf, "x")
        share = tree_map(lambda leaf: leaf / (self.num_streams - 1), x)
        return [share] * self.num_streams

    def _tapped(self, *streams: Any) -> Any:
        share = (self.num_streams - 1) / self.num_streams
        return tree_map(lambda leaf: leaf * share, _sum(streams))

    def with_aux(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Call the module; return its output, and the extra outputs, which may be none.

        Args:
            x, **kwargs: as in `forward`, without `taps`.

        Returns:
            The output, and a dict from step, such as "step 3", to extra output.
        """
        return output_and_aux(self, x, kwargs)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> ReversibleCycle: ...
    def __getitem__(self, index: int | slice) -> Step | ReversibleCycle:
        """Return the step of a layer, or a cycle of some: the same layers, settings of its own.

        A layer of a slice updates the stream that it updates here: `net[:4](x)` is an early exit,
        and `net[4:].run(*net[:4].run(...))` goes on from there.
        """
        if isinstance(index, slice):
            return self._slice(ReversibleCycle, index)
        return cast(Step, self.steps[self._order[index]])

    def extra_repr(self) -> str:
        return f"num_streams={self.num_streams}, {super().extra_repr()}"


def _sum(streams: Sequence[Any]) -> Any:
    """Return the sum of trees of tensors; one is returned as it is."""
    total, *others = streams
    for other in others:
        total = tree_map(lambda a, b: a + b, total, other)
    return total
