"""The folder of a run: every file is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from revnet.app.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all of it is on the disk; until then `path` stays as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class Run:
    """A run's folder: config.json, data.json, metrics.jsonl, checkpoint.pt, weights.safetensors, and plots."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: str | None, name: str) -> Run:
        """A new folder; by default the first unused runs/NAME-NUMBER."""
        if out is None:
            numbers = iter(range(1, 10_000))
            path = next(path for i in numbers if not (path := Path("runs") / f"{name}-{i}").exists())
        else:
            path = Path(out)
            if (path / "config.json").exists():
                raise UserError(f"{path} already holds a run: choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run."""
        run = cls(Path(path))
        if not (run.path / "config.json").is_file():
            raise UserError(f"{path} is not the folder of a run: it has no config.json")
        return run

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file."""
        with replacing(self.path / name) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """Reads a JSON file."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path / name}: {error}") from error

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
