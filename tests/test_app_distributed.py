"""The command on several ranks, with real processes: curves, checkpoints, a killed rank, a restart."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from revnet.app.data import step_batch

pytest.importorskip("sklearn")

STEPS = 20
SMALL = {"depth": 1, "width": 32, "heads": 1, "batch": 8, "dropout": 0.0, "device": "cpu"}
SMALL |= {"steps": STEPS, "save_every": STEPS, "validate_every": STEPS}
CURVES = {"ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp"}, "planned": {"memory": "4MiB", "parallel": "fsdp"}}


def rows(run: Path) -> dict[int, float]:
    """The logged loss by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["bits"] for row in lines if "bits" in row}


def held_out(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out_bits"] for row in lines if "held_out_bits" in row]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(rank: int, world: int, ports: list[int], runs: list[tuple[dict[str, Any], str | None]]) -> None:
    torch.set_num_threads(1)
    from revnet.app import parallel

    for port, (given, resumed) in zip(ports, runs, strict=True):
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        assert parallel.train(given, resumed) == 0


def train_on(world: int, *runs: tuple[dict[str, Any], str | None]) -> None:
    """Trains one after the other on `world` ranks."""
    mp.spawn(_rank, (world, [free_port() for _ in runs], list(runs)), nprocs=world)


def train_alone(given: dict[str, Any], resumed: str | None = None) -> None:
    from revnet.app.display import Display
    from revnet.app.train import Training, loop, resume, start

    training = resume(resumed, given, Training) if resumed else start(given, Training)
    with Display(training.config.steps, "token", quiet=True) as display:
        loop(training, display, lambda: False)
    training.save()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, and of two ranks by DDP, by FSDP2, and by a plan."""
    folder = tmp_path_factory.mktemp("runs")
    train_alone(SMALL | {"out": str(folder / "one")})
    train_on(2, *((SMALL | more | {"out": str(folder / name)}, None) for name, more in CURVES.items()))
    return folder


@pytest.mark.parametrize("name", CURVES)
def test_curve_of_one_process(name: str, folder: Path) -> None:
    one, two = rows(folder / "one"), rows(folder / name)
    assert len(one) == 3
    assert one.keys() == two.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert held_out(folder / name) == pytest.approx(held_out(folder / "one"), rel=1e-5)


@pytest.mark.parametrize("name", CURVES)
def test_weights_for_sampling(name: str, folder: Path) -> None:
    one, two = (load_file(folder / run / "weights.safetensors") for run in ("one", name))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-3)


def test_resumes_on_another_number_of_ranks(folder: Path) -> None:
    """Shards of two ranks, continued on one; and the state of one DDP rank, continued as shards."""
    more = 2 * STEPS
    train_alone({"steps": more}, str(folder / "one"))
    train_on(
        1,
        ({"steps": more, "parallel": "ddp"}, str(folder / "fsdp")),
        ({"steps": more, "parallel": "fsdp"}, str(folder / "ddp")),
    )
    one = rows(folder / "one")
    assert max(one) == more
    for name in ("fsdp", "ddp"):
        assert list(rows(folder / name).values()) == pytest.approx(list(one.values()), rel=1e-5)


class _Indices:
    counts: ClassVar = {"train": 37}

    def batch(self, split: str, indices: Any, draws: Any) -> tuple[Any, Any]:
        return indices, draws


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_batches_without_overlap(world: int) -> None:
    for step in range(12):
        whole = step_batch(_Indices(), step, 8, seed=3)
        parts = [step_batch(_Indices(), step, 8, 3, rank, world) for rank in range(world)]
        for both, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert sorted(both) == sorted(np.concatenate(pieces))
            assert {len(piece) for piece in pieces} == {8 // world}


def start_torchrun(out: Path, restarts: int, steps: int = 40, save_every: int = 5) -> subprocess.Popen[str]:
    settings = SMALL | {"steps": steps, "save_every": save_every, "validate_every": steps, "out": out}
    settings |= {"parallel": "fsdp", "rank_timeout": 60}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *launch, "-m", "revnet", "train", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(agent: int) -> list[int]:
    """The ranks that torchrun started, by their environment: {rank: pid} in order."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_rank_and_restart(tmp_path: Path) -> None:
    """kill -9 of one rank ends the other with a message; torchrun restarts both, and every loss is as without."""
    whole = start_torchrun(tmp_path / "whole", restarts=0)
    assert whole.wait(120) == 0, whole.communicate()[0]
    whole.communicate()
    broken = start_torchrun(tmp_path / "broken", restarts=1)
    checkpoints = tmp_path / "broken" / "checkpoints"
    end = time.monotonic() + 100
    while not list(checkpoints.glob("step-*")):
        assert time.monotonic() < end, "no checkpoint in time"
        assert broken.poll() is None
        time.sleep(0.02)
    os.kill(workers(broken.pid)[1], signal.SIGKILL)
    output = broken.communicate(timeout=150)[0]
    assert broken.returncode == 0, output
    assert "lost another rank" in output, output
    resumed = [int(line.split("From step ")[1].split(".")[0]) for line in output.splitlines() if "From step" in line]
    assert len(resumed) == 1
    assert resumed[0] >= 5
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    one, two = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "broken"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(checkpoints.glob(".step-*")), "a half-written checkpoint was left"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_interrupt_stops_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path / "run", restarts=1, steps=100_000, save_every=100_000)
    end = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < end, "no step in time"
        time.sleep(0.05)
    # One rank hears of it, and tells the other.
    os.kill(workers(run.pid)[1], signal.SIGTERM)
    end = time.monotonic() + 60
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert time.monotonic() < end, "no checkpoint in time"
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=60)[0]
    assert "Continue with: revnet train --resume" in output, output
