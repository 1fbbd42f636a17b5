"""Draw the picture of docs/long_context.md: `python docs/draw_long_context.py`.

The longest sequence that fits one card of 80 GB against depth, for a network of the 1.2B shape of
benchmarks/long_context.py, by the arithmetic of bytes per token. Points are the measurements on
GPUs, as far off the curve as they are off the arithmetic. The tones show on white and on black.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("_bytes", ROOT / "benchmarks" / "_bytes.py")
_bytes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_bytes)

GIB = 2**30
# What a card of 80 GB leaves to a program, and what a host gives to one GPU.
CARD, HOST = 79 * GIB, 256 * GIB
VOCABULARY, MODEL_WIDTH, HIDDEN, GROUPS, CHUNK_TOKENS = 32768, 2048, 5504, 8, 4096
# While a chunk of the loss goes backward there are its probabilities and two gradients in float32,
# and the weights of the head and their gradient.
CHUNK = 12 * CHUNK_TOKENS * VOCABULARY + (4 + 4 + 2) * VOCABULARY * MODEL_WIDTH
DEPTHS = [2 ** (i / 8) for i in range(8, 65)]

GREY, BLUE, ORANGE, GREEN, RED = "#7d8590", "#3b82f6", "#d97706", "#16a34a", "#dc4a4a"
WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 520, 20, 375
LOWEST, HIGHEST = 1024, 8 * 2**20  # tokens


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        name: in the picture.
        colour: of its curve.
        arms: its names in the reports.
        peak: bytes per token and element in the layers, of a depth.
        kept: those while the loss is computed.
        host: those in host memory.
    """

    name: str
    colour: str
    arms: tuple[str, ...]
    peak: Callable[[float], float]
    kept: Callable[[float], float]
    host: Callable[[float], float] = lambda _: 0.0

    def bytes(self, depth: float, tokens: float) -> float:
        """Return the peak of a step above weights and gradients."""
        elements = tokens * MODEL_WIDTH
        # Beside what is kept there are the hidden states and their gradient.
        return max(self.peak(depth) * elements, (self.kept(depth) + 4) * elements + CHUNK)

    def longest(self, depth: float) -> float:
        """Return the most tokens that fit."""
        room = CARD - weights(depth)
        longest = min(room / self.peak(depth), (room - CHUNK) / (self.kept(depth) + 4))
        if self.host(depth):
            longest = min(longest, HOST / self.host(depth))
        return longest / MODEL_WIDTH


WAYS = (
    Way(
        "reversible, float",
        BLUE,
        ("reversible, float",),
        lambda _: _bytes.reversible("float", GROUPS, 1.0),
        lambda _: 4.0,
    ),
    Way(
        "reversible, fixed",
        ORANGE,
        ("reversible, fixed",),
        lambda _: _bytes.reversible("fixed", GROUPS, 1.0),
        lambda _: 12.0,
    ),
    Way(
        "offloaded (256 GiB of host)",
        GREEN,
        # TRL's has the inputs of two layers on the device at a time.
        ("checkpoint, save_on_cpu",),
        lambda _: _bytes.offloaded(GROUPS, 1.0),
        lambda _: 0.0,
        _bytes.hosted,
    ),
    Way(
        "checkpointed",
        RED,
        ("checkpoint per layer",),
        lambda depth: _bytes.checkpointed(depth, GROUPS, 1.0),
        lambda depth: 2.0 * depth,
    ),
    Way(
        "stored",
        GREY,
        (),
        lambda depth: _bytes.stored(depth, 1.0, HIDDEN / MODEL_WIDTH),
        lambda depth: _bytes.stored(depth, 1.0, HIDDEN / MODEL_WIDTH) - 4,
    ),
)


def weights(depth: float) -> float:
    """Return the bytes of weights and gradients in bfloat16."""
    block = 4 * MODEL_WIDTH**2 + 3 * MODEL_WIDTH * HIDDEN
    return 4 * (depth * block + 2 * VOCABULARY * MODEL_WIDTH)


def measured() -> list[tuple[Way, int, int, float]]:
    """Return the way, blocks, tokens and peak in bytes of each measurement in the reports.

    One block is no depth: what the first and the last one leave out is missing at once.
    """
    found = []
    row = re.compile(r"^\| ([^|]+?) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|", re.MULTILINE)
    for path in sorted((ROOT / "benchmarks" / "results").glob("long_context_h*.md")):
        for part in path.read_text(encoding="utf-8").split("Shape ")[1:]:
            if part.startswith("1.2B"):
                rows = [match.groups() for match in row.finditer(part)]
                found += [
                    (way, int(blocks), int(tokens.replace(",", "")), float(peak) * GIB)
                    for arm, blocks, tokens, peak in rows
                    for way in WAYS
                    if arm in way.arms and int(blocks) > 1
                ]
    return found


def at(depth: float, tokens: float) -> tuple[float, float]:
    """Return the place of a number of blocks and of tokens."""
    x = LEFT + (RIGHT - LEFT) * (math.log2(depth) - 1) / 7
    span = math.log2(HIGHEST / LOWEST)
    return x, BOTTOM - (BOTTOM - TOP) * math.log2(tokens / LOWEST) / span


def text(x: float, y: float, words: str, colour: str = GREY, anchor: str = "middle") -> str:
    """Return words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return a thin line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{GREY}" stroke-opacity="0.25"/>'


def axes() -> list[str]:
    """Return the grid and its numbers."""
    lines = []
    for power in range(1, 9):
        x, _ = at(2**power, LOWEST)
        lines += [line(x, TOP, x, BOTTOM), text(x, BOTTOM + 18, str(2**power))]
    for power in range(10, 23, 2):
        _, y = at(2, 2**power)
        words = f"{2 ** (power - 20)}M" if power >= 20 else f"{2 ** (power - 10)}K"
        lines += [line(LEFT, y, RIGHT, y), text(LEFT - 8, y + 5, words, anchor="end")]
    return [
        *lines,
        text((LEFT + RIGHT) / 2, BOTTOM + 42, "blocks"),
        text(LEFT - 8, 13, "tokens", anchor="end"),
    ]


def curve(way: Way) -> list[str]:
    """Return the curve of a way with its name."""
    places = [at(depth, way.longest(depth)) for depth in DEPTHS]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{points}" fill="none" stroke="{way.colour}" stroke-width="2"/>'
    return [drawn, text(RIGHT + 10, places[-1][1] + 5, way.name, way.colour, "start")]


def point(way: Way, blocks: int, tokens: int, peak: float) -> str:
    """Return the ring of a measurement."""
    x, y = at(blocks, way.longest(blocks) * way.bytes(blocks, tokens) / peak)
    ring = f'cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none"'
    return f'<circle {ring} stroke="{way.colour}" stroke-width="2"/>'


def draw() -> str:
    """Return the picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="14">',
        *axes(),
        *(part for way in WAYS for part in curve(way)),
        *(point(*each) for each in measured()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("long_context.svg").write_text(draw(), encoding="utf-8")
