"""Report the numbers of a training to TensorBoard, Weights & Biases or MLflow, by their own APIs.

Where their servers are, and whether they have any, is up to their own settings, such as WANDB_MODE
and MLFLOW_TRACKING_URI. A run's folder names no server: it may be from somebody else.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from revnet.app.config import TrainConfig
from revnet.app.errors import MachineError, UserError, first_line
from revnet.app.run import Run
from revnet.app.terminal import complain, visible_line
from revnet.app.writing import check_own_folder, writing

# What runs are gathered under, unless the service's own settings say otherwise.
PROJECT = "revnet"


class Service(Protocol):
    """A service that is reported to; `id` is its name of the run, if it has one."""

    id: str | None

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Report the numbers of a step."""

    def close(self, end: str) -> None:
        """End the run: it is "finished", "stopped" or has "failed"."""


class _TensorBoard:
    """Files in the run's folder."""

    id = None

    def __init__(self, _: Any, run: Run, options: dict[str, Any], found: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        check_own_folder(folder)
        try:
            os.fspath(folder).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"--report-to tensorboard needs a run folder whose name is UTF-8, but it is "
                f"{run.path}"
            ) from None
        with writing(folder):
            self._board = SummaryWriter(folder)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self, end: str) -> None:
        self._board.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, with the number of the step as its x-axis."""

    def __init__(self, wandb: Any, run: Run, options: dict[str, Any], found: str | None) -> None:
        name = visible_line(run.path.name)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=None if found else os.environ.get("WANDB_NAME", name),
            id=found,
            resume="allow" if found else None,
            # The terminal is the program's, and its progress is no log.
            settings=wandb.Settings(console="off", quiet=True),
        )
        self.id: str | None = self._run.id
        self._run.config.update(options, allow_val_change=True)
        # By wandb's own count, which never goes back, the steps after the last checkpoint would be
        # missing when a resumed run takes them again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log({"step": step, **row})

    def close(self, end: str) -> None:
        self._run.finish(exit_code={"finished": 0, "stopped": 130, "failed": 1}[end])


class _MLflow:
    """A run of MLflow."""

    def __init__(self, mlflow: Any, run: Run, options: dict[str, Any], found: str | None) -> None:
        self._mlflow = mlflow
        own = {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"}
        if not found and not own & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        name = None if found else visible_line(run.path.name)
        self.id: str | None = mlflow.start_run(run_id=found, run_name=name).info.run_id
        if not found:
            mlflow.log_params(options)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(row), step=step)

    def close(self, end: str) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end]
        self._mlflow.end_run(status)


_SERVICES: dict[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


def find_package(name: str) -> Any:
    """Return the package that reports to a service, or None for "none"; raise where it lacks."""
    if name == "none":
        return None
    try:
        package = importlib.import_module(name)
        # Any folder is importable, and the services leave some with their names.
        found = getattr(package, "__file__", None) is not None
    except ImportError:
        found = False
    if not found:
        raise UserError(f"--report-to {name} needs its package: pip install {name}")
    return package


class Tracker:
    """Reports to the service of `--report-to`, if there is one, until it fails.

    Args:
        config: The options of the run.
        run: Its folder.
        known: What services called the run before, by their names.
    """

    def __init__(self, config: TrainConfig, run: Run, known: Mapping[str, str]) -> None:
        name = self._name = config.report_to
        self._service: Service | None = None
        self.known = dict(known)
        if name == "none":
            return
        if name != "tensorboard" and Path.cwd().resolve().is_relative_to(run.path.resolve()):
            raise UserError(
                f"--report-to {name}: its settings may be in the working directory: start it "
                f"outside of the run's folder, which may be from somebody else"
            )
        options = {
            key: visible_line(value) if isinstance(value, str | list) else value
            for key, value in asdict(config).items()
        }
        try:
            package = find_package(name)
            self._service = _SERVICES[name](package, run, options, known.get(name))
        except (UserError, MachineError):
            raise
        except Exception as error:
            # Each package has errors of its own, and those of the network.
            raise UserError(
                f"--report-to {name}: {first_line(error).rstrip('.')}. Without it the training "
                f"starts with --report-to none."
            ) from error
        if self._service.id is not None:
            self.known[name] = self._service.id

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Report the numbers of a step."""
        if self._service is not None:
            try:
                self._service.log(step, row)
            except Exception as error:
                self._service = None
                self._complain(error, "it gets no more numbers, and the training goes on")

    def close(self, end: str) -> None:
        """End the service's run: it is "finished", "stopped" or has "failed"."""
        service, self._service = self._service, None
        if service is not None:
            try:
                service.close(end)
            except Exception as error:
                self._complain(error, "its run may look unfinished")

    def _complain(self, error: Exception, effect: str) -> None:
        complain(f"--report-to {self._name}: {first_line(error).rstrip('.')}; {effect}")
