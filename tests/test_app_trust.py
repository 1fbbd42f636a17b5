"""The command trusts nothing that it reads, and loses nothing that it made."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
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
