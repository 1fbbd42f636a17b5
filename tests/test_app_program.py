"""What a new user of the command meets: its screens, its warnings, and its advice."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import revnet
from revnet.app import threads
from revnet.app.cli import main
from revnet.app.data import Words
from revnet.app.display import Display
from revnet.app.plots import figure, loss_plot, sample_grid

TINY = ("--depth", "1", "--width", "32", "--batch", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a text with its output beside it."""
    root = tmp_path_factory.mktemp("texts")
    (root / "text").write_text("abcd" * 500)
    options = ("--context", "16", "--steps", "4", "--save-every", "2", "--validate-every", "1")
    before = Path.cwd()
    os.chdir(root)
    try:
        with (root / "output").open("w") as output, redirect_stdout(output):
            assert main(["train", "text", *TINY, *options, "--out", "run"]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "images").mkdir()
    for i in range(6):
        path = root / "images" / f"{i}.png"
        Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(path)
        # With its mark, UTF-16 is read.
        path.with_suffix(".txt").write_text(f"grey number {i}\n", encoding="utf-16")
    options = ("--image-size", "8", "--codes", "8", "--steps", "1", "--out", str(root / "run"))
    with redirect_stdout(io.StringIO()):
        assert main(["train", str(root / "images"), *TINY, *options]) == 0
    return root


@pytest.fixture
def run(texts: Path, tmp_path: Path) -> Path:
    return shutil.copytree(texts / "run", tmp_path / "run")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("revnet: ")
    assert error.count("\n") == 1
    return error


# Memory


def test_what_blocks_keep_stands_apart(texts: Path) -> None:
    """Of a text, embeddings are most of the memory: the table shows what is saved all the same."""
    output = (texts / "output").read_text()
    assert "Above weights, gradients and optimizer state." in output
    result = json.loads((texts / "run" / "result.json").read_text())
    rows = {row["name"]: row for row in result["memory"]}
    assert rows["reversible"]["blocks"] < 0.2 * rows["stored"]["blocks"]
    others = {row["kept"] - row["blocks"] for row in rows.values()}
    assert len(others) == 1
    assert min(others) > 0


