"""`revnet train` through the real command, with tiny settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from revnet.app.cli import main

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
    assert main(["train", *TINY, "--steps", "6", "--validate-every", "3", "--save-every", "3", "--out", str(path)]) == 0
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
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert "--depth" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_run_leaves_everything_in_its_folder(digits_run: Path) -> None:
    config = json.loads((digits_run / "config.json").read_text())
    assert (config["depth"], config["width"], config["heads"], config["steps"]) == (2, 32, 1, 6)
    rows = rows_of(digits_run)
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
    peak = {row["execution"]: row["peak_bytes"] for row in result["memory"]}
    assert peak["reversible"] < peak["checkpointed"] < peak["stored"]
    assert result["classifier_accuracy_on_real_digits"] > 0.97
    assert not list(digits_run.glob("*.partial")) + list(digits_run.glob(".*"))


def test_the_last_lines_are_the_memory_and_the_reading(tmp_path: Path) -> None:
    process = command("train", *TINY, "--steps", "1", "--out", "run", cwd=tmp_path)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("digits: 1,497 examples, 300 held out. Depth 2, width 32,")
    assert "bits per image token" in out
    for word in ("stored", "checkpointed", "reversible", "generated digits are read as their caption says"):
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
    assert f"Stopped at step {state['step']};" in out
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(weights[name], state["model"][name]) for name in weights)


def test_a_second_run_does_not_overwrite_the_first(digits_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--out", str(digits_run)]) == 2
    assert f"{digits_run} already holds a run: choose another --out" in capsys.readouterr().err


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
        assert main(["sample", str(digits_run), *captions, "--each", "2", "--out", str(out), *flags]) == 0
        pictures.append(pixels(out))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path), "three"]) == 2
    assert "is not the folder of a run: it has no config.json" in capsys.readouterr().err


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--device", "tpu", "--out", str(tmp_path / "run")]) == 2
    assert "there is no device 'tpu' here" in capsys.readouterr().err
