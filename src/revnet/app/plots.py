"""The pictures of a run: its loss and a grid of its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, BinaryIO

from revnet.app.checks import shorten
from revnet.app.data import Array
from revnet.app.terminal import visible_line

LONGEST_CAPTION = 60


def figure(width: float = 7.0, height: float = 4.0) -> Any:
    """Return an empty matplotlib figure that needs no display."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(plot: Any, file: BinaryIO) -> None:
    """Write a figure as PNG."""
    plot.savefig(file, format="png")


def loss_plot(file: BinaryIO, rows: Sequence[dict[str, Any]], unit: str) -> None:
    """Draw training and held-out loss against the step, from the rows of metrics.jsonl."""
    plot = figure()
    axes = plot.add_subplot()
    training, held_out = _points(rows, "bits"), _points(rows, "held_out_bits")
    if training:
        axes.plot(*zip(*training, strict=True), color="#9ab8d8", linewidth=1, label="training")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color="#c0392b",
            marker="o",
            markersize=3,
            label="held out",
        )
        axes.annotate(
            f"{held_out[-1][1]:.3f}", held_out[-1], (6, 0), textcoords="offset points", va="center"
        )
    # The first steps fall from the loss of equal odds; they would flatten everything after them.
    settled = training[-1][0] * 0.05 if training else math.inf
    later = [bits for step, bits in training + held_out if step > settled]
    if later:
        axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(xlabel="step", ylabel=f"bits per {unit}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if training or held_out:
        axes.legend(frameon=False)
    save_figure(plot, file)


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the steps and values of one quantity; infinite ones have no place in a picture."""
    found = [(row["step"], float(row[name])) for row in rows if name in row]
    return [(step, value) for step, value in found if abs(value) < 1e9]


def sample_grid(
    file: BinaryIO, captions: Sequence[str], groups: Sequence[tuple[str, Array]]
) -> None:
    """Draw one row per caption, its text or the beginning of it to the left.

    Args:
        file: Where the PNG is written.
        captions: One per row.
        groups: Columns that stand together: a heading, and images (rows, columns, height, width,
            channels), uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = groups[0][1].shape[2:4]
    zoom = max(1, round(48 / height))
    high, wide, gap, apart = height * zoom, width * zoom, 6, 18
    font = ImageFont.load_default(size=14)
    captions = [shorten(visible_line(caption[:200]), LONGEST_CAPTION) for caption in captions]
    left = 14 + max(round(font.getlength(caption)) for caption in captions)
    top = 26 if any(heading for heading, _ in groups) else gap
    columns = sum(images.shape[1] for _, images in groups)
    size = (
        left + columns * (wide + gap) + (len(groups) - 1) * apart,
        top + len(captions) * (high + gap),
    )
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        pen.text(
            (left - 8, top + i * (high + gap) + high / 2),
            caption,
            fill="black",
            font=font,
            anchor="rm",
        )
    x = left
    for heading, images in groups:
        pen.text((x, top / 2), heading, fill="#666666", font=font, anchor="lm")
        for column in images.swapaxes(0, 1):
            for i, image in enumerate(column):
                picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
                picture = picture.resize((wide, high), Image.Resampling.NEAREST)
                y = top + i * (high + gap)
                page.paste(picture, (x, y))
                # Most images are white at their edges, as the page is.
                pen.rectangle((x - 1, y - 1, x + wide, y + high), outline="#cccccc")
            x += wide + gap
        x += apart
    page.save(file, format="png")
