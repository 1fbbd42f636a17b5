"""`revnet train` through the real command, with tiny settings."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from revnet.app.cli import main
from revnet.app.display import Display
from revnet.app.plots import loss_plot
from revnet.app.train import interruptible
from revnet.app.training import Training

TINY = ("--depth", "2", "--width", "32", "--batch", "8", "--device", "cpu")


def command(*arguments: str, cwd: Path, **more: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "revnet", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    torch.manual_seed(0)
    options = ("--steps", "6", "--validate-every", "3", "--save-every", "3", "--out", str(path))
    with (
        path.with_name("output").open("w") as output,
        redirect_stdout(output),
        redirect_stderr(io.StringIO()) as errors,
    ):
        assert main(["train", *TINY, *options]) == 0
    assert not errors.getvalue()
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def rows_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_help_comes_before_torch(tmp_path: Path) -> None:
    code = """
import sys
from revnet.app.cli import main
try:
    main(["train", "--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert "--depth" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_run_leaves_everything_in_its_folder(digits_run: Path) -> None:
    config = json.loads((digits_run / "config.json").read_text())
    assert (config["depth"], config["width"], config["heads"], config["steps"]) == (2, 32, 1, 6)
    rows = rows_of(digits_run)
    assert rows[0]["step"] == 0
    assert rows[0]["reversible_peak_bytes"] < rows[0]["stored_peak_bytes"]
    rows = rows[1:]
    assert [row["step"] for row in rows if "bits" in row] == [1, 6]
    assert [row["step"] for row in rows if "held_out_bits" in row] == [3, 6]
    # An untrained model gives all 17 grey levels equal odds.
    assert rows[0]["bits"] == pytest.approx(np.log2(17), abs=1e-5)
    assert rows[-1]["held_out_bits"] < rows[0]["bits"]
    assert 0 < rows[-1]["reconstruction_error"] < 1e-5
    assert pixels(digits_run / "loss.png").shape[:2] == (480, 840)
    height, width, _ = pixels(digits_run / "samples.png").shape
    assert height == 6 + 10 * 54
    assert width > 10 * 54
    weights = load_file(digits_run / "weights.safetensors")
    assert weights["layers.blocks.1.g.out.weight"].shape == (32, 128)
    result = json.loads((digits_run / "result.json").read_text())
    peak = {row["name"]: row["peak"] for row in result["memory"]}
    assert peak["reversible"] < peak["checkpointed"] < peak["stored"]
    assert result["classifier_accuracy"] > 0.97
    assert not list(digits_run.glob("*.partial")) + list(digits_run.glob(".*"))


def test_the_last_lines_are_the_memory_and_the_reading(digits_run: Path) -> None:
    out = digits_run.with_name("output").read_text()
    assert out.startswith("digits: 1,497 examples, 300 held out. Depth 2, width 32,")
    assert "bits per image token" in out
    for word in (
        "stored",
        "checkpointed",
        "reversible",
        "generated digits are read as their caption says",
    ):
        assert word in out
    assert "\x1b" not in out


def test_execution_changes_memory_not_the_run(tmp_path: Path, digits_run: Path) -> None:
    options = ("--steps", "6", "--validate-every", "3", "--execution", "store")
    assert main(["train", *TINY, *options, "--out", str(tmp_path / "run")]) == 0
    stored, reversible = rows_of(tmp_path / "run"), rows_of(digits_run)
    for key in ("bits", "held_out_bits"):
        assert [row[key] for row in stored if key in row] == pytest.approx(
            [row[key] for row in reversible if key in row], rel=1e-4
        )


def test_ctrl_c_ends_with_a_checkpoint(tmp_path: Path) -> None:
    process = command("train", *TINY, "--steps", "100000", "--out", "run", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not metrics.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "Stopped at step" in out
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert f"Stopped at step {state['step']}. Continue with: revnet train --resume run" in out
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(weights[name], state["model"][name]) for name in weights)


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run = tmp_path / "a [red] one.txt", tmp_path / "run [/x]"
    text.write_text("ab" * 1000)
    small = (*TINY, "--context", "16", "--steps", "1")
    assert main(["train", str(text), *small, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a [red] one: ")
    assert f"Run folder {run}." in out
    assert f"revnet sample {run}\n" in out


def test_a_dumb_terminal_gets_the_lines_of_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(2, "byte") as display:
        assert display.console.is_terminal
        display.step(1, 3.0, 10.0, last=False)
        assert "step 1/2  3.000 bits per byte" in capsys.readouterr().out


def test_the_loss_of_a_run_without_steps(tmp_path: Path) -> None:
    with (tmp_path / "loss.png").open("wb") as file:
        loss_plot(file, [{"step": 0}], "byte")
    assert (tmp_path / "loss.png").exists()


def test_a_second_run_does_not_overwrite_the_first(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "--out", str(digits_run)]) == 2
    assert f"{digits_run} already holds a run" in capsys.readouterr().err


def test_without_out_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    assert main(["train", *TINY, "--steps", "1"]) == 0
    assert (tmp_path / "runs" / "digits-2" / "samples.png").exists()


def test_samples_are_the_same_with_and_without_cache(digits_run: Path, tmp_path: Path) -> None:
    pictures = []
    for name, flags in {"cached": [], "uncached": ["--no-cache"], "other": ["--seed", "1"]}.items():
        out = tmp_path / f"{name}.png"
        captions = ["three", "a handwritten eight"]
        assert (
            main(["sample", str(digits_run), *captions, "--each", "2", "--out", str(out), *flags])
            == 0
        )
        pictures.append(pixels(out))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path), "three"]) == 2
    assert "is not the folder of a run: it has no config.json" in capsys.readouterr().err


