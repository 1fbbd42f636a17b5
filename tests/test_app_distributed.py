"""The command on several ranks, with real processes: curves, checkpoints, a killed rank, a
restart.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distributed import run_ranks, start_ranks
from revnet.app import parallel, ranks
from revnet.app.data import step_batch
from revnet.app.errors import DataError, MachineError, UserError

pytest.importorskip("sklearn")

STEPS = 20
SMALL = {"depth": 1, "width": 32, "heads": 1, "batch": 8, "dropout": 0.0, "device": "cpu"}
SMALL |= {"steps": STEPS, "save_every": STEPS, "validate_every": STEPS}
# Long enough for something to happen on the way.
LONG = {"steps": 60, "save_every": 10, "validate_every": 60, "parallel": "fsdp", "rank_timeout": 60}
LONG |= {"data": [__file__], "context": 16}
CURVES = {
    "ddp": {"parallel": "ddp", "report_to": "tensorboard"},
    "fsdp": {"parallel": "fsdp"},
    "planned": {"memory": "4MiB", "parallel": "fsdp"},
}


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


def _rank(
    rank: int, world: int, ports: list[int], runs: list[tuple[dict[str, Any], str | None]]
) -> None:
    torch.set_num_threads(1)
    from revnet.app import parallel

    for port, (given, resumed) in zip(ports, runs, strict=True):
        if rank == 0 and resumed is not None and not Path(resumed).exists():
            # The others wait for this rank's store.
            break_off(Path(resumed))
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        assert parallel.train_on_ranks(given, resumed) == 0


def train_on(world: int, *runs: tuple[dict[str, Any], str | None]) -> None:
    """Trains one after the other on `world` ranks."""
    context = start_ranks(_rank, world, world, [free_port() for _ in runs], list(runs))
    while not context.join():
        pass


def train_alone(given: dict[str, Any], resumed: str | None = None) -> None:
    from revnet.app.display import Display
    from revnet.app.train import loop, resume, start
    from revnet.app.training import Training

    training = resume(resumed, given, Training) if resumed else start(given, Training)
    with Display(training.config.steps, "token", quiet=True) as display:
        loop(training, display, lambda: False)
    training.save()


def break_off(run: Path) -> None:
    """Leaves what `kill -9` leaves: the run "whole", whose last checkpoint is half written."""
    shutil.copytree(run.with_name("whole"), run)
    last = run / "checkpoints" / f"step-{STEPS:08}"
    partial = last.rename(last.with_name(f".{last.name}"))
    max(partial.glob("*.distcp"), key=lambda file: file.stat().st_size).write_bytes(b"half")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, of two ranks by DDP, by FSDP2, by a plan, two with dropout, one of them
    resumed as well.
    """
    folder = tmp_path_factory.mktemp("runs")
    train_alone(SMALL | {"out": str(folder / "one")})
    runs = CURVES | {"whole": {"parallel": "fsdp", "dropout": 0.2, "save_every": STEPS // 2}}
    runs |= {"long": LONG | {"dropout": 0.1}}
    given = [(SMALL | more | {"out": str(folder / name)}, None) for name, more in runs.items()]
    train_on(2, *given, ({}, str(folder / "broken")))
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


def test_the_first_rank_reports(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (written,) = (folder / "ddp" / "tensorboard").iterdir()
    events = EventAccumulator(str(written)).Reload()
    found = {event.step: event.value for event in events.Scalars("bits")}
    assert found == pytest.approx(rows(folder / "ddp"))


def test_resumes_bit_for_bit(folder: Path) -> None:
    """Masks and batches follow from seed, step and rank: no generator is saved, and none is
    missed.
    """
    assert rows(folder / "whole") != rows(folder / "fsdp"), "dropout drops nothing"
    assert rows(folder / "broken") == rows(folder / "whole")
    assert_same_weights(folder / "broken", folder / "whole")
    names = sorted(path.name for path in (folder / "broken" / "checkpoints").iterdir())
    assert names == [f"step-{STEPS // 2:08}", f"step-{STEPS:08}"], "the half-written one is left"


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = (load_file(path / "weights.safetensors") for path in (run, other))
    assert all(torch.equal(one[key], two[key]) for key in one | two)


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


@pytest.mark.parametrize("resumed", [True, False])
def test_the_device_is_that_of_the_run(
    folder: Path, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    given, run = ({}, str(folder / "ddp")) if resumed else ({"device": "cpu"}, None)
    with ranks.joined(given, run):
        assert dist.get_backend() == "gloo"
    assert not taken


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


@pytest.mark.parametrize(("error", "said"), [(DataError, True), (UserError, False)])
def test_any_rank_says_what_it_may_have_met_alone(
    monkeypatch: pytest.MonkeyPatch, error: type, said: bool
) -> None:
    def fail(*arguments: object) -> int:
        raise error("the image a.png cannot be decoded")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parallel, "joined", lambda given, resumed: nullcontext(1))
    monkeypatch.setattr(parallel, "_make", fail)
    with pytest.raises(DataError) if said else nullcontext():
        assert parallel.train_on_ranks({}, None) == 2


def _meets(rank: int, world: int, error: type[Exception]) -> None:
    def fail() -> None:
        assert rank == 0
        raise error("the disk is full")

    with pytest.raises(error, match="the disk is full"):
        ranks.from_first(fail)


@pytest.mark.parametrize("error", [UserError, MachineError])
def test_all_ranks_hear_what_the_first_one_meets(error: type[Exception]) -> None:
    run_ranks(_meets, 2, error)


def test_ranks_agree_which_start_this_is() -> None:
    """Through a store that outlives them, whichever rank is late, and after a start in which some
    never came.
    """
    from revnet.app.ranks import count_attempts

    store = dist.HashStore()

    def started(ranks: dict[int, float], seconds: float = 20) -> list[Any]:
        def one(rank: int, late: float) -> Any:
            time.sleep(late)
            try:
                return count_attempts(store, rank, 3, timedelta(seconds=seconds))
            except dist.DistStoreError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, ranks, ranks.values()))

    late = "timed out waiting for 3 ranks to start"
    assert started({0: 0, 1: 0, 2: 0}) == [1, 1, 1]
    assert started({0: 0.2, 1: 0, 2: 0.1}) == [2, 2, 2]
    assert started({0: 0, 2: 0}, seconds=0.3) == [late, late]
    assert started({0: 0.1, 1: 0, 2: 0.2}) == [4, 4, 4]
    assert started({1: 0, 2: 0}, seconds=0.3) == [late, late]
    assert started({0: 0.2, 1: 0, 2: 0}) == [5, 5, 5]


Running = subprocess.Popen[str]


def start_command(
    out: Path, *launch: str, environment: Mapping[str, str] = {}, **settings: Any
) -> Running:
    settings = SMALL | LONG | settings | {"out": out}
    data = settings.pop("data")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, *launch, "-m", "revnet", "train", *data, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_torchrun(out: Path, *launch: str, **settings: Any) -> Running:
    return start_command(out, "-m", "torch.distributed.run", *launch, **settings)


ONE_NODE = ("--standalone", "--nproc-per-node=2")


def wait_for(happened: Callable[[], Any], run: Running) -> None:
    end = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < end, "nothing happened in time"
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)


