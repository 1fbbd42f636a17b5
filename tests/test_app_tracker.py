"""`--report-to`: the numbers of a run in TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from revnet.app.cli import main
from revnet.app.errors import UserError
from revnet.app.tracker import find_package

SERVICES = ("tensorboard", "wandb", "mlflow")
OPTIONS = ("--depth", "1", "--width", "32", "--batch", "4", "--device", "cpu", "--context", "16")
OPTIONS += ("--validate-every", "2", "--save-every", "2")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text in a folder of its own, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text"
    path.write_text("abcd" * 500)
    return path


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("revnet: ")
    assert error.count("\n") == 1
    return error


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points_of(run: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[name]) for row in rows_of(run) if name in row]


def tracked(run: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((run / "config.json").read_text())["tracked"]
    return found


# Without the packages


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("module", [None, "folder"])
def test_a_package_that_is_not_there(
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: str | None,
) -> None:
    """Users of a service have a folder of its name, which Python takes for a package."""
    if name == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if module else None)
    error = refused(capsys, text, *OPTIONS, "--report-to", name)
    assert error == f"revnet: --report-to {name} needs its package: pip install {name}\n"
    assert [path.name for path in text.parent.iterdir()] == ["text"]


def test_nothing_is_imported_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr("importlib.import_module", imported.append)
    assert find_package("none") is None
    with pytest.raises(UserError):
        find_package("mlflow")
    assert imported == ["mlflow"]


class Service:
    """What a module of a service would be: it keeps what it is told, or fails."""

    def __init__(self, fails: str = "") -> None:
        self.__file__ = __file__
        self.fails = fails
        self.told: list[tuple[str, Any]] = []

    def _hear(self, what: str, *more: Any, **named: Any) -> None:
        self.told.append((what, more + tuple(named.items())))
        if what == self.fails:
            raise OSError(f"{what} has\nfailed")

    def start_run(self, **named: Any) -> Any:
        self._hear("start_run", **named)
        run_id = named["run_id"] or "0123abcd"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def __getattr__(self, name: str) -> Any:
        return lambda *more, **named: self._hear(name, *more, **named)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.setitem(sys.modules, "mlflow", found)
    return found


def test_a_service_that_refuses_to_start(
    text: Path, capsys: pytest.CaptureFixture[str], service: Service
) -> None:
    service.fails = "start_run"
    error = refused(capsys, text, *OPTIONS, "--report-to", "mlflow", "--steps", "2")
    assert error == (
        "revnet: --report-to mlflow: start_run has. Without it the training starts with "
        "--report-to none.\n"
    )
    assert [path.name for path in text.parent.iterdir()] == ["text"]


def test_a_service_that_fails_later_ends_no_training(
    text: Path, capsys: pytest.CaptureFixture[str], service: Service
) -> None:
    service.fails = "log_metrics"
    options = (*OPTIONS, "--report-to", "mlflow", "--steps", "4", "--out", "run")
    assert train(text, *options) == 0
    assert capsys.readouterr().err == (
        "revnet: --report-to mlflow: log_metrics has; it gets no more numbers, and the training "
        "goes on\n"
    )
    assert [what for what, _ in service.told].count("log_metrics") == 1
    assert rows_of(Path("run"))[-1]["step"] == 4
    service.fails = "end_run"
    assert train("--resume", "run", "--steps", "5") == 0
    assert "revnet: --report-to mlflow: end_run has" in capsys.readouterr().err


def test_how_a_training_ends_is_told(
    text: Path, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    options = (*OPTIONS, "--report-to", "mlflow")
    assert train(text, *options, "--steps", "2", "--out", "good") == 0
    assert service.told[-1] == ("end_run", ("FINISHED",))
    assert train(text, *options, "--steps", "2", "--lr", "1e30", "--out", "bad") == 2
    assert service.told[-1] == ("end_run", ("FAILED",))
    log = service._hear

    def interrupt(what: str, *more: Any, **named: Any) -> None:
        if what == "log_metrics" and named["step"]:
            os.kill(os.getpid(), signal.SIGINT)
        log(what, *more, **named)

    monkeypatch.setattr(service, "_hear", interrupt)
    assert train(text, *options, "--steps", "9", "--out", "stopped") == 130
    assert service.told[-1] == ("end_run", ("KILLED",))


def test_a_run_is_continued_and_not_by_what_another_service_calls_it(
    text: Path, service: Service
) -> None:
    options = (*OPTIONS, "--report-to", "mlflow", "--steps", "2", "--out", "run")
    assert train(text, *options) == 0
    assert tracked(Path("run")) == {"mlflow": "0123abcd"}
    (experiment,) = (more for what, more in service.told if what == "set_experiment")
    assert experiment == ("revnet",)
    for name, steps in (("none", 3), ("mlflow", 4), ("tensorboard", 5)):
        service.told.clear()
        assert train("--resume", "run", "--steps", steps, "--report-to", name) == 0
        assert tracked(Path("run")) == {"mlflow": "0123abcd"}
        told = dict(service.told)
        assert ("start_run" in told) == (name == "mlflow")
        if told:
            assert ("run_id", "0123abcd") in told["start_run"]
            # The service has the options, which it does not let anyone change.
            assert not {"log_params", "set_experiment"} & told.keys()


def test_a_run_folder_is_no_place_for_settings_of_a_service(
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    service: Service,
) -> None:
    """Of the working directory, wandb reads which server gets the key of the account."""
    assert train(text, *OPTIONS, "--steps", "1", "--out", "run") == 0
    (text.parent / "run" / "wandb").mkdir()
    for folder in ("run", "run/wandb"):
        monkeypatch.chdir(text.parent / folder)
        options = ("--steps", 2, "--report-to", "mlflow")
        error = refused(capsys, "--resume", text.parent / "run", *options)
        assert "start it outside of the run's folder" in error
    assert service.told == []


# With the packages


def test_tensorboard_gets_the_same_numbers(text: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = (*OPTIONS, "--report-to", "tensorboard", "--out", "run")
    assert train(text, *options, "--steps", "4") == 0
    assert train("--resume", "run", "--steps", "6") == 0
    events = EventAccumulator("run/tensorboard").Reload()
    for name in ("bits", "held_out_bits"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(y)) for step, y in points_of(Path("run"), name)]


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command as a user types it, without a terminal, and without settings of a service."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "revnet", *arguments],
        env={**plain, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def interrupted_and_resumed(text: Path, **environment: str) -> tuple[str, str]:
    """Train until Ctrl-C, resume from another directory, and return what both parts said."""
    name = environment.pop("SERVICE")
    options = (*OPTIONS, "--steps", "100000", "--report-to", name, "--out", "run")
    first = command("train", "text", *options, **environment)
    deadline = time.monotonic() + 100
    while first.poll() is None and time.monotonic() < deadline:
        if Path("run/metrics.jsonl").exists() and len(points_of(Path("run"), "bits")) > 3:
            first.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    said = "".join(first.communicate(timeout=100))
    assert first.returncode == 130, said
    step = int(re.search(r"Stopped at step (\d+)", said)[1])
    (text.parent / "elsewhere").mkdir()
    os.chdir(text.parent / "elsewhere")
    more = ("--steps", str(step + 4))
    second = command("train", "--resume", "../run", *more, **environment)
    also = "".join(second.communicate(timeout=100))
    os.chdir(text.parent)
    assert second.returncode == 0, also
    return said, also


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_the_same_numbers(text: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{text.parent}/store.db"
    interrupted_and_resumed(text, SERVICE="mlflow", MLFLOW_TRACKING_URI=store)
    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'revnet'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == tracked(Path("run"))["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert (found.data.params["depth"], found.data.params["report_to"]) == ("1", "mlflow")
    for name in ("bits", "held_out_bits", "stored_peak_bytes"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(each.step, each.value) for each in history] == points_of(Path("run"), name)
    # As a store does that does not know the run.
    config = json.loads(Path("run/config.json").read_text())
    config["tracked"]["mlflow"] = "0" * 32
    Path("run/config.json").write_text(json.dumps(config))
    lost = command("train", "--resume", "run", "--steps", "100001", MLFLOW_TRACKING_URI=store)
    said = lost.communicate(timeout=100)[1]
    assert lost.returncode == 2
    assert re.search(r"^revnet: --report-to mlflow: Run with id=\w+ not found\.", said, re.M)


@pytest.mark.ecosystem
@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_the_same_numbers(text: Path) -> None:
    pytest.importorskip("wandb")
    offline = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    offline |= {"WANDB_DIR": str(text.parent)}
    interrupted_and_resumed(text, SERVICE="wandb", **offline)
    found = records(text.parent / "wandb")
    assert {run for run, _ in found} == {tracked(Path("run"))["wandb"]}
    for name in ("bits", "held_out_bits", "stored_peak_bytes"):
        points = [(row["step"], row[name]) for _, row in found if name in row]
        assert points == points_of(Path("run"), name)
    lacks = command("train", "--resume", "run", "--steps", "100001", HOME=str(text.parent))
    said = lacks.communicate(timeout=100)[1]
    assert lacks.returncode == 2
    assert "revnet: --report-to wandb: No API key configured." in said


def records(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """Return the id of the run and the numbers of each row that wandb has kept for later."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        run = ""
        for part in parts(path.read_bytes()):
            record = Record.FromString(part)
            run = record.run.run_id or run
            if record.HasField("history"):
                items = record.history.item
                row = {each.key or ".".join(each.nested_key): each.value_json for each in items}
                found.append((run, {key: json.loads(value) for key, value in row.items()}))
    return found


def parts(content: bytes) -> Iterator[bytes]:
    """Read the log format of LevelDB: records in pieces, none of which crosses 32 KiB."""
    at, found = 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = struct.unpack_from("<HB", content, at + 4)
        found += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield found
            found = b""
