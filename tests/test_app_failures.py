"""What goes wrong on a machine: a clear message, the right exit code, and nothing lost that was
saved.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from revnet.app.cli import main
from revnet.app.config import TrainConfig
from revnet.app.errors import UserError
from revnet.app.run import Run
from revnet.app.training import Training

TINY = ("--depth", "1", "--width", "32", "--batch", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--steps", "2", "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_byte, cut], ids=["byte", "cut"])
def test_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], damage) -> None:
    damage(run / "checkpoint.pt")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 2
    assert f"{run / 'checkpoint.pt'} is damaged (" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert main(["sample", str(run), "three", "--each", "1"]) == 0


def test_damaged_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(run / "weights.safetensors")
    assert main(["sample", str(run), "three"]) == 2
    assert f"{run / 'weights.safetensors'} is damaged" in capsys.readouterr().err
    (run / "weights.safetensors").unlink()
    assert main(["sample", str(run), "three"]) == 2
    assert "has no weights yet" in capsys.readouterr().err


def test_a_run_without_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint.pt").unlink()
    assert main(["train", "--resume", str(run)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    (run / "config.json").write_text("{")
    assert main(["sample", str(run)]) == 2
    assert f"cannot read {run / 'config.json'}" in capsys.readouterr().err


def test_a_run_without_its_metrics_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff garbage\n")
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 2
    assert f"cannot read {run / 'metrics.jsonl'}" in capsys.readouterr().err
    (run / "metrics.jsonl").unlink()
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    (run / "data.json").write_text("[]")
    assert main(["sample", str(run)]) == 2
    assert f"cannot read {run / 'data.json'}: it is no JSON object" in capsys.readouterr().err


def test_a_damaged_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *TINY, "--steps", "1", "--memory", "8MiB", "--out", str(run)]) == 0
    (run / "plan.json").write_text("{}")
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 2
    assert "plan.json is not a plan" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--steps", "2", "--memory", "9MiB"]) == 0


@pytest.mark.parametrize("name", [".", "/", "nowhere/a.png", "folder", "device"])
def test_places_that_hold_no_file(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(run)
    (run / "folder").mkdir()
    os.mkfifo(run / "device")
    assert main(["sample", str(run), "three", "--each", "1", "--out", name]) == 2
    assert capsys.readouterr().err.startswith(f"revnet: cannot write {name}: ")
    assert (run / "device").is_fifo()


@contextmanager
def limited(kind: int, amount: int) -> Iterator[None]:
    """What this process may have of a resource, inside the block."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_disk_that_fills(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, weights = (
        (run / "checkpoint.pt").read_bytes(),
        (run / "weights.safetensors").read_bytes(),
    )
    room = len(weights)
    assert room < len(checkpoint)
    with limited(resource.RLIMIT_FSIZE, room):
        assert main(["train", "--resume", str(run), "--steps", "4", "--save-every", "3"]) == 1
    assert capsys.readouterr().err == (
        f"revnet: cannot write {run / 'checkpoint.pt'}: File too large. What was saved before is "
        f"as it was.\n"
    )
    assert (run / "checkpoint.pt").read_bytes() == checkpoint
    assert (run / "weights.safetensors").read_bytes() == weights
    assert not list(run.glob(".*"))
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that nobody may write to, in a place that everybody may enter."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o555)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


@pytest.fixture
def nobody() -> Iterator[None]:
    """The superuser may write anywhere, so the test is run as somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.usefixtures("original", "locked", "nobody")
def test_a_folder_without_write_permission(
    locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "--steps", "1", "--out", str(locked / "run")]) == 2
    assert (
        capsys.readouterr().err
        == f"revnet: cannot create the run folder {locked / 'run'}: Permission denied\n"
    )
    assert main(["train", *TINY, "--steps", "1", "--out", str(locked)]) == 2
    assert f"no permission to write {locked}" in capsys.readouterr().err


def test_a_run_folder_that_is_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--out", str(run / "config.json")]) == 2
    assert "cannot create the run folder" in capsys.readouterr().err


def test_out_of_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = ("--width", str(2**20), "--heads", "1024")
    # Where the system promises more memory than it has, it would kill the process.
    with limited(resource.RLIMIT_AS, 2**42):
        assert main(["train", *TINY, *huge, "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("revnet: out of memory: try a smaller --batch")


@pytest.mark.parametrize(
    "message", ["No working C++ compiler found in cxx", "Cannot find a working triton installation"]
)
def test_nothing_to_compile_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(f"{message}\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr("revnet.app.train.train_alone", fail)
    assert main(["train", "--compile"]) == 2
    assert (
        capsys.readouterr().err
        == f"revnet: --compile: {message}. Install one, or leave --compile out.\n"
    )


def test_the_library_without_its_program() -> None:
    code = """
