"""Data sets, and batches in an order that any number of processes can share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from revnet._files import open_file
from revnet.app.data.codecs import Array, Patches, Words
from revnet.app.errors import UserError

# What a UTF-16 text may begin with.
UTF16_MARKS = b"\xff\xfe", b"\xfe\xff"


class Data(Protocol):
    """A data set that is split for training and validation."""

    name: str

    @property
    def unit(self) -> str:
        """Return what a token is called."""

    @property
    def shape(self) -> dict[str, int]:
        """Return the sizes of a `Shape` that follow from the data."""

    @property
    def spec(self) -> dict[str, Any]:
        """Return all that sampling needs to know, as JSON."""

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of examples in each split, "train" and "held_out"."""

    def batch(self, split: str, indices: Array, draws: Array) -> tuple[Array, Array]:
        """Return prefix (n, prefix_length) and tokens (n, length), int64, at `indices`.

        draws: (n,) in [0, 1), the free choices of an example, such as one caption of several.
        """


@dataclass
class Images:
    """Captioned images.

    Args:
        name: What the run is called.
        captions: One or more captions for each image.
        load: Gives image i as (height, width, channels), uint8.
        splits: Image numbers for "train" and "held_out".
        words, patches: The codecs.
        show: Captions for the grid of samples.
    """

    name: str
    captions: Sequence[Sequence[str]]
    load: Callable[[int], Array]
    splits: dict[str, Array]
    words: Words
    patches: Patches
    show: Sequence[str]
    unit = "image token"

    @property
    def shape(self) -> dict[str, int]:
        """Return the sizes of captions and of the grid of patches."""
        return {
            "prefix_vocab": self.words.vocab,
            "prefix_length": self.words.length,
            "vocab": self.patches.vocab,
            "rows": self.patches.rows,
            "columns": self.patches.columns,
        }

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of images in each split."""
        return {split: len(numbers) for split, numbers in self.splits.items()}

    @property
    def fingerprint(self) -> str:
        """Return a text that changes with the captions and with the split."""
        parts = [self.captions[i] for numbers in self.splits.values() for i in numbers]
        return hashlib.sha256(json.dumps([self.counts, parts]).encode()).hexdigest()

    @property
    def spec(self) -> dict[str, Any]:
        """Return the codecs, as JSON."""
        return {
            "kind": "images",
            "name": self.name,
            "words": self.words.words,
            "caption_length": self.words.length,
            "codes": self.patches.codes.tolist(),
            "rows": self.patches.rows,
            "columns": self.patches.columns,
            "show": list(self.show),
            "fingerprint": self.fingerprint,
        }

    def batch(self, split: str, indices: Array, draws: Array) -> tuple[Array, Array]:
        """Return captions and images as tokens."""
        numbers = self.splits[split][indices]
        captions = [
            self.captions[i][int(draw * len(self.captions[i]))]
            for i, draw in zip(numbers, draws, strict=True)
        ]
        return self.words.encode(captions), self.patches.encode(
            np.stack([self.load(i) for i in numbers])
        )


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, in order, less those with hidden names.

    Raises:
        UserError: a subfolder cannot be read, so that nothing is missed without a word.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot read the folder {error.filename}: {error.strerror}. Make it readable, or "
            f"choose another."
        ) from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return sorted(found)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(keys: Sequence[str], share: float = 0.05, most: int = 1000) -> dict[str, Array]:
    """Hold out some of the examples, never one of two with the same key.

    Args:
        keys: One for each example, a digest of its content. Which are held out follows from them
            alone.
        share: How much is held out; at least one key, and none of a single key.
        most: How many keys are held out at most.
    """
    different = sorted(set(keys))
    held_out = (
        set(different[: min(most, max(1, round(share * len(different))))])
        if len(different) > 1
        else set()
    )
    return {
        "train": np.array([i for i, key in enumerate(keys) if key not in held_out], dtype=np.int64),
        "held_out": np.array([i for i, key in enumerate(keys) if key in held_out], dtype=np.int64),
    }


def step_batch(
    data: Data, step: int, size: int, seed: int, rank: int = 0, world: int = 1
) -> tuple[Array, Array]:
    """Return the training examples of one step.

    This is a pure function, so that a resumed run reads what it would have read.
    The `size` examples of a step are dealt to the ranks; each epoch visits every example once, in
    its own order.
    """
    count = data.counts["train"]
    places = np.arange(step * size, (step + 1) * size)
    indices = np.array(
        [_order(count, seed, int(place) // count)[place % count] for place in places]
    )
    draws = np.random.default_rng([seed, step]).random(size)
    return data.batch("train", indices[rank::world], draws[rank::world])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Array:
    return np.random.default_rng([seed, epoch]).permutation(count)
