"""A folder of images with captions, read as it is needed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from revnet._files import open_file, read_file
from revnet.app.data.codecs import Array, codecs
from revnet.app.data.examples import UTF16_MARKS, Images, digest, files_in, split
from revnet.app.errors import DataError, UserError, count, first_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
IMAGE_COLUMNS = ("file", "file_name", "image", "path")
CAPTION_COLUMNS = ("caption", "text")
# Pillow would choose by content among forty decoders, of which one starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# As many as 8192 × 8192; decoding takes up to 16 bytes for each.
MOST_PIXELS = 2**26
# Pillow keeps an address for each row, and fails in odd ways where a row has many millions.
LONGEST_SIDE = 2**16
LARGEST_FILE = 2**30
CODE_BOOK_IMAGES = 2000
DEFAULTS = {"depth": 4, "dropout": 0.1, "batch": 32, "steps": 2000}


def read_text(path: Path) -> str:
    """Return a caption file or table, UTF-8 or, where it begins with its mark, UTF-16."""
    try:
        content = read_file(path, LARGEST_FILE)
        marked = content[:2] in UTF16_MARKS
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from None
    if "\0" in text:
        raise UserError(f"{path} has zero bytes, as UTF-16 without its mark has. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_image(path: Path, side: int, grey: bool) -> Array:
    """Return the middle square of an image: (side, side, 1 or 3), uint8."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_file(path, LARGEST_FILE) as content, Image.open(content, formats=FORMATS) as file:
            # The size stands at the beginning of a file: nothing has been decoded so far.
            width, height = file.size
            if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
                raise Image.DecompressionBombError
            picture = _flatten(ImageOps.exif_transpose(file))
            picture = ImageOps.fit(
                picture.convert("L" if grey else "RGB"), (side, side), Image.Resampling.BOX
            )
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"the image {path} is too large: at most {MOST_PIXELS:,} pixels and "
            f"{LONGEST_SIDE:,} on a side are read. Scale it down, or remove it."
        ) from error
    except UnidentifiedImageError:
        # Its own message names the file object.
        raise DataError(
            f"the image {path} cannot be decoded: it is none of {', '.join(FORMATS)}. "
            f"Replace it, or remove it."
        ) from None
    except Exception as error:
        # Decoders raise anything when a file is not what it says.
        raise DataError(
            f"the image {path} cannot be decoded: {first_line(error)}. Replace it, or remove it."
        ) from error
    return np.asarray(picture).reshape(side, side, 1 if grey else 3)


def _flatten(picture: Any) -> Any:
    """Return a picture with 8 bits a channel, on white where it was transparent."""
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("its pixels are floats, without a known white")
    if picture.mode.startswith("I"):
        # 16 bits, which Pillow would cut at 255, to white.
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture


def find_captions(folder: Path, images: list[Path]) -> list[list[str]]:
    """Return the captions of each image: from a table, or the lines of its text file."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    captions = _from_table(folder, table, images) if table else _from_files(folder, images)
    missing = [path for path, several in zip(images, captions, strict=True) if not several]
    if missing:
        where = (
            f"a row in {table.name}" if table else f"a file {missing[0].with_suffix('.txt').name}"
        )
        raise UserError(
            f"{count(len(missing), 'image')} without a caption, such as {missing[0]}: it needs "
            f"{where}"
        )
    return captions


def _from_files(folder: Path, images: list[Path]) -> list[list[str]]:
    wanted = {path.with_suffix(".txt"): path for path in images}
    alone = [path for path in files_in(folder) if path.suffix == ".txt" and path not in wanted]
    if alone:
        raise UserError(
            f"{count(len(alone), 'caption file')} without an image, such as {alone[0]}: "
            "a folder of images holds only captions as .txt"
        )
    return [_lines(text) if (text := path.with_suffix(".txt")).is_file() else [] for path in images]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def _from_table(folder: Path, table: Path, images: list[Path]) -> list[list[str]]:
    captions: dict[Path, list[str]] = {path: [] for path in images}
    for number, row in _rows(table):
        name = next((row[key] for key in IMAGE_COLUMNS if row.get(key)), None)
        caption = next((row[key] for key in CAPTION_COLUMNS if row.get(key)), None)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UserError(
                f"{table}, row {number}: needs an image ({', '.join(IMAGE_COLUMNS)}) and a text "
                f"({', '.join(CAPTION_COLUMNS)}), has {', '.join(map(str, row)) or 'nothing'}"
            )
        if folder / name not in captions:
            raise UserError(f"{table}, row {number}: there is no image {folder / name}")
        # JSON can hold half of a surrogate pair, which is no character.
        captions[folder / name].append(caption.encode(errors="replace").decode())
    return list(captions.values())


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(table)
    if table.suffix == ".csv":
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
                if None in row:
                    raise UserError(
                        f"{table}, row {number}: has more columns than the first row: "
                        'put a caption with commas between "quotes"'
                    )
                yield number, row
        except csv.Error as error:
            raise UserError(f"{table} is not a table: {error}") from error
        return
    # str.splitlines knows ends of lines that JSON allows within a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{table}, line {number} is not JSON: {error}") from error
            yield number, row if isinstance(row, dict) else {}


def find_images(folder: Path) -> list[Path]:
    """Return all images of a folder and its subfolders, in order."""
    return [path for path in files_in(folder) if path.suffix.lower() in SUFFIXES]


def load(
    folder: Path,
    images: list[Path],
    side: int,
    patch: int,
    vocab: int,
    grey: bool,
    spec: dict[str, Any] | None,
) -> Images:
    """Return the images of `folder`, scaled to `side` pixels; equal files are in one split.

    The code book is learned from up to 2,000 of them; the others are only read when their turn
    comes.
    """
    if side % patch:
        raise UserError(f"--image-size {side} is not a multiple of --patch {patch}")
    captions = find_captions(folder, images)
    read: Callable[[int], Array] = partial(_read, images, side, grey)
    splits = split([digest(path) for path in images])
    if not len(splits["held_out"]):
        raise UserError(
            f"{folder} holds {count(len(images), 'image')}, all alike: at least two different ones "
            f"are needed"
        )
    sample = np.random.default_rng(0).permutation(splits["train"])[:CODE_BOOK_IMAGES]
    words, patches = codecs(
        spec, captions, lambda: np.stack([read(i) for i in sample]), patch, vocab
    )
    return Images(
        name=folder.resolve().name,
        captions=captions,
        load=read,
        splits=splits,
        words=words,
        patches=patches,
        show=[captions[i][0] for i in splits["held_out"][:12]],
    )


def _read(images: list[Path], side: int, grey: bool, i: int) -> Array:
    return read_image(images[i], side, grey)
