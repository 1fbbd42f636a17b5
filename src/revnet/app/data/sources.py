"""Which data set the words after `revnet train` mean."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from revnet.app.config import TrainConfig
from revnet.app.data import corpus, digits, folder, icons
from revnet.app.data.examples import Data
from revnet.app.errors import UserError, meant

SETS = ("digits", "icons", "stdlib")
# Which options are for which data; elsewhere they would do nothing.
IMAGE_OPTIONS = ("image_size", "patch", "codes", "grey")
TEXT_OPTIONS = ("context",)


def check_options(config: TrainConfig, given: Iterable[str], data: Data) -> None:
    """Raise where an option was given that the data do not know."""
    own_images = data.spec["kind"] == "images" and config.data[0] not in SETS
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if name in IMAGE_OPTIONS and not own_images:
            raise UserError(f"{flag} is for a folder of your own images, which {data.name} is not")
        if name in TEXT_OPTIONS and data.spec["kind"] != "text":
            raise UserError(f"{flag} is for texts, which {data.name} is not")


def absolute(names: list[str]) -> list[str]:
    """Return data sets by their names, and files and folders by paths that hold from anywhere."""
    if len(names) == 1 and names[0] in SETS:
        return names
    return [os.path.abspath(name) for name in names]


def load(config: TrainConfig, spec: dict[str, Any] | None = None) -> tuple[Data, dict[str, Any]]:
    """Return the data of a run and the options that follow from it.

    Args:
        config: The run.
        spec: What an earlier part of the same run learned from the same data.
    """
    names = config.data
    sets = [name for name in names if name in SETS and not Path(name).exists()]
    if len(names) > 1 and sets:
        verb = "is a data set" if len(sets) == 1 else "are data sets"
        raise UserError(
            f"{' and '.join(sets)} {verb}: give one data set alone, or files and folders"
        )
    if len(names) == 1 and names[0] in SETS:
        if names[0] == "digits":
            return digits.load(spec), digits.DEFAULTS
        if names[0] == "icons":
            return icons.load(spec), icons.DEFAULTS
        return corpus.Corpus("stdlib", corpus.standard_library(), config.context), corpus.DEFAULTS
    paths = [Path(name) for name in names]
    for path in paths:
        if not path.exists():
            raise UserError(
                f"there is no file or folder {path} (and the data sets are digits, icons and "
                f"stdlib).{meant(str(path), SETS)}"
            )
    images = [image for path in paths if path.is_dir() for image in folder.find_images(path)]
    images += [path for path in paths if path.suffix.lower() in folder.SUFFIXES]
    if images:
        if len(paths) > 1 or not paths[0].is_dir():
            raise UserError(f"{images[0]} is an image: give one folder of images, or only texts")
        options = (config.image_size, config.patch, config.codes, config.grey)
        return folder.load(paths[0], images, *options, spec), folder.DEFAULTS
    texts = corpus.find_texts(paths)
    if not texts:
        raise UserError(f"{' '.join(names)} holds neither images nor texts")
    name = paths[0].resolve().stem if len(paths) == 1 else "texts"
    return corpus.Corpus(name, texts, config.context), corpus.DEFAULTS
