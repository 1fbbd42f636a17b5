"""Check what the files of a run say, field by field, before anything is made of it.

A run folder may be damaged, or come from somebody else. Its JSON files are data, and here are the
types and ranges of all that is used of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from revnet.app.config import MOST, MOST_PARAMETERS, SERVICES, TrainConfig
from revnet.app.data import START, Array
from revnet.app.errors import UserError
from revnet.app.model import Shape

MOST_PIXELS = 2**26
# Changes with the fields of config.json, or with what they mean.
FORMAT = "revnet run 3"


@dataclass(frozen=True)
class Rule:
    """What a field must be, in words and as a function."""

    expected: str
    accepts: Callable[[Any], bool]


def whole(least: int, most: int) -> Rule:
    """Return the rule of integers in a range."""

    def accepts(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    return Rule(f"an integer from {least:,} to {most:,}", accepts)


def number(least: float = -math.inf, most: float = math.inf) -> Rule:
    """Return the rule of finite numbers in a range."""

    def accepts(value: Any) -> bool:
        # A float cannot hold every integer of JSON.
        if type(value) not in (int, float) or abs(value) >= 2.0**1023:
            return False
        return math.isfinite(value) and least <= value <= most

    return Rule("a finite number in its range", accepts)


def list_of(rule: Rule, least: int, most: int) -> Rule:
    """Return the rule of lists of one kind and of a length in a range."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list) or not least <= len(value) <= most:
            return False
        return all(rule.accepts(entry) for entry in value)

    return Rule(f"a list of {least:,} to {most:,} entries, each {rule.expected}", accepts)


def optional(rule: Rule) -> Rule:
    """Return the rule of what may be null."""
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.accepts(value))


