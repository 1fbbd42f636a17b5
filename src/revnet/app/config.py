"""The options of `revnet train`, each with its line of help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


def option(default: Any, line: str, group: str, **more: Any) -> Any:
    """A dataclass field with its help line, group and further keywords of `ArgumentParser.add_argument`."""
    return field(default=default, metadata={"help": line, "group": group, **more})


@dataclass
class TrainConfig:
    """What a run is. What is None at first follows from the data or from another option; see `resolve`."""

    data: str = option("digits", "digits (default)", "data", positional=True)
    out: str | None = option(None, "folder of the run (default runs/NAME-NUMBER)", "run")
    depth: int = option(None, "blocks; width and heads follow from it", "model")
    width: int = option(None, "features per token (24 x depth, rounded up to 32)", "model")
    heads: int = option(None, "attention heads (width / 32; width / 64 from 512)", "model")
    dropout: float = option(None, "share of each branch's output dropped", "model")
    execution: str = option("invert", "invert, store or checkpoint", "model", choices=("invert", "store", "checkpoint"))
    steps: int = option(None, "optimizer steps", "training")
    batch: int = option(None, "examples per step", "training")
    lr: float = option(None, "peak learning rate", "training")
    seed: int = option(0, "seed of everything random", "training")
    validate_every: int = option(None, "steps between validations (steps / 20)", "training")
    save_every: int = option(None, "steps between checkpoints (steps / 4)", "training")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", "machine")
    dtype: str = option("float32", "float32 or bfloat16 (autocast)", "machine", choices=("float32", "bfloat16"))

    def resolve(self, defaults: dict[str, Any]) -> TrainConfig:
        """A copy without None, save for `out`; `defaults` are the data's."""
        values = asdict(self)
        for name, value in defaults.items():
            if values[name] is None:
                values[name] = value
        depth, steps = values["depth"], values["steps"]
        values["width"] = values["width"] or -(-24 * depth // 32) * 32
        values["heads"] = values["heads"] or values["width"] // (32 if values["width"] < 512 else 64)
        values["validate_every"] = values["validate_every"] or max(1, steps // 20)
        values["save_every"] = values["save_every"] or max(1, steps // 4)
        return TrainConfig(**values)
