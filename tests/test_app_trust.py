"""The command trusts nothing that it reads, and loses nothing that it made."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

import revnet
from revnet.app.case import Case
from revnet.app.checkpoint_reader import CheckpointReader
from revnet.app.cli import main
from revnet.app.plots import sample_grid
from revnet.app.terminal import visible, visible_line

TINY = ("--depth", "1", "--width", "32", "--batch", "4", "--device", "cpu")
SHORT = (*TINY, "--context", 16)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on six images with a plan, saved at step 2; its folder is copied for each test."""
    root = tmp_path_factory.mktemp("original")
    images = ("--image-size", "8", "--codes", "8", "--memory", "8MiB", "--steps", "2")
    made = str(make_pictures(root / "images"))
    assert main(["train", made, *TINY, *images, "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture(scope="module")
def original_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a text, saved at step 1."""
    root = tmp_path_factory.mktemp("original_text")
    (root / "text").write_text("abcd" * 500)
    options = (*map(str, SHORT), "--steps", "1", "--out", str(root / "run"))
    assert main(["train", str(root / "text"), *options]) == 0
    return root / "run"


def make_pictures(root: Path) -> Path:
    """Make a folder of six images with captions."""
    root.mkdir()
    for i in range(6):
        pixels = np.full((8, 8, 3), 40 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"grey {i}\n")
    return root


def start(*arguments: object, cwd: Path, **more: object) -> subprocess.Popen[str]:
    """Start the real command."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen(
        [sys.executable, "-m", "revnet", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        **settings,
    )


def wait_for(path: Path, process: subprocess.Popen[str], lines: int = 0) -> None:
    """Wait until a file is there, and has that many lines."""

    def there() -> bool:
        return path.exists() and path.read_bytes().count(b"\n") >= lines

    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not there() and process.poll() is None:
        time.sleep(0.05)
    assert there(), process.stderr.read()


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
def nobody() -> Iterator[None]:
    """The superuser may read anything, so the test is run as somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("abcd" * 500)
    return path


def test_neither_a_closed_output_nor_a_hangup_loses_a_training(
    pictures: Path, tmp_path: Path
) -> None:
    # Pictures of the loss take longer than the steps.
    options = ("train", pictures, *TINY, "--image-size", 8, "--validate-every", 10_000, "--out")
    # The tests themselves may run under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    closed = start(*options, "closed", "--steps", 1_000_000, cwd=tmp_path)
    closed.stdout.close()
    # As nohup does.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with open("/dev/full", "w") as full:
        ignoring = start(*options, "full", "--steps", 100, cwd=tmp_path, stdout=full)
    signal.signal(signal.SIGHUP, before)
    with closing_processes(closed, ignoring):
        for name, process in {"closed": closed, "full": ignoring}.items():
            # The first line is of before the first step.
            wait_for(tmp_path / name / "metrics.jsonl", process, lines=2)
            # A shell and the kernel both send one.
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGHUP)
        check_ends(tmp_path, closed, ignoring)


@contextmanager
def closing_processes(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """End processes that a failed test would leave behind."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            with process:
                pass


def check_ends(
    tmp_path: Path, closed: subprocess.Popen[str], ignoring: subprocess.Popen[str]
) -> None:
    for name, process, code in (("closed", closed, 130), ("full", ignoring, 0)):
        error = process.stderr.read()
        assert process.wait(timeout=200) == code, error
        assert error.startswith("revnet: cannot show progress any more, but go on and save: ")
        assert error.count("\n") == 1
        step = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"]
        assert step == 100 if name == "full" else step > 0
    assert (tmp_path / "full" / "result.json").exists()


def test_text_for_a_full_disk_is_not_lost_in_silence(
    original_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = original_text
    capsys.readouterr()
    with open("/dev/full", "w") as full, redirect_stdout(full):
        assert main(["sample", str(run)]) == 1
    assert capsys.readouterr().err.startswith("revnet: cannot print what was drawn: No space")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, redirect_stdout(closed):
        assert main(["sample", str(run)]) == 0
    assert capsys.readouterr().err == ""


def test_what_no_terminal_hears_is_still_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    assert main(["sample", str(tmp_path)]) == 2
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["sample", str(tmp_path)]) == 2


def test_one_training_at_a_time_has_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\n"
            "from revnet.app.lock import locked\n"
            "with locked(pathlib.Path(sys.argv[1])):\n"
            "    print(flush=True), sys.stdin.read()",
            run,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        holder.stdout.readline()
        error = refused(capsys, "train", "--resume", run, "--steps", 3)
        assert f"{run} is in use by process {holder.pid}, which trains there" in error
        # Readers need no lock.
        assert main(["sample", str(run), "grey", "--each", "1"]) == 0
        holder.kill()
    # The file of a killed process locks nothing.
    assert (run / ".revnet-lock").exists()
    (run / ".revnet-partial-1").touch()
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert not list(run.glob(".*"))


def test_a_lock_is_no_link(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (run / ".revnet-lock").symlink_to(mine)
    error = refused(capsys, "train", "--resume", run, "--steps", 3)
    assert f"cannot write {run}/.revnet-lock" in error
    assert mine.read_text() == "mine"
    (run / ".revnet-lock").unlink()
    os.mkfifo(run / ".revnet-lock")
    assert "it is not a file" in refused(capsys, "train", "--resume", run, "--steps", 3)


def test_a_folder_of_something_else_is_left_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.safetensors").write_text("mine")
    error = refused(capsys, "train", text, *SHORT, "--steps", 1, "--out", other)
    assert f"{other} is neither empty nor the folder of a run: choose another --out" in error
    assert [path.name for path in other.iterdir()] == ["weights.safetensors"]
    assert (other / "weights.safetensors").read_text() == "mine"


def test_a_read_only_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr("revnet.app.lock._acquire", refuse)
    error = refused(capsys, "train", text, *SHORT, "--steps", 1, "--out", tmp_path / "run")
    assert error == f"revnet: cannot write {tmp_path}/run/.revnet-lock: Read-only file system\n"


def test_names_and_outputs_that_are_not_utf_8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run = tmp_path / "caf\udce9 \x1b[2J", tmp_path / "run\udcff"
    text.write_text("abcd" * 500)
    options = ("train", text, *SHORT, "--steps", 1, "--out", run)
    with (
        open(tmp_path / "output", "w", encoding="ascii") as ascii_only,
        redirect_stdout(ascii_only),
    ):
        assert main([*map(str, options)]) == 0
        assert main(["sample", str(run), "é"]) == 0
    output = (tmp_path / "output").read_text()
    assert output.startswith("caf\\xe9 \\x1b[2J: 117 examples")
    assert f"{tmp_path}/run\\xff" in output
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.usefixtures("nobody")
def test_subfolders_that_cannot_be_read_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "text").write_text("abcd" * 500)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0)
        error = refused(capsys, "train", folder, *SHORT, "--steps", 1)
        assert f"cannot read the folder {folder}/closed: Permission denied" in error
    finally:
        (folder / "closed").chmod(0o700)
        shutil.rmtree(folder)


# What it reads


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures")


def png_of(width: int, height: int) -> bytes:
    """Return a valid PNG of `width` × `height` grey pixels, without making them in memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    # Zeros compress to blocks that can be repeated; their checksum is known.
    zeros, block = height * (width + 1), 2**20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    repeated = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = packer.compress(bytes(zeros % block)) + packer.flush()
    checksum = struct.pack(">I", (zeros % 65521) << 16 | 1)
    rows = b"\x78\xda" + repeated * (zeros // block) + rest + checksum
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
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


# The last two are as large as a smaller image; one has millions of rows, the other one long row.
@pytest.mark.parametrize(
    ("width", "height"), [(8193, 8193), (13_300, 13_300), (13_400, 13_400), (1, 2**26), (2**26, 1)]
)
def test_sizes_are_checked_before_decoding(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int, height: int
) -> None:
    (pictures / "0.png").write_bytes(png_of(width, height))
    # Of the processor, as others may keep it busy.
    start = time.process_time()
    error = refused(capsys, "train", pictures, *TINY, "--image-size", 8, "--out", tmp_path / "run")
    assert time.process_time() - start < 5
    assert f"the image {pictures}/0.png is too large: at most 67,108,864 pixels and 65,536" in error


def test_what_pillow_thinks_of_metadata_is_not_shown(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = png_of(8, 8)
    exif = b"eXIf" + b"MM\0*\0\0\0\x08\xff\xff" + bytes(1000)
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    (pictures / "0.png").write_bytes(content[:33] + chunk + content[33:])
    options = (*TINY, "--image-size", "8", "--steps", "1", "--out", str(tmp_path / "run"))
    with warnings.catch_warnings():
        # As outside of the tests.
        warnings.simplefilter("default")
        assert main(["train", str(pictures), *options]) == 0
    assert capsys.readouterr().err == ""


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


def blank(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("*.distcp")
    path.write_bytes(bytes(path.stat().st_size))


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
        (blank, "it holds more than tensors and numbers"),
        (swap_for_a_pipe, "it is not a file"),
        (lambda path: (path / ".metadata").unlink(), "No such file"),
        (lambda path: (path / ".metadata").write_bytes(b""), "exhausted before seeing STOP"),
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
    assert "weights_only" not in error
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


# Escape sequences


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[31m\tb\n\x9b\u202e\udce9é") == "a\\x1b[31m\tb\n\\x9b\\u202e\\xe9é"
    assert visible_line("a\r\nb") == "a\\r\\nb"


def test_messages_steer_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "sample", tmp_path / "\x1b[2J\nrevnet: all is well")
    assert "\\x1b[2J\\nrevnet: all is well is not the folder of a run" in error


def test_wrong_options_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sample", "run", "--each", "\x1b[2J"])
    assert end.value.code == 2
    assert "\x1b" not in capsys.readouterr().err


def test_generated_text_steers_no_terminal(
    original_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = original_text
    capsys.readouterr()
    assert main(["sample", str(run), "\x1b]0;a\x07"]) == 0
    assert capsys.readouterr().out.startswith("\\x1b]0;a\\x07")


@pytest.mark.parametrize(
    "caption", ["x" * 10_000_000, "a\nb", "\x1b[31m"], ids=["long", "lines", "escape"]
)
def test_captions_are_cut_in_pictures(tmp_path: Path, caption: str) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        sample_grid(file, [caption], [("", np.zeros((1, 1, 8, 8, 1), dtype=np.uint8))])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width < 1000


# Damaged and foreign run folders


def change(path: Path, **fields: object) -> None:
    found = json.loads(path.read_text())
    for name, value in fields.items():
        if value == REMOVED:
            del found[name]
        else:
            found[name] = value
    path.write_text(json.dumps(found))


REMOVED = "<removed>"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config.json", {"depth": "1"}, "depth is '1', not an integer"),
        ("config.json", {"depth": 10**9}, "--depth is 1000000000, which is too large"),
        ("config.json", {"width": True}, "width is True, not an integer"),
        ("config.json", {"lr": float("inf")}, "lr is inf, not a finite number"),
        ("config.json", {"memory": 3}, "memory is 3, not a text, or null"),
        ("config.json", {"lr": 10**400}, "not a finite number"),
        ("config.json", {"data": "digits"}, "data is 'digits', not a list"),
        ("config.json", {"data": ["a\0b"]}, "data is "),
        ("config.json", {"execution": "explode"}, "execution is 'explode', not one of invert"),
        ("config.json", {"streams": []}, "streams is"),
        ("config.json", {"shape": {}}, "it has no 'depth'"),
        ("config.json", {"batch": REMOVED}, "it has no 'batch'"),
        ("config.json", {"threads": 2**40}, "--threads is 1099511627776, which is too large"),
        ("config.json", {"colour": 1}, "it has an unknown field 'colour'"),
        ("config.json", {"report_to": "file:///"}, "report_to is 'file:///', not one of none, t"),
        ("config.json", {"tracked": "a"}, "tracked is 'a', not an object of names"),
        ("config.json", {"tracked": {"x": "a"}}, "tracked is {'x': 'a'}, not an object of names"),
        ("config.json", {"tracked": {"wandb": 3}}, "tracked is {'wandb': 3}, not an object"),
        ("config.json", {"tracked": {"wandb": ""}}, "tracked is {'wandb': ''}, not an object"),
        ("config.json", {"tracked": {"wandb": "../x"}}, "tracked is {'wandb': '../x'}, not an"),
        ("config.json", {"tracked": {"mlflow": "a\nb"}}, "tracked is {'mlflow': 'a\\nb'}, not"),
        ("data.json", {"kind": "code"}, "kind is 'code', not 'images' or 'text'"),
        ("data.json", {"kind": "text"}, "in config.json"),
        ("data.json", {"words": ["\ud800"]}, "words is"),
        ("data.json", {"words": REMOVED}, "it has no 'words'"),
        ("data.json", {"codes": [[1, 2], [3]]}, "codes are no regular lists"),
        ("data.json", {"codes": [[[[256]]]]}, "codes are not patches of numbers from 0 to 255"),
        ("data.json", {"codes": [[[["a"]]]]}, "codes are not patches"),
        ("data.json", {"rows": 10**9}, "rows is 1000000000, not an integer from 1 to 8,192"),
        ("data.json", {"rows": 9}, "its rows is 9, but 4 in config.json"),
        ("data.json", {"show": []}, "show is [], not a list of 1 to 1,000"),
    ],
    ids=str,
)
def test_fields_are_checked(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, fields: dict, message: str
) -> None:
    change(run / name, **fields)
    for command in (("sample", run, "grey"), ("train", "--resume", run, "--steps", 3)):
        error = refused(capsys, *command)
        assert f"cannot read {run / name}: " in error
        assert message in error
        assert error.endswith("It is damaged, or not this program's.\n")


@pytest.mark.parametrize("name", ["config.json", "data.json", "plan.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}\n"])
def test_files_that_are_no_json(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    if name == "plan.json":
        change(run / "config.json", memory="8MiB")
    (run / name).write_bytes(content + b"\n")
    assert str(run / name) in refused(capsys, "train", "--resume", run, "--steps", 3)


@pytest.mark.parametrize(
    "row", ["3", "{}", '{"step": "1"}', '{"step": 1, "bits": []}', '{"step": 1, "seconds": NaN}']
)
def test_rows_of_metrics_are_checked(
    run: Path, capsys: pytest.CaptureFixture[str], row: str
) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    error = refused(capsys, "train", "--resume", run, "--steps", 3)
    assert f"cannot read {run}/metrics.jsonl: " in error
    assert "Remove it to go on without it." in error


@pytest.mark.parametrize(
    "name", ["config.json", "data.json", "weights.safetensors", "checkpoint.pt", "metrics.jsonl"]
)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_only_files_are_read(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).symlink_to(kind)
    command = ("train", "--resume", run, "--steps", 3)
    if name == "weights.safetensors":
        command = ("sample", run, "grey")
    assert "it is not a file" in refused(capsys, *command)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.double(), "is torch.float64 [32], not torch.float32 [32]"),
        (lambda w: w.to(torch.int8), "is torch.int8 [32], not torch.float32 [32]"),
        (lambda w: w[:16].clone(), "is torch.float32 [16], not torch.float32 [32]"),
        (lambda w: w.fill_(torch.nan), "norm.weight contains NaN or infinity"),
    ],
    ids=["float64", "int8", "shape", "nan"],
)
def test_weights_are_checked(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Callable, message: str
) -> None:
    weights = weights_of(run)
    weights["norm.weight"] = spoil(weights["norm.weight"])
    save_file(weights, run / "weights.safetensors")
    error = refused(capsys, "sample", run, "grey")
    assert f"{run}/weights.safetensors is damaged (" in error
    assert message in error
    weights["other"] = weights.pop("norm.weight")
    save_file(weights, run / "weights.safetensors")
    assert "it holds other tensors than this network's" in refused(capsys, "sample", run, "grey")


def spoil_dtype(state: dict) -> None:
    state["model"]["norm.weight"] = state["model"]["norm.weight"].double()


def spoil_average(state: dict) -> None:
    state["optimizer"]["state"][0]["exp_avg"].fill_(torch.inf)


def spoil_layout(state: dict) -> None:
    state["model"]["norm.weight"] = state["model"]["norm.weight"].to_sparse()


def spoil_place(state: dict) -> None:
    state["model"]["norm.weight"] = state["model"]["norm.weight"].to("meta")


def spoil_square(state: dict) -> None:
    state["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1)


def spoil_count(state: dict) -> None:
    state["optimizer"]["state"][0]["step"].fill_(-5)


def spoil_names(state: dict) -> None:
    state["optimizer"]["state"][0]["more"] = 1


# Torch says these when it loads the sparse tensor: up to 2.12 the first, since 2.14 the other.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_dtype, "norm.weight is torch.float64 [32], not torch.float32 [32]"),
        (spoil_average, "exp_avg contains NaN or infinity"),
        (spoil_layout, "norm.weight is not a tensor with all of its numbers"),
        (spoil_place, "norm.weight is not a tensor with all of its numbers"),
        (spoil_square, "it has a negative number of steps or average of squares"),
        (spoil_count, "it has a negative number of steps or average of squares"),
        (spoil_names, "it holds other tensors than this network's"),
        (lambda state: state.pop("step"), "its step is no number of steps"),
        (lambda state: state.update(step=-1), "its step is no number of steps"),
        (lambda state: state["optimizer"]["state"].pop(0), "the state of another optimizer"),
        (lambda state: state.update(optimizer=[]), "it has no state of the optimizer"),
        (lambda state: state.update(model=3), "it holds other tensors"),
    ],
    ids=[
        "dtype",
        "nan",
        "sparse",
        "meta",
        "square",
        "count",
        "names",
        "no step",
        "step",
        "fewer",
        "list",
        "number",
    ],
)
def test_checkpoints_are_checked(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Callable, message: str
) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    spoil(state)
    torch.save(state, run / "checkpoint.pt")
    error = refused(capsys, "train", "--resume", run, "--steps", 3)
    assert f"{run}/checkpoint.pt is damaged ({message}" in error or message in error


def test_a_checkpoint_runs_no_code_and_no_message_says_how(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payload = Payload(tmp_path / "executed")
    torch.save({"step": payload}, run / "checkpoint.pt")
    error = refused(capsys, "train", "--resume", run, "--steps", 3)
    assert "it holds more than tensors and numbers" in error
    assert "weights_only" not in error
    assert not payload.path.exists()


def test_settings_of_the_optimizer_are_the_programs_own(run: Path) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["optimizer"]["param_groups"] = [{"lr": torch.inf, "betas": "x", "params": []}]
    torch.save(state, run / "checkpoint.pt")
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0


def test_links_are_not_followed_by_what_writes(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    names = ["samples.png", "loss.png", "result.json", "sample.png", ".samples.png.partial"]
    names += [f".{name}.partial" for name in ("config.json", "checkpoint.pt", "metrics.jsonl")]
    for name in names:
        (mine / name).write_text("mine")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine / name)
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert main(["sample", str(run), "grey", "--each", "1"]) == 0
    assert {(mine / name).read_text() for name in names} == {"mine"}


def test_tensorboard_writes_nowhere_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    mine = tmp_path / "mine"
    mine.mkdir()
    (run / "tensorboard").symlink_to(mine)
    reported = ("--report-to", "tensorboard")
    error = refused(capsys, "train", "--resume", run, "--steps", 3, *reported)
    assert f"cannot write {run}/tensorboard: it is not a folder of this run" in error
    assert not list(mine.iterdir())


def test_tensorboard_in_a_folder_whose_name_is_not_utf_8(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    other = run.rename(run.with_name("run\udcff"))
    reported = ("--report-to", "tensorboard")
    error = refused(capsys, "train", "--resume", other, "--steps", 3, *reported)
    assert "--report-to tensorboard needs a run folder whose name is UTF-8" in error


@pytest.mark.parametrize("output", ["/dev/full", "pipe"])
def test_help_that_nobody_reads(output: str) -> None:
    if output == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    command = [sys.executable, "-m", "revnet", "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_without_text_does_not_crash_its_handler(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch, "load", fail)
    error = refused(capsys, "train", "--resume", run, "--steps", 3)
    assert f"{run}/checkpoint.pt is damaged (RuntimeError)" in error


# Mutated run folders

VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    2**40,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\0b",
    "\ud800",
)
VALUES += ([], {}, [[]], [None], ["\x1b[2J"], {"a": 1})
FILES = ("config.json", "data.json", "metrics.jsonl", "plan.json", "checkpoint.pt")
FILES += ("weights.safetensors",)
KINDS = ("fifo", "zero", "nowhere", "folder", "missing", "empty", "nested")


def replace_by(path: Path, kind: str) -> None:
    """Put something else where a file is."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "nowhere":
        path.symlink_to("/nowhere/at/all")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "nested":
        path.write_text("[" * 100_000)


def flip(path: Path, places: list[float]) -> None:
    content = bytearray(path.read_bytes())
    for place in places:
        content[int(place * len(content))] ^= 1 << int(place * 997) % 8
    path.write_bytes(content)


def change_json(path: Path, place: float, value: object) -> None:
    """Change the value at a random place of a JSON file, or remove it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = int(place * len(lines))
    whole = json.loads(lines[number])
    found: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in entries:
            found.append((node, key))
            # Of thousands of numbers one stands for all.
            if isinstance(child, dict | list) and len(found) < 300:
                walk(child)

    walk(whole)
    node, key = found[int((place * 7919) % 1 * len(found))]
    if value == REMOVED:
        del node[key]
    else:
        node[key] = value
    lines[number] = json.dumps(whole)
    path.write_text("\n".join(lines) + "\n")


PLACES = st.floats(0, 1, exclude_max=True)
JSON_FILES = tuple(name for name in FILES if ".json" in name)
MUTATIONS = st.one_of(
    st.tuples(
        st.just(change_json),
        st.sampled_from(JSON_FILES),
        PLACES,
        st.sampled_from((REMOVED, *VALUES)),
    ),
    st.tuples(st.just(flip), st.sampled_from(FILES), st.lists(PLACES, min_size=1, max_size=3)),
    st.tuples(st.just(replace_by), st.sampled_from(FILES), st.sampled_from(KINDS)),
)
COMMANDS = {
    "sample": ("sample", "{run}", "grey", "--each", "1"),
    "train": ("train", "--resume", "{run}", "--steps", "3"),
    "plan": ("plan", "{run}", "--memory", "50%", "--out", "{run}/new.png"),
}


@settings(max_examples=300)
@given(
    command=st.sampled_from(sorted(COMMANDS)), mutations=st.lists(MUTATIONS, min_size=1, max_size=2)
)
def test_mutated_run_folders_end_well(
    original: Path, tmp_path: Path, command: str, mutations: list[tuple]
) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(original, run, ignore=shutil.ignore_patterns("*.png"))
    for mutate, name, *how in mutations:
        if (run / name).is_file() and not (run / name).is_symlink():
            # An earlier mutation may have left no JSON to mutate.
            with suppress(ValueError, IndexError):
                mutate(run / name, *how)
    errors, arguments = io.StringIO(), [part.format(run=run) for part in COMMANDS[command]]
    with pytest.MonkeyPatch.context() as patch:
        # These read nothing of the folder, and take most of the time.
        plan = revnet.Plan.load(original / "plan.json")
        patch.setattr(Case, "make_plans", lambda case, model, budgets: [plan for _ in budgets])
        patch.setattr("revnet.app.report.measure_executions", lambda training: [])
        # A changed `compile` is no damage, but would take a minute.
        patch.setattr(torch.nn.Module, "compile", lambda module: None)
        for name in (
            "report.close",
            "report.draw_samples",
            "training.loss_plot",
            "plan._plot_curve",
        ):
            patch.setattr(f"revnet.app.{name}", lambda *_: None)
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            code = main(arguments)
    lines = errors.getvalue().splitlines()
    if code == 0:
        # What a changed list of words does not know.
        lines = [line for line in lines if not line.startswith("revnet: left out of ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), lines
    assert all(line.startswith("revnet: ") and "\x1b" not in line for line in lines)


@settings(max_examples=300)
@given(places=st.lists(PLACES, min_size=1, max_size=4))
def test_mutated_metadata_is_read_or_refused(
    distributed: Path, tmp_path: Path, places: list[float]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir()
    for path in last_checkpoint(distributed).iterdir():
        # Only .metadata is changed.
        (checkpoint / path.name).symlink_to(path)
    content = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").unlink()
    (checkpoint / ".metadata").write_bytes(content)
    flip(checkpoint / ".metadata", places)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = None
    with suppress(Exception):
        found = CheckpointReader(checkpoint).read_metadata()
    assert found is None or isinstance(found, Metadata)
    # In KiB; a changed number must not ask for any amount of memory.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17
