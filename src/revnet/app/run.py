"""The folder of a run: every file is written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch

from revnet._files import NotAFileError, append_to_file, replace_file
from revnet.app.errors import MachineError, UserError, first_line

# A place that the user chose cannot be written to, which says nothing about the machine.
WRONG_PLACE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be written into a message."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"no permission to write {path}: {error.strerror}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        if isinstance(error, NotAFileError) or error.errno in WRONG_PLACE:
            raise UserError(f"cannot write {path}: {reason}") from error
        raise MachineError(
            f"cannot write {path}: {reason}. What was saved before is as it was."
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when it is complete, or raise with a message."""
    with writing(path), replace_file(path) as file:
        yield file


def own_folder(path: Path) -> None:
    """Raise where a folder that a run writes to would be somewhere else, or cannot be made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"cannot write {path}: it is not a folder of this run. Remove it.")


class Run:
    """A run's folder: config.json, data.json, metrics.jsonl, checkpoint.pt, weights.safetensors, and plots."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: str | None, name: str) -> Run:
        """A new folder; by default the first unused runs/NAME-NUMBER."""
        path = (
            Path(out)
            if out
            else next(p for i in count(1) if not (p := Path("runs") / f"{name}-{i}").exists())
        )
        try:
            if (path / "config.json").exists():
                raise UserError(
                    f"{path} already holds a run: choose another --out, or continue it with "
                    f"--resume"
                )
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
        with new_file(self.path / name) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """Reads a JSON file."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is no JSON object")
            return found
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {self.path / name}: {error}") from error

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces checkpoint.pt, the whole state of a training, and weights.safetensors, its state["model"]."""
        # By way of memory: torch.save reports a full disk as an internal error of its file format.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with new_file(self.path / "checkpoint.pt") as file:
            file.write(buffer.getbuffer())
        self.write_weights(state["model"])

    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Replaces weights.safetensors."""
        from safetensors.torch import save

        content = save({name: tensor.contiguous() for name, tensor in weights.items()})
        with new_file(self.path / "weights.safetensors") as file:
            file.write(content)

    def read_checkpoint(self, device: torch.device) -> dict[str, Any]:
        """The state that was written last."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            raise UserError(f"{self.path} has no checkpoint yet: start it anew with another --out")
        try:
            # torch.load compares no checksums, though its files hold them.
            with zipfile.ZipFile(path) as file:
                if broken := file.testzip():
                    raise ValueError(f"the checksum of {broken} is wrong")
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise UserError(
                f"{path} is damaged ({str(error).splitlines()[0]}). Nothing was changed; `revnet "
                f"sample` still works with weights.safetensors, but the training has to start anew "
                f"with another --out."
            ) from error

    def read_weights(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The weights that were written last."""
        from safetensors.torch import load_file

        path = self.path / "weights.safetensors"
        if not path.exists():
            raise UserError(
                f"{self.path} has no weights yet: they are saved with the first checkpoint"
            )
        try:
            return load_file(path, device=str(device))
        except Exception as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with writing(path):
            append_to_file(path, (json.dumps(row) + "\n").encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise UserError(
                f"cannot read {path}: {error}. Remove it to go on without it."
            ) from error

    def forget_after(self, step: int) -> None:
        """Removes the rows of metrics.jsonl that a resumed run will write again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        with new_file(self.path / "metrics.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
