"""Text as bytes, read from its files as it is needed."""

from __future__ import annotations

import codecs
import hashlib
import re
import sysconfig
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from revnet._files import open_file
from revnet.app.data.codecs import START, Array
from revnet.app.data.examples import UTF16_MARKS, digest, files_in, split
from revnet.app.errors import DataError, UserError, count

DEFAULTS = {"depth": 4, "dropout": 0.0, "batch": 8, "steps": 4000}
VOCAB = 256
NGRAMS = 4
# From as many files on, whole ones are held out.
FEW = 20
# What no text has, but numbers of two bytes have.
_CONTROL = re.compile("[\0-\x08\x0e-\x1f]")

# A document: a file from one byte to another.
Document = tuple[Path, int, int]


def standard_library() -> list[Path]:
    """Return the sources of the standard library, less its tests, which not every system has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(
        path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)
    )


def find_texts(paths: list[Path]) -> list[Path]:
    """Return the files that `paths` name, and those of folders without zero bytes.

    Raises:
        UserError: a path leads nowhere, or a text is UTF-16.
    """
    found = []
    for path in paths:
        if path.is_dir():
            found += [file for file in files_in(path) if not _is_binary(file)]
        elif path.is_file():
            _is_binary(path)
            found.append(path)
        else:
            raise UserError(f"{path} is neither a file nor a folder")
    return found


def _is_binary(path: Path) -> bool:
    """Return whether a file has zero bytes; raise where it is a text that has them for a reason."""
    with open_file(path) as file:
        content = file.read(4096)
    if _is_utf16(content):
        raise UserError(f"{path} is UTF-16, half of whose bytes say nothing: save it as UTF-8")
    return b"\0" in content


def _is_utf16(content: bytes) -> bool:
    """Return whether a file begins as a UTF-16 text does, with its mark or without."""
    encoding, marked = "utf-16", content[:2] in UTF16_MARKS
    if not marked:
        # Of each Latin letter one byte is zero, always the first or always the second.
        zeros = content[::2].count(0), content[1::2].count(0)
        if min(zeros) or 4 * max(zeros) <= len(content):
            return False
        encoding = "utf-16-be" if zeros[0] else "utf-16-le"
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return False
    return marked or not _CONTROL.search(text)


class Corpus:
    """The bytes of text files, one token each.

    Equal files are read once. One byte in twenty is held out: whole files, or of fewer than twenty
    files the end of each.

    Args:
        name: What the run is called.
        files: The files.
        length: Bytes of one example.
    """

    unit = "byte"

    def __init__(self, name: str, files: list[Path], length: int) -> None:
        self.name, self.length = name, length
        different: dict[str, Path] = {}
        for path in files:
            if path.stat().st_size:
                different.setdefault(digest(path), path)
        if not different:
            raise UserError("there is no text: all files are empty")
        splits = split(list(different))
        documents = [(path, 0, path.stat().st_size) for path in different.values()]
        self._documents: dict[str, list[Document]] = {
            name: [documents[i] for i in numbers] for name, numbers in splits.items()
        }
        if len(documents) < FEW:
            cuts = [(path, end * 19 // 20, end) for path, _, end in documents]
            self._documents = {
                "train": [(path, 0, cut) for path, cut, _ in cuts if cut],
                "held_out": cuts,
            }
        self._ends = {
            name: list(accumulate(end - start for _, start, end in several))
            for name, several in self._documents.items()
        }
        for name, ends in self._ends.items():
            size = ends[-1] if ends else 0
            if size < 2 * length:
                raise UserError(
                    f"the {name.replace('_', '-')} text has only {count(size, 'byte')}: it "
                    f"needs twice --context {length}. Give more text, or a smaller --context."
                )
        beginnings = [0, *self._ends["held_out"][:-1]][:3]
        self._show = [
            self._read("held_out", start, min(32, length // 2)).decode(errors="replace")
            for start in beginnings
        ]
        self._fingerprint = hashlib.sha256("".join(sorted(different)).encode()).hexdigest()

    @property
    def shape(self) -> dict[str, int]:
        """Return the sizes: a prefix of `START` alone, then bytes."""
        return {
            "prefix_vocab": START + 1,
            "prefix_length": 1,
            "vocab": VOCAB,
            "rows": self.length,
            "columns": 1,
            "ngrams": NGRAMS,
        }

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of examples in each split."""
        # One short of what fits: an example starts anywhere in the `length` bytes from its first.
        return {name: ends[-1] // self.length - 1 for name, ends in self._ends.items()}

    @property
    def spec(self) -> dict[str, Any]:
        """Return what sampling needs, as JSON."""
        return {
            "kind": "text",
            "name": self.name,
            "show": self._show,
            "fingerprint": self._fingerprint,
        }

    def batch(self, split: str, indices: Array, draws: Array) -> tuple[Array, Array]:
        """Return `START` (n, 1) and bytes (n, length).

        Each example begins where its draw says, within its own stretch.
        """
        texts = [
            self._read(split, int((i + draw) * self.length), self.length)
            for i, draw in zip(indices, draws, strict=True)
        ]
        tokens = np.frombuffer(b"".join(texts), dtype=np.uint8).reshape(len(texts), self.length)
        return np.full((len(texts), 1), START, dtype=np.int64), tokens.astype(np.int64)

    def _read(self, split: str, start: int, count: int) -> bytes:
        """Return bytes of the documents of a split, one after the other."""
        ends, documents = self._ends[split], self._documents[split]
        number = bisect_right(ends, start)
        parts = []
        while count:
            path, _, last = documents[number]
            offset = last - (ends[number] - start)
            part = min(count, last - offset)
            try:
                with open_file(path) as file:
                    file.seek(offset)
                    parts.append(file.read(part))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error
            if len(parts[-1]) < part:
                raise DataError(f"{path} has become shorter since the run began")
            start, count, number = start + part, count - part, number + 1
        return b"".join(parts)