def workers(agent: int) -> list[int]:
    """The processes that torchrun started, in the order of their ranks, by their environment."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


def saved(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def kill_a_rank(run: Path, agent: Running) -> int:
    """`kill -9` of an agent's rank, at a random moment after the first checkpoint; returns the step
    saved last.
    """
    wait_for(lambda: saved(run), agent)
    time.sleep(random.random() / 2)
    last = saved(run)[-1]
    os.kill(workers(agent.pid)[0], signal.SIGKILL)
    return int(last.name.removeprefix("step-"))


def resumed_from(output: str) -> int:
    (step,) = (
        int(line.split("From step ")[1].split(".")[0])
        for line in output.splitlines()
        if "From step" in line
    )
    return step


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_rank_and_restart_on_two_nodes(tmp_path: Path, folder: Path) -> None:
    """kill -9 of one rank ends the other with a message; both agents restart theirs, and every loss
    is as without.
    """
    whole, broken = folder / "long", tmp_path / "broken"
    meeting = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    launch = (
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=7",
        meeting,
        "--max-restarts=3",
    )
    agents = [start_torchrun(broken, *launch, dropout=0.1) for _ in range(2)]
    try:
        last = kill_a_rank(broken, agents[0])
        outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        for agent in agents:
            with agent:
                agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "lost another rank" in outputs[1], outputs
    assert resumed_from("".join(outputs)) >= last, "an older checkpoint than the last"
    assert rows(broken) == rows(whole)
    assert_same_weights(broken, whole)
    assert not list((broken / "checkpoints").glob(".step-*")), "a half-written checkpoint was left"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_interrupt_stops_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, *ONE_NODE, steps=100_000, save_every=100_000)
    wait_for((tmp_path / "metrics.jsonl").exists, run)
    # One rank hears of it, and tells the other.
    os.kill(workers(run.pid)[1], signal.SIGTERM)
    output = run.communicate(timeout=60)[0]
    assert "Continue with: revnet train --resume" in output, output
    assert saved(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_silent_rank_counts_as_lost(tmp_path: Path) -> None:
    """Its connections stay open: the timeout of the process group ends the other rank. Without
    torchrun, too.
    """
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given: dict[str, Any] = {"steps": 100_000, "save_every": 100_000, "rank_timeout": 12}
    ranks = [
        start_command(tmp_path, environment=shared | {"RANK": str(rank)}, **given)
        for rank in range(2)
    ]
    try:
        wait_for((tmp_path / "metrics.jsonl").exists, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        output = ranks[0].communicate(timeout=100)[0]
        assert time.monotonic() - start < 30
        assert ranks[0].returncode == 1
        assert "rank 0 of 2 lost another rank" in output, output
    finally:
        for rank in ranks:
            with rank:
                rank.kill()