import sys
for name in ("numpy", "rich", "matplotlib", "sklearn", "safetensors"):
    sys.modules[name] = None
from revnet.app.cli import main
print([main(command) for command in (["train"], ["sample", "run"], ["compare"], ["plan"])])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], text=True, capture_output=True, check=False
    )
    assert done.stdout == "[2, 2, 2, 2]\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("revnet: the command needs ")
        assert line.endswith(": pip install 'revnet[app]'")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "nonsense:x"])
def test_a_device_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    assert main(["train", *TINY, "--device", device, "--out", str(tmp_path / "run")]) == 2
    assert f"there is no device {device!r} here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", *TINY, "--steps", "60", "--lr", "1e30", "--out", str(tmp_path / "run")]) == 2
    )
    assert "try a smaller --lr than 1e+30" in capsys.readouterr().err


def test_weights_that_are_not_numbers_replace_no_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(training: Training, *batch: torch.Tensor) -> torch.Tensor:
        loss = take_step(training, *batch)
        if training.step == 5:
            training.model.norm.weight.data.fill_(torch.nan)
        return loss

    take_step = Training.take_step
    monkeypatch.setattr(Training, "take_step", spoil)
    assert main(["train", "--resume", str(run), "--steps", "9", "--save-every", "1"]) == 2
    assert (
        "weights are not numbers any more at step 5: try a smaller --lr than"
        in capsys.readouterr().err
    )
    state = Run(run).read_checkpoint(torch.device("cpu"))
    assert state["step"] == 4
    assert all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "--depth is 0, which is too small"),
        ({"width": 40, "heads": 3}, "--width 40 is not a multiple of 4 x --heads 3"),
        ({"lr": float("nan")}, "--lr is nan, which is too small"),
        ({"dropout": float("nan")}, "--dropout is nan, which is too small"),
        ({"seed": 2**43}, "--seed is 8796093022208, which is too large"),
        ({"dropout": 1.0}, "--dropout is 1.0, but a share is less than 1"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**options).resolve({"depth": 2, "steps": 1, "batch": 1, "dropout": 0.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{run}", "--temperature", "nan"], "--temperature and --top-k are at least 0"),
        (
            ["sample", "{run}", "--seed", str(2**70)],
            f"--seed is {2**70}, which is not an integer of 64 bits",
        ),
        (["sample", "{run}", "--each", "-1"], "--each is -1, which is too small: give at least 1"),
        (["compare", "--repeats", "0"], "--repeats is 0, which is too small"),
        (["compare", "--width", "-32"], "--width is -32, which is too small"),
        (["plan", "--batch", "0"], "--batch is 0, which is too small"),
        (["plan", "{run}", "--batch", "-1"], "--batch is -1, which is too small"),
        (
            ["plan", "{run}", "--width", "64"],
            "--width 64: {run} has its own; leave it out, or leave out the run",
        ),
    ],
)
def test_numbers_that_cannot_be(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.format(run=run) for argument in arguments]) == 2
    assert message.format(run=run) in capsys.readouterr().err


def test_a_caption_that_is_not_utf_8(run: Path) -> None:
    assert main(["sample", str(run), "caf\udce9", "--each", "1"]) == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_json("config.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write_json("config.json", {"a": object()})
    assert run.read_json("config.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_cut_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in range(3):
        run.log({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    run.forget_after(1)
    assert run.metrics() == [{"step": 0}, {"step": 1}]


def test_checkpoints_are_read_back_whole(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = {
        "step": 3,
        "model": {"a": torch.randn(3)},
        "optimizer": {"state": {0: {"m": torch.randn(2)}}},
    }
    run.write_checkpoint(state)
    found = run.read_checkpoint(torch.device("cpu"))
    assert found["step"] == 3
    assert torch.equal(found["optimizer"]["state"][0]["m"], state["optimizer"]["state"][0]["m"])
    assert np.array_equal(run.read_weights(torch.device("cpu"))["a"], state["model"]["a"])
