"""Writes the table of converted models to docs/ecosystem.md: `python tests/conversion_table.py`."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

import revnet
from ecosystem import CASES, Case

DOCS = Path(__file__).parent.parent / "docs" / "ecosystem.md"
BEGIN, END = "<!-- conversion table: tests/conversion_table.py -->", "<!-- end -->"


def row(case: Case) -> str:
    torch.manual_seed(0)
    model = case.make().eval()
    conversion = revnet.convert(model)
    batch = case.batch()
    for _ in range(2):
        model(**batch)
    stacks, outside = [], []
    for stack in conversion.stacks:
        stacks.append(f"`{stack.name}` ({len(stack.layers) - len(stack.outside)} × {stack.kind})")
        for place, reason in stack.outside.items():
            outside.append(f"`{stack.layers[place]}`: {reason.removeprefix('it ').split(',')[0]}")
        if "alone" in stack.warned:
            outside.append(f"`{stack.name}`: nothing is saved, each layer begins anew")
    return f"| {case.name} | {'; '.join(stacks)} | {'; '.join(outside)} |"


def table() -> str:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    libraries = ("torch", "transformers", "timm", "diffusers", "torchvision")
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in libraries)
    rows = ["| model | stacks found | left as they are |", "|---|---|---|", *map(row, CASES)]
    return "\n".join([BEGIN, f"Checked with {versions}:", "", *rows, END])


if __name__ == "__main__":
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if rest else "\n"
    DOCS.write_text(before + table() + after)
