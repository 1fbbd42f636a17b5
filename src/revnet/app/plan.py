"""`revnet plan`: the fastest executions for a memory budget, on this machine or another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import revnet
from revnet._sizes import format_bytes, parse_bytes
from revnet.app.case import Case
from revnet.app.errors import UserError
from revnet.app.plots import figure, save_figure
from revnet.app.terminal import Output, visible
from revnet.app.writing import new_file, writing

# Of the way from the smallest possible peak to that of stored execution.
CURVE = ("minimum", "3%", "7%", "12%", "20%", "30%", "45%", "60%", "80%", "stored")
# A parameter, its gradient, and the two averages of AdamW, float32.
BYTES_PER_PARAMETER = 16


def show_plan(case: Case, memory: str | None, device_memory: str | None, out: str | None) -> int:
    """Print the plan for a budget, and draw time against memory.

    Args:
        case: The network and its batch.
        memory: The budget for activations, above weights, gradients and optimizer state, as for
            `revnet.plan`.
        device_memory: The size of a device that holds parameters, gradients and AdamW's averages
            besides, as "80GiB".
        out: A PNG; the plan itself is saved as JSON beside it.
    """
    path = Path(out or "plan.png")
    if path.suffix != ".png":
        raise UserError(
            f"--out {path}: give a file that ends in .png; the plan is saved beside it as .json"
        )
    output = Output(sys.stdout, "cannot show the plan, but go on and save it")

    def say(text: str) -> None:
        output.write(f"{visible(text)}\n")
        output.flush()

    model = case.network()
    budget: str | int | None = memory
    if device_memory is not None:
        whole = _parse_size(device_memory)
        state = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in model.parameters())
        if state >= whole:
            raise UserError(
                f"parameters, gradients and AdamW's averages alone take {format_bytes(state)} "
                f"of {device_memory}: take a smaller --depth or --width, or shard them"
            )
        say(f"{format_bytes(state)} for parameters, gradients and AdamW's averages")
        budget = whole - state
    elif memory is None and case.device.type == "meta":
        raise UserError(
            "--meta plans for another device: say what it has with --device-memory, or give "
            "--memory"
        )
    chosen, *curve = case.make_plans(model, [budget, *CURVE])
    say(f"{case}\n{chosen}")
    with new_file(path) as file:
        _plot_curve(file, chosen, curve, str(case))
    with writing(path.with_suffix(".json")):
        chosen.save(path.with_suffix(".json"))
    say(f"\nSaved {path} and {path.with_suffix('.json')}")
    return 0


def _parse_size(size: str) -> int:
    """Return the bytes of a text such as "80GiB"."""
    try:
        return parse_bytes(size)
    except ValueError:
        raise UserError(f"--device-memory {size}: write a number and a unit, as in 80GiB") from None


def _plot_curve(
    file: BinaryIO, chosen: revnet.Plan, curve: Sequence[revnet.Plan], title: str
) -> None:
    plot = figure(6.5, 4.0)
    axes = plot.add_subplot()
    axes.plot(
        [p.peak_bytes / 2**20 for p in curve], [p.slowdown for p in curve], marker="o", markersize=4
    )
    axes.plot(
        chosen.peak_bytes / 2**20,
        chosen.slowdown,
        "*",
        markersize=14,
        color="#c0392b",
        label="this plan",
    )
    axes.set(
        xlabel="peak of activations of the blocks (MiB)",
        ylabel="predicted time / stored",
        xlim=(0, None),
    )
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(plot, file)