def test_gradients_are_no_activations_in_any_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wide and short: gradients take 48 times as much as activations."""
    wide = ("--depth", "2", "--width", "256", "--tokens", "4", "--batch", "1", "--meta")
    out = tmp_path / "plan.png"
    peaks = {}
    for memory in ("minimum", "stored"):
        assert main(["plan", *wide, "--memory", memory, "--out", str(out)]) == 0
        plan = revnet.Plan.load(out.with_suffix(".json"))
        peaks[memory] = plan.peak_bytes
        gradients = 4 * 12 * 2 * 256**2
        assert plan.peak_bytes < gradients / 2
    capsys.readouterr()
    # Weights, gradients and averages, and activations beside them.
    parameters = 4 * (2 * (12 * 256**2 + 9 * 256) + 256 * 256 * 2 + 4 * 256 + 512)
    fits = parameters * 4 + peaks["stored"] + 2**20
    assert main(["plan", *wide, "--device-memory", str(fits), "--out", str(out)]) == 0
    assert set(revnet.Plan.load(out.with_suffix(".json")).executions) == {"store"}


def test_a_refused_budget_leaves_no_folder(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("train", pictures / "images", *TINY, "--image-size", "8", "--memory", "1KiB")
    assert "no plan is within 1.00 KiB" in refused(capsys, *small)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    refused(capsys, *small, "--out", "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


# Sampling


def test_sample_says_what_it_leaves_out(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(name: str, *captions: str) -> tuple[bytes, str]:
        out = tmp_path / f"{name}.png"
        sampling = ("--each", "1", "--temperature", "1", "--out", str(out))
        assert main(["sample", str(pictures / "run"), *captions, *sampling]) == 0
        with Image.open(out) as picture:
            return picture.crop((picture.width - 60, 0, *picture.size)).tobytes(), (
                capsys.readouterr().err
            )

    known, silent = sample("known", "grey number 3")
    more, warned = sample("more", "grey violet number 3")
    assert silent == ""
    assert warned == (
        "revnet: left out of 'grey violet number 3', because not known to this run: violet\n"
    )
    assert more == known
    _, warned = sample("long", "grey number 3 grey 4")
    assert "because more than captions hold: grey, 4\n" in warned


def test_words_that_training_saw_as_bytes_are_read_as_bytes() -> None:
    words = Words([f"w{i}" for i in range(4096)], 8)
    tokens, unknown, cut = words.read("w3 zz w4")
    assert (len(tokens), unknown, cut) == (4, [], [])


def test_the_default_prompt_is_shorter_than_the_context(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompt,) = json.loads((run / "data.json").read_text())["show"]
    assert len(prompt.encode()) == 8
    for length in (16, 2):
        assert main(["sample", str(run), "--length", str(length)]) == 0
        assert capsys.readouterr().out.startswith(prompt[: length // 2])
    error = refused(capsys, "sample", run, "--length", "17")
    assert "beyond which the network has learned nothing: train with a larger --context" in error
    assert "give a file that ends in .png" not in error


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("pictures", "--length", "--length is for texts, and this run draws images"),
        ("texts", "--each", "--each is for images, and this run continues texts"),
    ],
)
def test_options_of_the_other_kind_of_run(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    option: str,
    message: str,
) -> None:
    run = request.getfixturevalue(kind) / "run"
    assert message in refused(capsys, "sample", run, option, "4")


def test_sample_needs_a_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample"])
    assert capsys.readouterr().err.endswith("the following arguments are required: RUN\n")


def test_pictures_have_names_that_end_in_png(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "sample", pictures / "run", "grey", "--out", "s.xyz")
    assert error == "revnet: --out s.xyz: give a file that ends in .png\n"


# Run folders


def test_config_says_what_made_it(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["revnet"] == revnet.__version__
    assert config["command"] == sys.argv
    assert config["data"] == [str(Path(config["data"][0]).resolve())]


def test_a_run_of_another_version(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "config.json").read_text())
    config |= {"format": "revnet run 9", "versions": {"revnet": "7.0"}}
    (run / "config.json").write_text(json.dumps(config))
    for command in (("sample", run), ("train", "--resume", run), ("plan", run)):
        error = refused(capsys, *command)
        assert "The run is of another version of revnet, 7.0, or its config.json" in error
    del config["format"]
    (run / "config.json").write_text(json.dumps(config))
    assert "it is not of the format 'revnet run 3'" in refused(capsys, "sample", run)


def test_a_run_resumes_from_any_directory(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert "From step 4." in capsys.readouterr().out
    # Given anew, a path means the same from another directory.
    data = json.loads((run / "config.json").read_text())["data"][0]
    monkeypatch.chdir(Path(data).parent)
    assert main(["train", "text", "--resume", str(run), "--steps", "6"]) == 0


def test_samples_in_between_are_kept(texts: Path) -> None:
    names = {path.name for path in (texts / "run").glob("samples*")}
    assert names == {"samples-00000002.txt", "samples.txt"}


# Screens


def test_plain_logs(texts: Path) -> None:
    lines = (texts / "output").read_text().splitlines()
    # On a slow machine there are more in between.
    steps = [line for line in lines if line.startswith("step ")]
    first, last = steps[0], steps[-1]
    held_out = r"8\.000 bits per byte \(\d\.\d+ held out\)"
    assert re.match(rf"step 1/4  {held_out}  [\d,]+ tokens/s  0:\d\d:\d\d left$", first)
    held_out = r"step 4/4  \d\.\d+ bits per byte \((\d\.\d+) held out\)  [\d,]+ tokens/s$"
    rows = (texts / "run" / "metrics.jsonl").read_text().splitlines()
    bits = [row["held_out_bits"] for row in map(json.loads, rows) if "held_out_bits" in row]
    assert re.match(held_out, last)[1] == f"{bits[-1]:.3f}"
    assert re.search(r"\((\d\.\d+) held out\)", first)[1] == f"{bits[0]:.3f}"
    assert "drawing samples …" in lines
    assert "judging held-out text …" in lines
    assert max(map(len, steps)) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_word_is_broken_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    words = " ".join(f"word{i:03}" for i in range(40))
    with redirect_stdout(Terminal()) as screen:
        Display(2, "byte").say(words, wrap=True)
    lines = screen.getvalue().splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80
    assert set(" ".join(lines).split()) == set(words.split())


def screen_of(command: list[str], folder: Path, interrupt: bool) -> str:
    """Run the command in a terminal of 80 columns; return all that it wrote."""
    master, slave = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-m", "revnet", *command],
        cwd=folder,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    found, deadline, told = b"", time.monotonic() + 200, not interrupt
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    found += os.read(master, 2**16)
                except OSError:
                    break
            if not told and (folder / "run" / "metrics.jsonl").exists() and b"tokens/s" in found:
                told = True
                process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return found.decode()


def rows_of(written: str) -> list[str]:
    """Return what a terminal shows in the end: rich moves up, erases, and writes anew."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            if row == len(rows):
                rows.append("")
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            count = int(part[2:-1] or 1) if part[2:-1].isdigit() or part == "\x1b[A" else 0
            if part.endswith("A"):
                row = max(0, row - (count or 1))
            elif part.endswith("K"):
                rows[row] = ""
        else:
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return rows


