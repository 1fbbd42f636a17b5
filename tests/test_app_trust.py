"""The command trusts nothing that it reads, and loses nothing that it made."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from revnet.app.cli import main

TINY = ("--depth", "1", "--width", "32", "--batch", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--steps", "2", "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def start(*arguments: object, cwd: Path, **more: object) -> subprocess.Popen[str]:
    """Start the real command."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen(
        [sys.executable, "-m", "revnet", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        **settings,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not path.exists():
        time.sleep(0.05)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must end with exit 2 and one line, and return that line."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    if dist.is_initialized():
        # After an error a process leaves the other ranks by ending.
        dist.destroy_process_group()
    error = capsys.readouterr().err
    assert error.startswith("revnet: ")
    assert error.count("\n") == 1
    return error


# What it made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("abcd" * 500)
    return path


SHORT = (*TINY, "--context", 16)


def test_a_display_that_cannot_print_loses_no_training(text: Path, tmp_path: Path) -> None:
    options = ("train", text, *SHORT, "--steps", 30, "--out")
    closed = start(*options, "closed", cwd=tmp_path)
    closed.stdout.close()
    with open("/dev/full", "w") as full:
        runs = {"closed": closed, "full": start(*options, "full", cwd=tmp_path, stdout=full)}
    for name, process in runs.items():
        with process:
            error = process.stderr.read()
            assert process.wait(timeout=60) == 0, error
        assert error.startswith("revnet: cannot show progress any more, but go on and save: ")
        assert error.count("\n") == 1
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert state["step"] == 30
        assert (tmp_path / name / "samples.txt").exists()


def test_a_hangup_saves_unless_it_was_ignored(text: Path, tmp_path: Path) -> None:
    options = ("train", text, *SHORT, "--steps", 100_000, "--out")
    heard = start(*options, "heard", cwd=tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ignored = start(*options, "ignored", cwd=tmp_path)
    signal.signal(signal.SIGHUP, before)
    for name, process in {"heard": heard, "ignored": ignored}.items():
        wait_for(tmp_path / name / "metrics.jsonl")
        # A shell and the kernel both send one.
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
    out, err = heard.communicate(timeout=60)
    assert (heard.returncode, err) == (130, "")
    assert "Stopped at step" in out
    assert torch.load(tmp_path / "heard" / "checkpoint.pt", weights_only=True)["step"] > 0
    assert ignored.poll() is None
    ignored.send_signal(signal.SIGTERM)
    ignored.communicate(timeout=60)
    assert ignored.returncode == 130


def test_text_for_a_full_disk_is_not_lost_in_silence(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(text), *map(str, SHORT), "--steps", "1", "--out", str(run)]) == 0
    with open("/dev/full", "w") as full:
        process = start("sample", run, cwd=tmp_path, stdout=full)
        assert process.communicate(timeout=60)[1].startswith(
            "revnet: cannot print what was drawn: "
        )
    assert process.returncode == 1
    with start("sample", run, cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# What it reads


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six images with captions."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(6):
        pixels = np.full((8, 8, 3), 40 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"grey {i}\n")
    return root


def png_of(side: int) -> bytes:
    """Return a valid PNG of `side` × `side` grey pixels, without making them in memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_only_six_kinds_of_images_are_decoded(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    ghostscript = trap / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {trap}/started\n")
    ghostscript.chmod(0o755)
    (pictures / "0.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{trap}:{os.environ['PATH']}")
        error = refused(
            capsys, "train", pictures, *TINY, "--image-size", 8, "--out", tmp_path / "run"
        )
    assert f"the image {pictures}/0.png cannot be decoded: it is none of PNG, JPEG, WEBP" in error
    assert not (trap / "started").exists()


@pytest.mark.parametrize("side", [8193, 13_300, 20_000])
def test_sizes_are_checked_before_decoding(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], side: int
) -> None:
    (pictures / "0.png").write_bytes(png_of(side))
    start = time.monotonic()
    error = refused(capsys, "train", pictures, *TINY, "--image-size", 8, "--out", tmp_path / "run")
    assert time.monotonic() - start < 5
    assert f"the image {pictures}/0.png is too large: " in error


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def as_rank() -> dict[str, str]:
    """Return what torchrun sets for the only rank of a run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank, saved at steps 1 and 2."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "text").write_text("abcd" * 500)
    options = ("train", root / "text", *SHORT, "--steps", "2", "--save-every", "1", "--parallel")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_rank().items():
            patch.setenv(name, value)
        assert main([*map(str, options), "fsdp", "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def ranked(distributed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in as_rank().items():
        monkeypatch.setenv(name, value)
    return shutil.copytree(distributed, tmp_path / "ranked")


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


def poison_metadata(checkpoint: Path, payload: Payload) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(payload))


def poison_a_field(checkpoint: Path, payload: Payload) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = payload
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_a_value(checkpoint: Path, payload: Payload) -> None:
    """Put the payload where the step is, which torch reads with weights_only=False."""
    content = io.BytesIO()
    torch.save(payload, content)
    (checkpoint / "more").write_bytes(content.getvalue())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (index,) = (index for index in metadata.storage_data if index.fqn == "step")
    metadata.storage_data[index].relative_path = "more"
    metadata.storage_data[index].offset = 0
    metadata.storage_data[index].length = len(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_distributed_checkpoint_runs_no_code_in_the_real_command(
    ranked: Path, tmp_path: Path
) -> None:
    payload = Payload(tmp_path / "executed")
    poison_a_field(last_checkpoint(ranked), payload)
    process = start("train", "--resume", ranked, "--steps", "3", cwd=tmp_path)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "step-00000002 is damaged (.metadata holds posix.mkdir, which no checkpoint" in error
    assert not payload.path.exists()


@pytest.mark.parametrize("poison", [poison_metadata, poison_a_field, poison_a_value])
def test_a_distributed_checkpoint_runs_no_code(
    ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poison
) -> None:
    payload = Payload(tmp_path / "executed")
    poison(last_checkpoint(ranked), payload)
    error = refused(capsys, "train", "--resume", ranked, "--steps", 3)
    assert f"{last_checkpoint(ranked)} is damaged (" in error
    assert "weights_only=False" not in error
    assert not payload.path.exists()


def tear(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-100])


def lead_outside(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def widen(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.norm.weight"].properties.dtype = torch.float64
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def lose_chunks(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.norm.weight"].chunks.clear()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def swap_for_a_pipe(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("*.distcp")
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tear, "distcp is too short"),
        (lead_outside, "outside of the checkpoint"),
        (widen, "model.norm.weight is torch.float64, not torch.float32"),
        (lose_chunks, "model.norm.weight is incomplete"),
        (swap_for_a_pipe, "it is not a file"),
        (lambda path: (path / ".metadata").unlink(), "No such file"),
        (lambda path: (path / ".metadata").write_bytes(b""), "Ran out of input"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps(3)), "is not that of a check"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_distributed_checkpoint(
    ranked: Path, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    damage(last_checkpoint(ranked))
    error = refused(capsys, "train", "--resume", ranked, "--steps", 3)
    assert f"{last_checkpoint(ranked)} is damaged (" in error
    assert message in error
    assert "Remove it to resume from the one before." in error
    shutil.rmtree(last_checkpoint(ranked))
    (ranked / "checkpoints" / "step-foo").mkdir()
    (ranked / "checkpoints" / "step-00000009").symlink_to("/")
    (ranked / "checkpoints" / ".step-00000003").symlink_to(ranked)
    assert main(["train", "--resume", str(ranked), "--steps", "3"]) == 0
    assert "From step 1." in capsys.readouterr().out


def test_checkpoints_are_not_written_elsewhere(
    ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(ranked / "checkpoints", tmp_path / "elsewhere")
    (ranked / "checkpoints").symlink_to(tmp_path / "elsewhere")
    error = refused(capsys, "train", "--resume", ranked, "--steps", 3)
    assert f"cannot write {ranked}/checkpoints: it is not a folder of this run" in error
