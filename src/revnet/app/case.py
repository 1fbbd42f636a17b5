"""A network and one batch for it, on which `revnet compare` and `revnet plan` measure."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

import revnet
from revnet.app.config import DTYPES, MOST, STREAMS, heads_of, width_of
from revnet.app.device import find_device
from revnet.app.errors import UserError, check_least, check_most
from revnet.app.model import Shape, Transformer
from revnet.app.run import Run

VOCAB = 256


@dataclass
class Case:
    """Sizes, and where they run.

    Args:
        shape: The network; one over bytes unless it is that of a run.
        batch: Examples per step.
        device: Where; "meta" allocates nothing.
        dtype, streams: As for `revnet train`.
    """

    shape: Shape
    batch: int
    device: torch.device
    dtype: str
    streams: str

    def of_depth(self, depth: int) -> Case:
        """Return the same with another number of blocks."""
        return replace(self, shape=replace(self.shape, depth=depth))

    def network(self) -> Transformer:
        """Return an untrained network without dropout.

        Its head does not hide the gradient, as that of a new network does.
        """
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Transformer(replace(self.shape, dropout=0.0), streams=self.streams)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        # Autocast has no rules for a device that computes nothing.
        if self.device.type == "meta" and self.dtype == "bfloat16":
            model.bfloat16()
        return model

    def example(self) -> tuple[Tensor, Tensor]:
        """Return prefix and tokens of one batch."""
        prefix = torch.ones(
            self.batch, self.shape.prefix_length, dtype=torch.int64, device=self.device
        )
        return prefix, torch.randint(
            self.shape.vocab, (self.batch, self.shape.length), device=self.device
        )

    def precision(self) -> torch.autocast:
        """Return the autocast of `dtype`."""
        low = self.dtype == "bfloat16" and self.device.type != "meta"
        return torch.autocast(self.device.type if low else "cpu", torch.bfloat16, enabled=low)

    def make_plans(self, model: Transformer, budgets: list[str | int | None]) -> list[revnet.Plan]:
        """Make a plan for each budget of the network's blocks."""
        prefix, tokens = self.example()
        x, keywords = model.embed(prefix, tokens[:, :-1])
        try:
            with self.precision():
                found: list[revnet.Plan] = revnet.plan(
                    model.layers, x.detach(), cast(Any, budgets), **keywords
                )
                return found
        except (revnet.ReversibleError, ValueError) as error:
            raise UserError(str(error)) from error

    def __str__(self) -> str:
        shape, device = self.shape, self.device
        threads = torch.get_num_threads()
        where = device.type
        if device.type == "cpu":
            where = f"{threads} {'thread' if threads == 1 else 'threads'} of {platform.machine()}"
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        tokens = shape.prefix_length - 1 + shape.length
        return (
            f"depth {shape.depth}, width {shape.width}, {tokens} tokens, batch {self.batch}, "
            f"{self.dtype}, {where}"
        )


def find_case(
    run: str | None,
    depth: int | None,
    width: int | None,
    tokens: int | None,
    batch: int | None,
    device: str,
    dtype: str | None,
    streams: str | None,
) -> Case:
    """Return the sizes that are given, and for the others those of a run or the usual ones."""
    # Only plans are made for "meta", which computes nothing.
    place = torch.device("meta") if device == "meta" else find_device(device)
    for name, value in (("depth", depth), ("width", width), ("tokens", tokens), ("batch", batch)):
        if value is not None:
            check_least(name, value, 1)
            check_most(name, value, MOST.get(name, 2**24))
    if run is not None:
        for name, value in (("width", width), ("tokens", tokens)):
            if value is not None:
                raise UserError(
                    f"--{name} {value}: {run} has its own; leave it out, or leave out the run"
                )
        opened = Run.open(run)
        config, shape = opened.read_config()
        opened.check_weights(shape)
        how = dtype or config.dtype, streams or config.streams
        case = Case(shape, batch or config.batch, place, *how)
        return case if depth is None else case.of_depth(depth)
    depth, tokens = depth or 12, tokens or 256
    width = width or width_of(depth)
    heads = heads_of(width)
    if width % (4 * heads):
        raise UserError(f"--width {width} is not a multiple of {4 * heads}")
    return Case(
        Shape(depth, width, heads, 2, 1, VOCAB, tokens, 1),
        batch or 4,
        place,
        dtype or DTYPES[0],
        streams or STREAMS[0],
    )
