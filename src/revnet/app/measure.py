"""Measure what a training step needs in memory and loses in precision, under each execution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet
from revnet.app.model import Transformer


class _Checkpointed(nn.Module):
    """The blocks of a sequence under `torch.utils.checkpoint`, one by one."""

    def __init__(self, sequence: revnet.ReversibleSequence) -> None:
        super().__init__()
        self.blocks, self.args_route = sequence.blocks, sequence.args_route

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        routed = revnet.route_args(self.args_route, keywords, len(self.blocks))
        x1 = x2 = x
        for block, (f_args, g_args) in zip(self.blocks, routed, strict=True):
            x1, x2 = checkpoint(_block, block, x1, x2, f_args, g_args, use_reentrant=False)
        return (x1 + x2) / 2


class _LeftOut(nn.Module):
    """No blocks."""

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        return x


def _block(block: Any, x1: Tensor, x2: Tensor, f_args: Any, g_args: Any) -> tuple[Tensor, Tensor]:
    y1 = x1 + block.f(x2, **f_args)
    return y1, x2 + block.g(y1, **g_args)


@contextmanager
def executed(model: Transformer, execution: Any) -> Iterator[None]:
    """Run the network as "stored", as "checkpointed" by torch, or with one of the library.

    "none" leaves the blocks out: what remains are the embeddings, the head and the loss.
    """
    layers: Any = model.layers
    before = layers.execution
    try:
        if execution == "checkpointed":
            model.layers = _Checkpointed(layers)  # type: ignore[assignment]
        elif execution == "none":
            model.layers = _LeftOut()  # type: ignore[assignment]
        else:
            layers.execution = "store" if execution == "stored" else execution
        yield
    finally:
        model.layers = layers
        layers.execution = before


def step_memory(model: Transformer, loss: Callable[[], Tensor]) -> revnet.MemoryReport:
    """Measure the activations of one forward and backward.

    They are what is allocated above parameters, gradients and the optimizer's state. Gradients stay
    as they are.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    try:
        return revnet.measure_memory(loss)
    finally:
        for parameter, grad in zip(model.parameters(), gradients, strict=True):
            parameter.grad = grad


@torch.no_grad()
def reconstruction_error(model: Transformer, prefix: Tensor, tokens: Tensor) -> float:
    """Return the largest error of the first block's input when it is computed from the output.

    It is relative to the largest value of the streams; without dropout.
    """
    training = model.training
    model.eval()
    x, keywords = model.embed(prefix, tokens[:, :-1])
    rebuilt = model.layers.inverse(*model.layers.run(x, x, **keywords), **keywords)
    model.train(training)
    return max(float((stream - x).abs().max()) for stream in rebuilt) / float(x.abs().max())