def learned(path: Path) -> list[dict[str, float]]:
    """The rows of a run without what a clock or the meter said."""
    timed = {"tokens_per_second", "seconds"}
    return [
        {key: row[key] for key in row if key not in timed} for row in rows_of(path) if row["step"]
    ]


@pytest.mark.parametrize("streams", ["float", "fixed"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, streams: str) -> None:
    options = (
        *TINY,
        "--dropout",
        "0.2",
        "--streams",
        streams,
        "--validate-every",
        "2",
        "--save-every",
        "3",
    )
    assert main(["train", *options, "--steps", "8", "--out", str(tmp_path / "whole")]) == 0
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("revnet.app.training.Training.draw_loss", interrupt_at(5))
        assert main(["train", *options, "--steps", "8", "--out", str(cut)]) == 130
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["step"] == 3
    assert rows_of(cut)[-1]["step"] == 4
    assert main(["train", "--resume", str(cut)]) == 0
    at = {row["step"]: row for row in learned(cut) if "held_out_bits" in row}
    assert [row for row in learned(tmp_path / "whole") if "held_out_bits" in row] == list(
        at.values()
    )
    before, after = (load_file(path / "weights.safetensors") for path in (tmp_path / "whole", cut))
    assert all(torch.equal(before[name], after[name]) for name in before)


def interrupt_at(step: int) -> Callable[[Training], None]:
    def stand_in(training: Training) -> None:
        if training.step >= step - 1:
            raise KeyboardInterrupt

    return stand_in


def test_a_finished_run_can_be_prolonged(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    assert main(["train", "--resume", str(run)]) == 2
    assert "has taken all of its 6 steps: ask for more with --steps" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--steps", "8"]) == 0
    assert rows_of(run)[-1]["step"] == 8


def test_a_resumed_run_keeps_what_it_has_learned_with(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(digits_run), "--width", "64"]) == 2
    assert f"--width is 32 in {digits_run}: a resumed run keeps it" in capsys.readouterr().err


def test_twice_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with interruptible() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_planned_run_stays_in_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *TINY, "--steps", "2", "--memory", "2MiB", "--out", str(run)]) == 0
    first = rows_of(run)[0]
    assert first["planned_peak_bytes"] < first["stored_peak_bytes"]
    assert json.loads((run / "plan.json").read_text())["budget"] == 2**21
    assert "planned (this run)" in capsys.readouterr().out
    plan = (run / "plan.json").read_bytes()
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert (run / "plan.json").read_bytes() == plan
    assert main(["train", *TINY, "--memory", "1KiB", "--out", str(tmp_path / "other")]) == 2
    assert "--memory 1KiB: " in capsys.readouterr().err


@pytest.mark.parametrize("execution", ["select", "offload"])
def test_every_execution_trains(tmp_path: Path, execution: str) -> None:
    assert (
        main(
            [
                "train",
                *TINY,
                "--steps",
                "1",
                "--execution",
                execution,
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )


def test_bfloat16_runs_in_fixed_streams(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *TINY, "--steps", "2", "--dtype", "bfloat16", "--out", str(run)]) == 0
    rows = [row for row in rows_of(run) if "held_out_bits" in row]
    assert rows
    assert all("reconstruction_error" not in row for row in rows)


# torch's own, from tracing a tensor with a history.
@pytest.mark.filterwarnings(
    r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"
)
def test_compiled_branches_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = torch.nn.Module.compile
    # Inductor would take a minute for the same graphs.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager")
    )
    frames = torch._dynamo.utils.counters["frames"]
    # Compiled dropout drops other features.
    options = (
        *TINY,
        "--depth",
        "1",
        "--dropout",
        "0",
        "--steps",
        "3",
        "--validate-every",
        "1",
        "--save-every",
        "2",
    )
    found = {}
    for name, flags in {"eager": (), "compiled": ("--compile",)}.items():
        frames.clear()
        assert main(["train", *options, *flags, "--out", str(tmp_path / name)]) == 0
        assert (frames["ok"] > 0) == (name == "compiled")
        found[name] = [
            row["held_out_bits"] for row in rows_of(tmp_path / name) if "held_out_bits" in row
        ]
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-5)
    assert (tmp_path / "compiled" / "samples.png").exists()
    assert main(["sample", str(tmp_path / "compiled"), "three", "--each", "1"]) == 0


def test_help_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["train"], ["sample"], ["compare"], ["plan"], []):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--help"])
        assert end.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 48
        flags = [line for line in lines if line.startswith("  --")]
        assert all(
            len(line.split("  ")) > 2 or lines[lines.index(line) + 1].startswith(" " * 20)
            for line in flags
        )