def test_ctrl_c_leaves_one_bar(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcd" * 500)
    options = ("--context", "16", "--steps", "100000", "--out", "run")
    written = screen_of(["train", "text", *TINY, *options], tmp_path, interrupt=True)
    rows = rows_of(written)
    assert sum("tokens/s" in row for row in rows) == 1, rows
    assert max(map(len, rows)) <= 80
    (stopped,) = (row for row in rows if row.startswith("Stopped at step"))
    step = stopped.split()[3].rstrip(".")
    assert any(row.startswith(f"step {step}/100000 ") for row in rows), rows


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train digits icons", "revnet: digits and icons are data sets: give one data set"),
        ("trian", "revnet: error: argument COMMAND: invalid choice: 'trian' (choose from 'train',"),
    ],
)
def test_no_word_of_an_error_is_broken(tmp_path: Path, command: str, message: str) -> None:
    # Python 3.14 colours the usage.
    rows = rows_of(screen_of(command.split(), tmp_path, interrupt=False))
    assert max(map(len, rows)) <= 80
    assert message in " ".join(rows)


def test_a_bar_begins_at_the_step_that_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stdout(Terminal()) as screen, Display(8, "byte", done=5):
        pass
    assert "step 5/8" in screen.getvalue()


# Threads


def test_threads_that_wait_sleep(tmp_path: Path) -> None:
    code = """
import os, sys
from revnet.app import cli
cli.main([])
print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
        assert found.stdout.endswith(f"{expected} False\n")


def test_a_resumed_run_keeps_its_threads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        for threads, options in ((2, ("--threads", "2")), (2, ())):
            steps = str(json.loads((run / "config.json").read_text())["steps"] + 1)
            torch.set_num_threads(1)
            assert main(["train", "--resume", str(run), "--steps", steps, *options]) == 0
            assert torch.get_num_threads() == threads
            assert f"on {threads} CPU threads" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_overloaded_cores_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.seconds_without_core() >= 0
    wall, waited = [0.0], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: wall[0])
    monkeypatch.setattr(threads, "seconds_without_core", lambda: waited[0])
    watch = threads.Watch()

    def pass_time(seconds: float, share: float) -> str | None:
        wall[0] += seconds
        waited[0] += share * seconds
        return watch.advice()

    assert pass_time(11, 0.1) is None
    assert pass_time(5, 0.9) is None
    found = pass_time(6, 0.9)
    assert found is not None
    assert "this training waits for one 90% of the time" in found
    assert pass_time(11, 0.9) is None


# Advice


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train digits icons", "digits and icons are data sets: give one data set alone"),
        ("train digitz", "Did you mean digits?"),
        ("train --depth 0", "--depth is 0, which is too small: give at least 1"),
        ("train --batch 0", "--batch is 0, which is too small: give at least 1"),
        ("train --codes 1", "--codes is 1, which is too small: give at least 2"),
        ("train --lr 0", "--lr is 0.0, which is too small: give a number above 0"),
        ("train --dropout -1", "--dropout is -1.0, which is too small: give 0 or more"),
        ("train digits --image-size 16", "--image-size is for a folder of your own images, which"),
        ("train digits --context 16", "--context is for texts, which digits is not"),
        ("train one", "the train text has only 0 bytes: it needs twice --context 256"),
        ("train two", "the held-out text has only 1 byte: it needs twice --context 4"),
        ("train wide", "wide is UTF-16, half of whose bytes say nothing: save it as UTF-8"),
        ("train folder", "wide.txt is UTF-16"),
        ("train little", "little is UTF-16, half of whose bytes say nothing: save it as UTF-8"),
        ("train big", "big is UTF-16"),
    ],
)
def test_advice(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").write_text("a")
    (tmp_path / "two").write_text("ab" * 8)
    (tmp_path / "wide").write_text("wide words " * 400, encoding="utf-16")
    # Without its mark it is UTF-16 all the same.
    (tmp_path / "little").write_text("wide words\n" * 400, encoding="utf-16-le")
    (tmp_path / "big").write_text("wide words\n" * 400, encoding="utf-16-be")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "wide.txt").write_text("wide " * 400, encoding="utf-16")
    words = command.split()
    if words[-1] == "two":
        words += ["--context", "4"]
    assert message in refused(capsys, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "Did you mean train?"),
        ("train --dept 3", "unrecognized arguments: --dept. Did you mean --depth?"),
        ("train --execution invrt", "Did you mean invert?"),
        ("sample run --tmperature 3", "Did you mean --temperature?"),
    ],
)
def test_what_may_be_meant(capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_alone_the_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "sample", "compare", "plan"))


# Pictures


def test_pictures_stand_in_frames(tmp_path: Path) -> None:
    white = np.full((1, 2, 8, 8, 1), 255, dtype=np.uint8)
    with (tmp_path / "a.png").open("wb") as file:
        sample_grid(file, ["white"], [("", white)])
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    # Two frames have four upright sides.
    assert (pixels[pixels.shape[0] // 2, -120:] == 0xCC).sum() == 4
    assert (pixels[:, :60] < 128).any()


def test_steps_are_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("revnet.app.plots.figure", lambda: drawn.append(figure()) or drawn[-1])
    loss_plot(io.BytesIO(), [{"step": step, "bits": 1.0 + step} for step in (0, 1, 2)], "byte")
    ticks = drawn[0].axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)
