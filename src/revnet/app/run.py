"""The folder of a run: every file is written whole or not at all, and read only as data."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import revnet
from revnet._files import PARTIAL_PREFIX, append_to_file, open_file, read_file
from revnet.app.checks import check_data, check_metrics, parse_config
from revnet.app.config import TrainConfig
from revnet.app.errors import UserError, first_line
from revnet.app.lock import locked
from revnet.app.model import Shape
from revnet.app.writing import new_file, writing

MOST_JSON_BYTES = 2**28
# What a checkpoint holds beside tensors.
OTHER_BYTES = 2**26
LONGEST_NAME = 100


class Run:
    """A run's folder.

    It holds config.json, data.json, metrics.jsonl, plots, and checkpoint.pt with
    weights.safetensors, or of a run on several ranks the folder checkpoints.
    """

    def __init__(self, path: Path, made: bool = False) -> None:
        self.path = path
        # Whether this process made the folder.
        self.made = made

    @classmethod
    def create(cls, out: str | None, name: str, again: bool = False) -> Run:
        """Return a new folder.

        Args:
            out: Its path; None is the first unused runs/NAME-NUMBER.
            name: What the data is called.
            again: Accept a folder in which a run has begun, but not saved anything.
        """
        if out is None:
            return cls(_next_free(name), made=True)
        path = Path(out)
        made = not path.exists()
        try:
            if (path / "config.json").exists():
                raise UserError(
                    f"{path} already holds a run: choose another --out, or continue it with "
                    f"--resume"
                )
            path.mkdir(parents=True, exist_ok=True)
            others = [] if again else [entry.name for entry in path.iterdir()]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"cannot create the run folder {path}: {reason}") from error
        if any(not other.startswith(".revnet-") for other in others):
            raise UserError(
                f"{path} is neither empty nor the folder of a run: choose another --out"
            )
        return cls(path, made)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Return an existing run."""
        run = cls(Path(path))
        if not (run.path / "config.json").exists():
            raise UserError(f"{path} is not the folder of a run: it has no config.json")
        return run

    @contextmanager
    def locked(self) -> Iterator[Run]:
        """Hold the run against other trainings; leave no folder where none has begun."""
        begun = True
        try:
            with locked(self.path):
                # A process that was killed may have left them.
                for partial in self.path.glob(f"{PARTIAL_PREFIX}*"):
                    if partial.is_file():
                        partial.unlink(missing_ok=True)
                try:
                    yield self
                finally:
                    begun = (self.path / "config.json").exists()
                    for name in () if begun else ("plan.json", "data.json"):
                        (self.path / name).unlink(missing_ok=True)
        finally:
            if self.made and not begun:
                self._remove()

    def _remove(self) -> None:
        """Remove an empty folder, and that of all runs if it was the only one."""
        with suppress(OSError):
            self.path.rmdir()
            if self.path.parent.name == "runs":
                self.path.parent.rmdir()

    @contextmanager
    def new_file(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file that takes the place of one of the run when it is complete."""
        with new_file(self.path / name) as file:
            yield file

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file."""
        # A name that is not UTF-8 has half of surrogate pairs, which JSON can write as \udc80.
        content = json.dumps(value, ensure_ascii=False, indent=1).encode(errors="backslashreplace")
        with self.new_file(name) as file:
            file.write(content)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what a JSON file of the run holds."""
        path = self.path / name
        try:
            found = json.loads(read_file(path, MOST_JSON_BYTES).decode())
            if not isinstance(found, dict):
                raise ValueError("it is no JSON object")
            return found
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"cannot read {path}: {reason}") from error

    def read_config(self) -> tuple[TrainConfig, Shape]:
        """Return the options of the run and the size of its network."""
        return parse_config(self.path / "config.json", self.read_json("config.json"))

    def read_data(self, shape: Shape) -> dict[str, Any]:
        """Return what sampling needs to know of the data, which has the network's shape."""
        found = self.read_json("data.json")
        check_data(self.path / "data.json", found, shape)
        return found

    def save_plan(self, plan: revnet.Plan) -> None:
        """Replace plan.json."""
        path = self.path / "plan.json"
        with writing(path):
            plan.save(path)

    def load_plan(self) -> revnet.Plan | None:
        """Return the plan of the run, or None if it has none yet."""
        try:
            return revnet.Plan.load(self.path / "plan.json")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            where = f"{self.path / 'plan.json'}: " if isinstance(error, OSError) else ""
            raise UserError(f"{where}{reason}. Give another --memory to plan anew.") from error

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace checkpoint.pt by the state of a training, and weights.safetensors."""
        # By way of memory: torch.save reports a full disk as an internal error of its file format.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with self.new_file("checkpoint.pt") as file:
            file.write(buffer.getbuffer())
        self.write_weights(state["model"])

    def write_weights(self, weights: dict[str, Tensor]) -> None:
        """Replace weights.safetensors."""
        from safetensors.torch import save

        content = save({name: tensor.contiguous() for name, tensor in weights.items()})
        with self.new_file("weights.safetensors") as file:
            file.write(content)

    def read_checkpoint(self, device: torch.device, most: int | None = None) -> dict[str, Any]:
        """Return the state that was written last.

        Args:
            device: Where its tensors shall be.
            most: Bytes that its tensors take at most.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            raise UserError(f"{self.path} has no checkpoint yet: start it anew with another --out")
        try:
            with open_file(path, None if most is None else most + OTHER_BYTES) as content:
                # torch.load compares no checksums, though its files hold them.
                with zipfile.ZipFile(content) as file:
                    if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                        raise ValueError("it is compressed, which no checkpoint is")
                    if broken := file.testzip():
                        raise ValueError(f"the checksum of {broken} is wrong")
                content.seek(0)
                found = torch.load(content, map_location=device, weights_only=True)
            if not isinstance(found, dict):
                raise ValueError("it holds no state")
            return found
        except MemoryError:
            raise
        except Exception as error:
            raise damaged_checkpoint(path, first_line(error)) from error

    def read_weights(
        self, device: torch.device, expected: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the weights that were written last.

        Args:
            device: Where they shall be.
            expected: Tensors whose names, shapes and dtypes they must have.
        """
        from safetensors.torch import load

        path = self.path / "weights.safetensors"
        if not path.exists():
            raise UserError(
                f"{self.path} has no weights yet: they are saved with the first checkpoint"
            )
        most = 2**40
        if expected is not None:
            most = OTHER_BYTES + sum(x.numel() * x.element_size() for x in expected.values())
        try:
            # By way of memory: safetensors opens no path that is not UTF-8.
            weights = load(read_file(path, most))
            if expected is not None:
                check_tensors(weights, expected)
            return {name: tensor.to(device) for name, tensor in weights.items()}
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}). The next checkpoint of the run replaces "
                f"it."
            ) from error

    def check_weights(self, shape: Shape) -> None:
        """Raise if the weights are too few for a network, before that takes time and memory."""
        path = self.path / "weights.safetensors"
        least = 4 * 12 * shape.depth * shape.width**2
        if path.is_file() and path.stat().st_size < least:
            raise UserError(
                f"{path} is damaged (it has less than the {least:,} bytes of the network that "
                f"config.json describes)"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with writing(path):
            append_to_file(path, (json.dumps(row) + "\n").encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        try:
            text = read_file(path, MOST_JSON_BYTES).decode(errors="replace")
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
            check_metrics(path, rows)
            return rows
        except FileNotFoundError:
            return []
        except (UserError, OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            prefix = "" if isinstance(error, UserError) else f"cannot read {path}: "
            raise UserError(
                f"{prefix}{reason.rstrip('.')}. Remove it to go on without it."
            ) from error

    def forget_after(self, step: int) -> None:
        """Remove the rows of metrics.jsonl that a resumed run will write again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        with self.new_file("metrics.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def damaged_checkpoint(path: Path, reason: str) -> UserError:
    """Return the error that says why a checkpoint cannot be used."""
    return UserError(
        f"{path} is damaged ({reason}). Nothing was changed; `revnet sample` still works with "
        f"weights.safetensors, but the training has to start anew with another --out."
    )


def _next_free(name: str) -> Path:
    """Make and return the first unused runs/NAME-NUMBER."""
    short = name.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="replace")
    for number in count(1):
        path = Path("runs") / f"{short}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if not path.parent.is_dir():
                raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error
    raise AssertionError("numbers do not end")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor contains NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} contains NaN or infinity")


def check_tensors(found: object, expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors have the expected names, shapes and dtypes, and no NaN."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise ValueError("it holds other tensors than this network's")
    for name, tensor in expected.items():
        other = found[name]
        if not isinstance(other, Tensor):
            raise ValueError(f"{name} is no tensor")
        if other.layout != torch.strided or other.is_meta:
            raise ValueError(f"{name} is not a tensor with all of its numbers")
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise ValueError(
                f"{name} is {other.dtype} {list(other.shape)}, not {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    check_finite(found)
