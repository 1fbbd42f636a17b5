"""Refuse the backward of a compiled graph whose inputs were written to since forward.

Outside of a graph the engine compares versions before it replays a step. A compiled backward
replays inside its graph. There, AOT autograd compares the versions of some inputs, with an error
that names none of them, and other compilers compare none. So the graph that the compiler returns is
wrapped: its call notes the versions, and a hook before its backward compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._errors import ReversibleError, changed_message
from .._state.branch import attributes_of
from .._state.objects import Objects
from .._torch import counted_writes

# What an error says of an input: the step, the kind of tensor, and its name.
_Label = tuple[str, str, str]


class WatchingCompiler:
    """A compiler of graphs that refuse their backward after a write to what its replays read.

    Args:
        compile_graph: the compiler that the caller chose.
    """

    def __init__(self, compile_graph: Callable[..., Any]) -> None:
        self.compile_graph = compile_graph
        self.__name__ = getattr(compile_graph, "__name__", type(compile_graph).__name__)
        # By `id` of a tensor, or of the one without memory that the graph has for it.
        self.labels: dict[int, _Label] = {}
        self.writable: set[int] = set()
        # Holds the tensors, whose `id` would otherwise be given to others.
        self._tensors: list[Tensor] = []

    def add(self, steps: Sequence[Any], writable: Sequence[Tensor]) -> None:
        """Name the tensors of steps that the graph replays.

        Args:
            steps: tuples in the order of `BoundStep`.
            writable: what else goes into the walk and may be written to: the streams before the
                steps, which backward rebuilds, and memory of the library's own.
        """
        self._tensors += writable
        self.writable.update(map(id, writable))
        for name, fn, _, _, _, kwargs, *_ in steps:
            for kind, key, tensor in (*_keyword_tensors(kwargs), *_module_tensors(fn)):
                self._tensors.append(tensor)
                self.labels.setdefault(id(tensor), (name, kind, key))

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        run = self.compile_graph(graph, inputs, **options)
        watched = self._watched(graph)
        return partial(_run, run, watched) if watched else run

    def _watched(self, graph: torch.fx.GraphModule) -> dict[int, _Label]:
        """Return the labels of the inputs that go into a walk, by their place."""
        read: set[torch.fx.Node] = set()
        for node in graph.graph.nodes:
            if getattr(node.target, "__name__", "") == "autograd_function_apply":
                arguments = [node for node in node.args if isinstance(node, torch.fx.Node)]
                # The caller's network may have Functions of its own.
                if any(self._keys(node) & {*self.labels, *self.writable} for node in arguments):
                    read.update(arguments)
        found = {}
        for place, node in enumerate(graph.graph.find_nodes(op="placeholder")):
            keys = self._keys(node)
            label = next((self.labels[key] for key in keys if key in self.labels), None)
            # Numbers are inputs, too, and have no key.
            if node in read and keys and (label is not None or not keys & self.writable):
                found[place] = label or ("a branch", "tensor of a closure or global", node.name)
        return found

    @staticmethod
    def _keys(node: torch.fx.Node) -> set[int]:
        given = getattr(node.meta.get("grapharg"), "example", None)
        return {id(x) for x in (given, node.meta.get("example_value")) if isinstance(x, Tensor)}


def _keyword_tensors(kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    for name, value in kwargs.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield "keyword tensor", name, leaf


def _module_tensors(fn: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for module in fn.modules():
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    yield kind, name, tensor
        for name, value in attributes_of(module)[0].items():
            objects = Objects()
            objects.take_keywords({name: value})
            for state in objects.tensors.values():
                if state.original is not None:
                    yield "attribute", name, state.original


def _run(run: Callable[..., Any], watched: Mapping[int, _Label], *inputs: Any) -> Any:
    """Call a compiled graph, and have its backward compare the versions of inputs."""
    pairs = [(inputs[place], label) for place, label in watched.items()]
    # Nothing outside of inference mode writes to a tensor that was made in it.
    versions = [counted_writes(tensor) for tensor, _ in pairs]
    outputs = run(*inputs)
    nodes = {x.grad_fn for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None}
    check = partial(_check, pairs, versions)
    for node in nodes:
        node.register_prehook(check)
    return outputs


def _check(pairs: Sequence[tuple[Tensor, _Label]], versions: Sequence[int], _: Any) -> None:
    for (tensor, label), version in zip(pairs, versions, strict=True):
        if counted_writes(tensor) != version:
            raise ReversibleError(changed_message(*label))
