"""The options of `revnet train`, each with its line of help."""

# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from revnet._execution import EXECUTIONS as KNOWN_EXECUTIONS
from revnet.app.errors import UserError, check_least, check_most


def option(
    default: Any,
    group: str,
    line: str,
    metavar: str = "",
    choices: Sequence[str] = (),
    own: bool = False,
) -> Any:
    """Return a field with its default, group and line of the help, and the name of its value.

    What is `own` may differ when a run resumes.
    """
    metadata = {"group": group, "help": line, "metavar": metavar, "choices": choices, "own": own}
    return field(default_factory=lambda: default, metadata=metadata)


# The default first.
EXECUTIONS = ("invert", *(name for name in KNOWN_EXECUTIONS if name != "invert"))
DTYPES = ("float32", "bfloat16")
STREAMS = ("auto", "float", "fixed")
PARALLEL = ("ddp", "fsdp")
SERVICES = ("none", "tensorboard", "wandb", "mlflow")
# More of these would overflow somewhere, or never end.
MOST = {
    "image_size": 2**13,
    "patch": 2**13,
    "codes": 2**20,
    "context": 2**24,
    "depth": 2**16,
    "width": 2**24,
    "heads": 2**20,
    "batch": 2**24,
    # A step's seed is a million times this one, and has 64 bits.
    "seed": 2**43 - 1,
    "lr": 10**300,
    "rank_timeout": 10**9,
    "threads": 2**10,
}
MOST_PARAMETERS = 2**50
# Of the others, 1.
LEAST = {"dropout": 0, "seed": 0, "lr": 1e-30, "codes": 2}


@dataclass
class TrainConfig:
    """What a run is.

    What is None at first follows from the data or from another option; see `resolve`.
    """

    data: list[str] = option(
        ["digits"], "data", "digits (default), icons, stdlib, folder of images, texts", "DATA"
    )
    image_size: int = option(32, "data", "side that your images are scaled to, in pixels (32)", "N")
    patch: int = option(2, "data", "side of the patch that is one token of your images (2)", "N")
    codes: int = option(512, "data", "different patches, learned from your images (512)", "N")
    grey: bool = option(False, "data", "read your images without colour")
    context: int = option(256, "data", "bytes of text that the model sees at once (256)", "N")

    depth: int = option(None, "model", "the dial: blocks; width, heads and rate follow (4)", "N")
    width: int = option(None, "model", "features per token (24 x depth, rounded up to 32)", "N")
    heads: int = option(None, "model", "attention heads (width / 32; width / 64 from 512 on)", "N")
    dropout: float = option(
        None, "model", "share of branches' outputs to drop (0.1; of texts 0)", "P"
    )

    steps: int = option(
        None, "training", "optimizer steps (digits 800, texts 4000, otherwise 2000)", "N", own=True
    )
    batch: int = option(None, "training", "examples per step (32; of texts 8)", "N")
    lr: float = option(None, "training", "peak learning rate (0.8 / width)", "X")
    seed: int = option(0, "training", "seed of everything that is random (0)", "N")

    execution: str = option(
        EXECUTIONS[0], "machine", ", ".join(EXECUTIONS), "E", EXECUTIONS, own=True
    )
    memory: str = option(
        None,
        "machine",
        "plan for this much activation memory of the blocks, as 8GiB",
        "SIZE",
        own=True,
    )
    streams: str = option(
        "auto",
        "machine",
        "float; fixed, which is exact; auto: fixed in bfloat16 and TF32",
        "S",
        STREAMS,
    )
    dtype: str = option("float32", "machine", "float32, or bfloat16 by autocast", "T", DTYPES)
    device: str = option(
        "auto", "machine", "auto (an accelerator if there is one), cpu, cuda, cuda:1", "D", own=True
    )
    compile: bool = option(False, "machine", "compile the branches", own=True)
    threads: int = option(
        None, "machine", "CPU threads (the cores, or OMP_NUM_THREADS)", "N", own=True
    )

    parallel: str = option(
        "ddp", "machine", "on several ranks: ddp, or fsdp, which shards", "P", PARALLEL, own=True
    )
    rank_timeout: int = option(
        600, "machine", "seconds until a silent rank counts as lost (600)", "S", own=True
    )

    out: str = option(None, "run", "folder of the run (the next free runs/NAME-NUMBER)", "DIR")
    validate_every: int = option(
        None, "run", "steps between validations (steps / 20)", "N", own=True
    )
    save_every: int = option(
        None, "run", "steps between checkpoints and samples (steps / 4)", "N", own=True
    )
    report_to: str = option(
        SERVICES[0], "run", "tensorboard, wandb, mlflow, or none (none)", "S", SERVICES, own=True
    )

    def __post_init__(self) -> None:
        """Raise where a number is out of its range."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_least(item.name, value, LEAST.get(item.name, 1))
                check_most(item.name, value, MOST.get(item.name, 2**53))
        if self.dropout is not None and self.dropout >= 1:
            raise UserError(f"--dropout is {self.dropout}, but a share is less than 1")

    def resolve(self, defaults: dict[str, Any]) -> TrainConfig:
        """Return a copy in which only `out` and `memory` may be None; `defaults` are the data's."""
        values = asdict(self)
        for name, value in defaults.items():
            if values[name] is None:
                values[name] = value
        depth, steps = values["depth"], values["steps"]
        values["width"] = values["width"] or width_of(depth)
        values["heads"] = values["heads"] or heads_of(values["width"])
        values["lr"] = values["lr"] or min(0.01, 0.8 / values["width"])
        values["validate_every"] = values["validate_every"] or max(1, steps // 20)
        values["save_every"] = values["save_every"] or max(1, steps // 4)
        if values["width"] % (4 * values["heads"]):
            raise UserError(
                f"--width {values['width']} is not a multiple of 4 x --heads {values['heads']}"
            )
        if 12 * depth * values["width"] ** 2 > MOST_PARAMETERS:
            raise UserError(
                f"--depth {depth} and --width {values['width']} make more than 2^50 parameters: "
                f"take less of one"
            )
        return TrainConfig(**values)


def width_of(depth: int) -> int:
    """Return the width that goes with a depth: a reversible network can be deep and narrow."""
    return -(-24 * depth // 32) * 32


def heads_of(width: int) -> int:
    """Return the number of attention heads that goes with a width."""
    return max(1, width // (32 if width < 512 else 64))
