"""Material Design Icons: 7,000 icons with names such as "book clock outline".

They are drawn from a font file. The font (Apache License 2.0) and its list of names are files of
the Python package qtawesome; nothing of it is run.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from revnet.app.data.codecs import Array, codecs
from revnet.app.data.examples import Images
from revnet.app.errors import UserError

SIZE = 24
HELD_OUT = 400
DEFAULTS = {"depth": 4, "dropout": 0.1, "batch": 32, "steps": 2000}


def _files() -> tuple[Path, Path]:
    """Return the newest font and its list of names."""
    found = importlib.util.find_spec("qtawesome")
    if found is None or found.origin is None:
        raise UserError("the icons come with the package qtawesome: pip install 'revnet[icons]'")
    fonts = Path(found.origin).parent / "fonts"
    found_fonts, found_names = (
        sorted(fonts.glob(f"materialdesignicons6-*.{kind}")) for kind in ("ttf", "json")
    )
    if not found_fonts or not found_names:
        raise UserError(f"there is no materialdesignicons6 font in {fonts}: install qtawesome 1.4")
    return found_fonts[-1], found_names[-1]


def _draw() -> tuple[list[str], Array]:
    """Draw the icons (n, 24, 24, 1), uint8; return their names, in order, and them."""
    from PIL import Image, ImageDraw, ImageFont

    font_path, names_path = _files()
    font = ImageFont.truetype(str(font_path), SIZE)
    codes = json.loads(names_path.read_text(encoding="utf-8"))
    names = sorted(codes)
    images = []
    for name in names:
        page = Image.new("L", (SIZE, SIZE), "white")
        ImageDraw.Draw(page).text(
            (SIZE / 2, SIZE / 2), chr(int(codes[name], 16)), fill=0, font=font, anchor="mm"
        )
        images.append(np.asarray(page))
    return names, np.stack(images)[..., None]


def hold_out(names: list[str], images: Array, count: int) -> dict[str, Array]:
    """Hold whole combinations of words out whose words all occur in training names.

    No training icon has the same words in another order, or the same drawing.
    """
    words = [frozenset(name.split("-")) for name in names]
    left = Counter(word for several in words for word in several)
    combinations = Counter(words)
    drawings = Counter(image.tobytes() for image in images)
    held_out: list[int] = []
    for i in np.random.default_rng(0).permutation(len(names)):
        alone = combinations[words[i]] == 1 and drawings[images[i].tobytes()] == 1
        if (
            len(held_out) < count
            and len(words[i]) > 1
            and alone
            and all(left[word] > 1 for word in words[i])
        ):
            held_out.append(int(i))
            left.subtract(words[i])
    return {"train": np.setdiff1d(np.arange(len(names)), held_out), "held_out": np.array(held_out)}


def load(spec: dict[str, Any] | None = None) -> Images:
    """Return 24×24 icons as 144 tokens, each one of 256 patches of 2×2 pixels."""
    names, images = _draw()
    captions = [[name.replace("-", " ")] for name in names]
    splits = hold_out(names, images, HELD_OUT)
    words, patches = codecs(spec, captions, images, patch=2, vocab=256)
    return Images(
        name="icons",
        captions=captions,
        load=images.__getitem__,
        splits=splits,
        words=words,
        patches=patches,
        show=[captions[i][0] for i in splits["held_out"][:12]],
    )
