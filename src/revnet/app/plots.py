"""The pictures of a run: its loss and a grid of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from revnet.app.data import Array
from revnet.app.run import replacing


def figure(width: float = 7.0, height: float = 4.0) -> Any:
    """An empty matplotlib figure that needs no display."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(plot: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    with replacing(path) as file:
        plot.savefig(file, format="png")


def loss_plot(path: Path, rows: Sequence[dict[str, Any]], unit: str) -> None:
    """Training and held-out loss against the step, from the rows of metrics.jsonl."""
    plot = figure()
    axes = plot.add_subplot()
    training = [(row["step"], row["bits"]) for row in rows if "bits" in row]
    held_out = [(row["step"], row["held_out_bits"]) for row in rows if "held_out_bits" in row]
    if training:
        axes.plot(*zip(*training, strict=True), color="#9ab8d8", linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c0392b", marker="o", markersize=3, label="held out")
        axes.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], (6, 0), textcoords="offset points", va="center")
    # The first steps fall from the loss of equal odds; they would flatten everything after them.
    later = [bits for step, bits in training + held_out if step > training[-1][0] * 0.05] if training else []
    if later:
        axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(xlabel="step", ylabel=f"bits per {unit}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(plot, path)


def sample_grid(path: Path, captions: Sequence[str], images: Array, beside: str = "") -> None:
    """One row per caption, its text to the left.

    Args:
        path: The PNG.
        captions: One per row.
        images: (rows, columns, height, width, channels), uint8; 1 channel is ink on white.
        beside: What to write above the last column, which is then set apart.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns, height, width, channels = images.shape
    zoom = max(1, round(48 / height))
    cell_height, cell_width, gap = height * zoom, width * zoom, 6
    font = ImageFont.load_default(size=14)
    label = 12 + max(round(font.getlength(caption)) for caption in captions)
    top = 24 if beside else gap
    apart = 14 if beside else 0
    size = (label + columns * (cell_width + gap) + apart, top + rows * (cell_height + gap))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    if beside:
        draw.text((size[0] - gap, top / 2), beside, fill="#666666", font=font, anchor="rm")
    for i, caption in enumerate(captions):
        y = top + i * (cell_height + gap)
        draw.text((label - 8, y + cell_height / 2), caption, fill="black", font=font, anchor="rm")
        for j in range(columns):
            pixels = images[i, j] if channels == 3 else np.repeat(255 - images[i, j], 3, axis=-1)
            picture = Image.fromarray(pixels).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            page.paste(picture, (label + j * (cell_width + gap) + (apart if j == columns - 1 else 0), y))
    with replacing(path) as file:
        page.save(file, format="png")
