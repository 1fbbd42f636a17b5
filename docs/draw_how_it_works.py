"""Draw the picture of docs/how_it_works.md: `python docs/draw_how_it_works.py`.

One block, forward and backward. The tones show on white and on black.
"""

from __future__ import annotations

from pathlib import Path

GREY, BLUE, ORANGE = "#7d8590", "#3b82f6", "#d97706"
WIDTH, HEIGHT = 720, 370
UPPER, LOWER = 80, 180  # the two streams of the first panel
LEFT, RIGHT = 70, 650
PANEL = 200  # from one panel to the next


def text(x: float, y: float, words: str, colour: str = GREY, anchor: str = "middle") -> str:
    """Return words at a place."""
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return an arrow from the first point to the second."""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2" '
        f'marker-end="url(#{colour[1:]})"/>'
    )


def sign(x: float, y: float, words: str, colour: str) -> list[str]:
    """Return a plus or a minus in a ring."""
    ring = f'<circle cx="{x}" cy="{y}" r="13" fill="none" stroke="{colour}" stroke-width="2"/>'
    return [ring, text(x, y + 6, words, colour)]


def branch(x: float, y: float, name: str, colour: str) -> list[str]:
    """Return the box of a branch."""
    box = (
        f'<rect x="{x - 20}" y="{y - 15}" width="40" height="30" rx="6" fill="none" '
        f'stroke="{colour}" stroke-width="2"/>'
    )
    return [box, text(x, y + 5, name, colour)]


def stream(y: float, at: float, names: tuple[str, str], backward: bool) -> list[str]:
    """Return a stream that the step at `at` updates, between its two names."""
    gap = 15
    if backward:
        lines = [arrow(RIGHT - 5, y, at + gap, y, GREY), arrow(at - gap, y, LEFT + 5, y, GREY)]
    else:
        lines = [arrow(LEFT + 5, y, at - gap, y, GREY), arrow(at + gap, y, RIGHT - 5, y, GREY)]
    return [*lines, text(LEFT - 20, y + 5, names[0]), text(RIGHT + 20, y + 5, names[1])]


def panel(top: float, title: str, symbol: str, backward: bool) -> list[str]:
    """Return one block: f updates the first stream, g the second one."""
    upper, lower, middle = top + UPPER - 30, top + LOWER - 30, top + (UPPER + LOWER) / 2 - 30
    f, g = 240, 480
    return [
        text(LEFT - 30, top + 22, title, anchor="start"),
        *stream(upper, f, ("x1", "y1"), backward),
        *stream(lower, g, ("x2", "y2"), backward),
        arrow(f, lower, f, middle + 17, BLUE),
        *branch(f, middle, "f", BLUE),
        arrow(f, middle - 15, f, upper + 15, BLUE),
        *sign(f, upper, symbol, BLUE),
        arrow(g, upper, g, middle - 17, ORANGE),
        *branch(g, middle, "g", ORANGE),
        arrow(g, middle + 15, g, lower - 15, ORANGE),
        *sign(g, lower, symbol, ORANGE),
    ]


def draw() -> str:
    """Return the picture as SVG."""
    heads = [
        f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for colour in (GREY, BLUE, ORANGE)
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="16">',
        *heads,
        *panel(0, "Forward: only the streams after the last block are kept.", "+", False),
        *panel(PANEL, "Backward: each branch runs once more, and is subtracted.", "−", True),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("how_it_works.svg").write_text(draw(), encoding="utf-8")
