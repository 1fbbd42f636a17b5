"""The pictures of a run: its loss and a grid of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revnet.app.data import Array
from revnet.app.run import new_file


def figure(width: float = 7.0, height: float = 4.0) -> Any:
    """An empty matplotlib figure that needs no display."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(plot: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    with new_file(path) as file:
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
    later = (
        [bits for step, bits in training + held_out if step > training[-1][0] * 0.05]
        if training
        else []
    )
    if later:
        axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(xlabel="step", ylabel=f"bits per {unit}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if training or held_out:
        axes.legend(frameon=False)
    save_figure(plot, path)


def sample_grid(path: Path, captions: Sequence[str], groups: Sequence[tuple[str, Array]]) -> None:
    """One row per caption, its text to the left.

    Args:
        path: The PNG.
        captions: One per row.
        groups: Columns that stand together: a heading, and images (rows, columns, height, width,
            channels), uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = groups[0][1].shape[2:4]
    zoom = max(1, round(48 / height))
    high, wide, gap, apart = height * zoom, width * zoom, 6, 18
    font = ImageFont.load_default(size=14)
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
                page.paste(picture, (x, top + i * (high + gap)))
            x += wide + gap
        x += apart
    with new_file(path) as file:
        page.save(file, format="png")
