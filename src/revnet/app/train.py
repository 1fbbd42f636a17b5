"""`revnet train` on one process: start or resume a training, take its steps, and close it."""

from __future__ import annotations

import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any, TypeVar

import torch

import revnet
from revnet.app import report
from revnet.app.checks import FORMAT
from revnet.app.config import TrainConfig
from revnet.app.data import sources
from revnet.app.device import find_device
from revnet.app.display import Display
from revnet.app.errors import DataError, UserError
from revnet.app.run import Run
from revnet.app.threads import Watch, set_threads
from revnet.app.tracker import find_package
from revnet.app.training import Training, shape_of

INTERRUPTED = 130
LOG_EVERY = 10
# Windows has none.
HANGUP = getattr(signal, "SIGHUP", None)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether to stop: after Ctrl-C, SIGTERM, or a hangup.

    Ctrl-C or SIGTERM after one of these raises KeyboardInterrupt. A closed terminal may send
    several hangups, and a hangup that was ignored before, as by nohup, stays ignored.
    """
    stopping = False

    def handle(number: int, frame: object) -> None:
        nonlocal stopping
        if stopping and number != HANGUP:
            raise KeyboardInterrupt
        stopping = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


T = TypeVar("T", bound=Training)


def start(
    given: dict[str, Any], make: type[T], create: Callable[[str | None, str], Run] = Run.create
) -> T:
    """Return a new training with the options that were `given`."""
    config = TrainConfig(**given)
    find_device(config.device)
    find_package(config.report_to)
    data, defaults = sources.load(config)
    sources.check_options(config, given, data)
    config = config.resolve(defaults)
    config.data = sources.absolute(config.data)
    config.threads = set_threads(config.threads)
    run = create(config.out, data.name)
    config.out = str(run.path)
    training = make(config, data, run)
    if config.memory:
        training.choose_executions(new=True)
    run.write_json("data.json", data.spec)
    write_config(training, known={})
    return training


def write_config(training: Training, known: dict[str, str]) -> None:
    """Write the options of a run, the size of its network, and what it was made with.

    Args:
        training: The training, which begins to report.
        known: What services that it has reported to call the run.
    """
    versions = {"revnet": version("revnet"), "torch": torch.__version__}
    versions["python"] = platform.python_version()
    made = {"format": FORMAT, "versions": versions, "command": sys.argv}
    made["shape"], made["tracked"] = asdict(training.shape), training.track(known)
    training.run.write_json("config.json", made | asdict(training.config))


def resume(
    path: str, given: dict[str, Any], make: type[T], find: Callable[[str], Run] = Run.open
) -> T:
    """Return the training that was saved in a run's folder.

    The options `given` may change only what is not learned.
    """
    run = find(path)
    saved, shape = run.read_config()
    if "data" in given:
        given = given | {"data": sources.absolute(given["data"])}
    options = {item.name: getattr(saved, item.name) for item in fields(TrainConfig)}
    for item in fields(TrainConfig):
        name = item.name
        if name in given and given[name] != options[name] and not item.metadata["own"]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {options[name]} in {path}: a resumed run keeps it")
    config = TrainConfig(**options | given)
    find_package(config.report_to)
    # The same number: sums over threads are rounded in another order.
    config.threads = set_threads(config.threads)
    run.check_weights(shape)
    spec = run.read_data(shape)
    data, _ = sources.load(config, spec)
    if data.spec["fingerprint"] != spec["fingerprint"] or shape_of(config, data) != shape:
        raise UserError(
            f"the data of {path} has changed since it was started: {' '.join(config.data)}"
        )
    training = make(config, data, run)
    training.resume()
    if config.memory:
        training.choose_executions(new="memory" in given)
    write_config(training, run.read_json("config.json")["tracked"])
    return training


def train_alone(given: dict[str, Any], resumed: str | None = None) -> int:
    """Train with the options `given`, or go on with a run that was saved; return the exit code."""
    with ExitStack() as held:

        def create(out: str | None, name: str) -> Run:
            return held.enter_context(Run.create(out, name).locked())

        def find(path: str) -> Run:
            return held.enter_context(Run.open(path).locked())

        try:
            if resumed is None:
                training = start(given, Training, create)
            else:
                training = resume(resumed, given, Training, find)
            held.push(training.end_tracking)
            return _train_and_close(training, new=resumed is None)
        except revnet.ReversibleError as error:
            raise UserError(str(error)) from error


def _train_and_close(training: Training, new: bool) -> int:
    """Take all steps, or those until a signal; then save, judge and say what was learned."""
    config, unit = training.config, training.data.unit
    with Display(config.steps, unit, training.step) as display, interruptible() as stop:
        display.say(report.opening(training, report.machine_of(training)), wrap=True)
        memory = report.measure_executions(training)
        if new:
            training.log({f"{row.name}_peak_bytes": row.peak for row in memory})
        loop(training, display, stop)
        training.save()
        training.draw_loss()
        if stop():
            display.reach(training.step)
            display.say(report.stopped(training))
            return INTERRUPTED
    report.close(training, display, memory)
    return 0


def loop(training: Training, display: Display, stop: Callable[[], bool]) -> None:
    """Step, log, validate and save until the last step or until `stop` says so."""
    config = training.config
    since, tokens = time.perf_counter(), 0
    watch = Watch()
    with _keeping(training), ThreadPoolExecutor(1, "batches") as reader:
        coming = reader.submit(training.read_batch, training.step)
        while training.step < config.steps and not stop():
            batch = training.tensors(coming.result())
            coming = reader.submit(training.read_batch, training.step + 1)
            loss = training.take_step(*batch)
            tokens += batch[1].numel()
            step, last = training.step, training.step == config.steps
            shown = step % LOG_EVERY == 0 or step == 1 or last
            if shown:
                bits = float(loss)
                if not math.isfinite(bits):
                    raise UserError(
                        f"the loss is {bits} at step {step}: try a smaller --lr than {config.lr:g}"
                    )
                rate = tokens / (time.perf_counter() - since)
                since, tokens = time.perf_counter(), 0
                training.log(
                    {"bits": bits, "lr": training.learning_rate(), "tokens_per_second": round(rate)}
                )
            if step % config.validate_every == 0 or last:
                found = training.validate()
                training.log(found)
                display.held_out(found["held_out_bits"])
                training.draw_loss()
            if shown:
                display.step(step, bits, rate, last)
                if training.device.type == "cpu" and (advice := watch.advice()):
                    display.say(advice, wrap=True)
            if step % config.save_every == 0 and not last:
                training.save()
                report.draw_samples(training, last=False)


@contextmanager
def _keeping(training: Training) -> Iterator[None]:
    """Save what was learned before an example could not be read."""
    try:
        yield
    except DataError:
        training.keep()
        raise