def _is_unicode(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


TEXT = Rule("a text", _is_unicode)
# Names of files need not be UTF-8.
PATH = Rule("the name of a file", _is_path)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
LIST = Rule("a list", lambda value: isinstance(value, list))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def _is_name(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        return False
    # Services make names of files of it.
    return value.isprintable() and not set("/\\") & set(value)


def _are_names(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(key in SERVICES and _is_name(name) for key, name in value.items())


NAMES = Rule("an object of names of the run by services", _are_names)


def check_fields(where: Path, found: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise unless every field of the rules is there and as its rule says."""
    for name, rule in rules.items():
        if name not in found:
            raise damaged(where, f"it has no {name!r}")
        if not rule.accepts(found[name]):
            raise damaged(where, f"{name} is {shorten(repr(found[name]))}, not {rule.expected}")


def damaged(where: Path, reason: str) -> UserError:
    """Return the error that says what is wrong with a file."""
    return UserError(f"cannot read {where}: {reason}. It is damaged, or not this program's.")


def shorten(text: str, most: int = 60) -> str:
    """Return a text, or its beginning and an ellipsis where it is longer."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _config_rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {"data": list_of(PATH, 1, 2**20), "shape": OBJECT}
    rules["out"] = optional(PATH)
    rules["format"] = Rule(f"{FORMAT!r}", FORMAT.__eq__)
    rules["versions"] = OBJECT
    rules["command"] = list_of(PATH, 0, 2**20)
    rules["tracked"] = NAMES
    kinds = {
        # Their ranges are those of the command line, which `TrainConfig` checks.
        "int": whole(0, 2**53),
        "float": number(),
        "str": TEXT,
        "bool": FLAG,
    }
    for item in fields(TrainConfig):
        if item.name in rules:
            continue
        rule = kinds[str(item.type)]
        if item.metadata["choices"]:
            choices = tuple(item.metadata["choices"])
            rule = Rule(f"one of {', '.join(choices)}", choices.__contains__)
        rules[item.name] = optional(rule) if item.name in ("memory", "threads") else rule
    return rules


SIDE = 2**13
SHAPE_RULES = {
    "depth": whole(1, MOST["depth"]),
    "width": whole(1, MOST["width"]),
    "heads": whole(1, MOST["heads"]),
    "prefix_vocab": whole(1, 2**20),
    "prefix_length": whole(1, 2**16),
    "vocab": whole(1, MOST["codes"]),
    "rows": whole(1, MOST["context"]),
    "columns": whole(1, SIDE),
    "dropout": number(0, 1),
    "ngrams": whole(1, 64),
}


def _version_in(found: Mapping[str, Any]) -> str:
    """Return the version that wrote a configuration, where it says so."""
    versions = found.get("versions")
    version = versions.get("revnet") if isinstance(versions, dict) else None
    return f", {shorten(version)}" if isinstance(version, str) else ""


def parse_config(where: Path, found: dict[str, Any]) -> tuple[TrainConfig, Shape]:
    """Return what config.json says, after checks."""
    rules = _config_rules()
    if found.get("format") != FORMAT:
        raise UserError(
            f"cannot read {where}: it is not of the format {FORMAT!r}. The run is of another "
            f"version of revnet{_version_in(found)}, or its config.json is damaged."
        )
    for name in found:
        if name not in rules:
            raise damaged(where, f"it has an unknown field {shorten(repr(name))}")
    # A choice must be a text to be looked up.
    for name, rule in rules.items():
        if rule.expected.startswith("one of") and not isinstance(found.get(name, ""), str):
            raise damaged(where, f"{name} is no text")
    check_fields(where, found, rules)
    check_fields(where, found["shape"], SHAPE_RULES)
    try:
        config = TrainConfig(**{item.name: found[item.name] for item in fields(TrainConfig)})
    except UserError as error:
        raise damaged(where, str(error)) from None
    shape = Shape(**{item.name: found["shape"][item.name] for item in fields(Shape)})
    for name in ("depth", "width", "heads", "dropout"):
        if getattr(config, name) != getattr(shape, name):
            raise damaged(where, f"it has two values of {name}")
    if shape.width % (4 * shape.heads):
        raise damaged(where, f"the width {shape.width} is not a multiple of 4 x {shape.heads}")
    if 12 * shape.depth * shape.width**2 > MOST_PARAMETERS or shape.length > MOST["context"]:
        raise damaged(where, "the network is larger than any")
    return config, shape


DATA_RULES = {
    "kind": Rule("'images' or 'text'", lambda value: value in ("images", "text")),
    "name": Rule("a text", lambda value: isinstance(value, str)),
    "show": list_of(TEXT, 1, 1000),
    "fingerprint": TEXT,
}
IMAGE_RULES = {
    "words": list_of(TEXT, 0, 2**16),
    "caption_length": whole(1, 2**16),
    "codes": LIST,
    "rows": whole(1, SIDE),
    "columns": whole(1, SIDE),
}


def check_data(where: Path, found: dict[str, Any], shape: Shape) -> None:
    """Raise unless data.json describes data of the network's shape."""
    check_fields(where, found, DATA_RULES)
    says = {"rows": shape.rows, "columns": 1, "vocab": 256, "prefix_length": 1}
    says["prefix_vocab"] = START + 1
    if found["kind"] == "images":
        check_fields(where, found, IMAGE_RULES)
        says = image_shape(found, parse_codes(where, found["codes"]))
        side = math.isqrt(MOST_PIXELS)
        if found["rows"] * found["columns"] > MOST_PIXELS or found["rows"] > side:
            raise damaged(where, "its images are too large")
    network = asdict(shape)
    for name, value in says.items():
        if network[name] != value:
            raise damaged(where, f"its {name} is {value}, but {network[name]} in config.json")


def image_shape(spec: Mapping[str, Any], codes: Array) -> dict[str, int]:
    """Return the sizes of a network that images of a specification have."""
    from revnet.app.data import FIRST_WORD

    return {
        "prefix_vocab": FIRST_WORD + len(spec["words"]),
        "prefix_length": spec["caption_length"],
        "vocab": len(codes),
        "rows": spec["rows"],
        "columns": spec["columns"],
    }


def parse_codes(where: Path, codes: Any) -> Array:
    """Return a code book (codes, patch, patch, 1 or 3), uint8, after checks."""
    try:
        found = np.array(codes)
    except (ValueError, OverflowError, RecursionError):
        raise damaged(where, "codes are no regular lists of numbers") from None
    good = found.dtype.kind in "iu" and found.ndim == 4 and found.size > 0
    if not good or found.min() < 0 or found.max() > 255:
        raise damaged(where, "codes are not patches of numbers from 0 to 255")
    _, height, width, channels = found.shape
    if height != width or channels not in (1, 3):
        raise damaged(where, "codes are not square patches of 1 or 3 channels")
    return found.astype(np.uint8)


def check_metrics(where: Path, rows: list[Any]) -> None:
    """Raise unless each row of metrics.jsonl has a step and otherwise numbers."""
    step, seconds = whole(0, 2**53), number(0, 1e15)
    for line, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise damaged(where, f"line {line} is no object")
        check_fields(where, row, {"step": step})
        if "seconds" in row:
            check_fields(where, row, {"seconds": seconds})
        for name, value in row.items():
            # A loss that has become infinite is logged as it is.
            if type(value) is not float and not whole(-(2**62), 2**62).accepts(value):
                raise damaged(where, f"line {line}: {shorten(name)} is no number")
