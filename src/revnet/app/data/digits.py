"""The 1,797 handwritten digits of scikit-learn, and an independent reader of generated ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from revnet.app.data.codecs import Array, codecs
from revnet.app.data.examples import Images

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "a {}", "a handwritten {}", "the digit {}", "the number {}")
DEFAULTS = {"depth": 4, "dropout": 0.1, "batch": 32, "steps": 800}


@cache
def _real() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return 255 - np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target


def _split() -> dict[str, Array]:
    order = np.random.default_rng(0).permutation(len(_real()[0]))
    return {"train": order[:-300], "held_out": order[-300:]}


def load(spec: dict[str, Any] | None = None) -> Images:
    """Return 8×8 images in 17 grey levels, a token per pixel; 300 are held out."""
    images, labels = _real()
    captions = [[template.format(NAMES[label]) for template in TEMPLATES] for label in labels]
    words, patches = codecs(spec, captions, images, patch=1, vocab=17)
    return Images(
        name="digits",
        captions=captions,
        load=images.__getitem__,
        splits=_split(),
        words=words,
        patches=patches,
        show=NAMES,
    )


def _features(images: Array) -> Array:
    return images.reshape(len(images), -1).astype(np.float64) / 255


@cache
def _reader() -> tuple[Any, float]:
    from sklearn.svm import SVC

    images, labels = _real()
    split = _split()
    reader = SVC(C=10, gamma="scale").fit(_features(images[split["train"]]), labels[split["train"]])
    return reader, float(
        reader.score(_features(images[split["held_out"]]), labels[split["held_out"]])
    )


def share_read(images: Array, digits: Array) -> tuple[float, float]:
    """Return how well a support vector machine, trained on real digits, reads images.

    Args:
        images: (n, 8, 8, 1), uint8.
        digits: (n,), what the captions said.

    Returns:
        The share of `images` that it reads as the caption says, and of the real held-out digits
        that it reads right.
    """
    reader, accuracy = _reader()
    return float((reader.predict(_features(images)) == digits).mean()), accuracy
