"""The command line.

It shows its help before torch is loaded, so each command imports what it needs.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

import revnet
from revnet.app.config import DTYPES, STREAMS, TrainConfig
from revnet.app.errors import MachineError, UserError, first_line, meant
from revnet.app.terminal import complain, show, visible_line, wrapped

if TYPE_CHECKING:
    from revnet.app.case import Case

MACHINE_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 is success, 1 a machine without room, 2 what the user can put right, 130 Ctrl-C.
    """
    # OpenMP's threads wait for each other by spinning, and on busy cores so keep the thread that
    # they wait for from its core: with a load of six to seven on two cores, two threads were four
    # to ten times as slow as two that sleep. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = sys.argv[1:] if argv is None else argv
    top = parser()
    if not given:
        top.print_help()
        return 0
    options = top.parse_args(given)
    # Pillow warns of images that this program refuses in its own words, and of metadata that it
    # does not need.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _fail("stopped; what was saved before is as it was", INTERRUPTED)
    except Exception as error:
        found = _explain(error)
        if found is None:
            raise
        return _fail(*found)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Return a message and an exit code for what is no fault of the program, or None."""
    if isinstance(error, UserError):
        return str(error), USER_ERROR
    if isinstance(error, MachineError):
        return str(error), MACHINE_ERROR
    if isinstance(error, ModuleNotFoundError):
        return f"the command needs {error.name}: pip install 'revnet[app]'", USER_ERROR
    if isinstance(error, OSError):
        reason = error.strerror or first_line(error)
        if error.filename is None:
            return reason, MACHINE_ERROR
        return f"{os.fsdecode(error.filename)}: {reason}", USER_ERROR
    message = str(error).lower()
    lacks_memory = "out of memory" in message or "can't allocate memory" in message
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and lacks_memory):
        advice = "try a smaller --batch, --depth or --width, or --execution invert"
        return f"out of memory: {advice}. What was saved before is as it was.", MACHINE_ERROR
    lacks_compiler = "compiler found" in message or "working triton" in message
    if isinstance(error, RuntimeError) and lacks_compiler:
        advice = "Install one, or leave --compile out."
        return f"--compile: {first_line(error)}. {advice}", USER_ERROR
    return None


def _fail(message: str, code: int) -> int:
    complain(message)
    return code


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=22)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Show the usage and what is wrong with it, and end with the exit code of user errors."""
        self.print_usage(sys.stderr)
        hint = visible_line(self._meant(message))
        words = f"{visible_line(message)}.{hint}" if hint else visible_line(message)
        self.exit(USER_ERROR, f"{wrapped(f'{self.prog}: error: {words}', sys.stderr)}\n")

    def _meant(self, message: str) -> str:
        """Return what a misspelt command, option or choice may have been meant to be."""
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", match[2])
        elif match := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
            known = list(self._flags())
        else:
            return ""
        return meant(match[1], known)

    def _flags(self) -> Iterator[str]:
        """Go through the options of this command and of those below it."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._flags()


def parser() -> argparse.ArgumentParser:
    """Return all commands and their options."""
    top = _Parser(
        prog="revnet", description="Train reversible transformers, and see what it saves."
    )
    top.add_argument("--version", action="version", version=f"revnet {revnet.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_sample(commands)
    _add_compare(commands)
    _add_plan(commands)
    return top


def _command(
    commands: argparse._SubParsersAction, name: str, usage: str, line: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=line,
        description=line,
        usage=f"revnet {name} {usage}",
        formatter_class=_Help,
        allow_abbrev=False,
    )


def _add_train(commands: argparse._SubParsersAction) -> None:
    line = "Train a transformer; without arguments it learns to draw digits from captions."
    command = _command(commands, "train", "[DATA ...] [--resume RUN] [options]", line)
    command.set_defaults(run=_run_train)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in fields(TrainConfig):
        about = item.metadata
        group = about["group"]
        if group not in groups:
            groups[group] = command.add_argument_group(group)
        add, line, flag = (
            groups[group].add_argument,
            about["help"],
            "--" + item.name.replace("_", "-"),
        )
        if item.name == "data":
            add("data", nargs="*", metavar="DATA", help=line)
            add(
                flag,
                dest="more_data",
                action="append",
                default=[],
                metavar="DATA",
                help="the same, as an option",
            )
        elif item.type == "bool":
            add(flag, action="store_true", default=argparse.SUPPRESS, help=line)
        else:
            kind = {"int": int, "float": float, "str": str}[str(item.type)]
            choices = about["choices"] or None
            add(
                flag,
                type=kind,
                default=argparse.SUPPRESS,
                metavar=about["metavar"],
                choices=choices,
                help=line,
            )
    groups["run"].add_argument(
        "--resume", metavar="RUN", help="continue a run where it was saved last"
    )


def _run_train(options: argparse.Namespace) -> int:
    from revnet.app import ranks, train

    chosen = vars(options)
    chosen["data"] += chosen["more_data"]
    if not chosen["data"]:
        del chosen["data"]
    given = {item.name: chosen[item.name] for item in fields(TrainConfig) if item.name in chosen}
    if ranks.are_started():
        from revnet.app.parallel import train_on_ranks

        return train_on_ranks(given, options.resume)
    return train.train_alone(given, options.resume)


def _add_sample(commands: argparse._SubParsersAction) -> None:
    line = "Draw images for captions from a trained run, or continue texts."
    command = _command(commands, "sample", 'RUN ["CAPTION" ...] [options]', line)
    command.set_defaults(run=_run_sample)
    command.add_argument("run_path", metavar="RUN", help="folder of the run")
    command.add_argument(
        "captions",
        nargs="*",
        # Otherwise argparse would say that one is required.
        default=[],
        metavar="CAPTION",
        help="captions or beginnings of texts (the run's)",
    )
    command.add_argument(
        "--out", metavar="FILE", help="PNG of the images (RUN/sample.png), or file for the text"
    )
    command.add_argument("--each", type=int, metavar="N", help="images for each caption (8)")
    command.add_argument(
        "--length", type=int, metavar="N", help="bytes of a text (the run's context)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (0.8)"
    )
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (all)"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest, up to P (1)"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed draws the same (0)"
    )
    command.add_argument("--no-cache", action="store_true", help="compute every token from scratch")
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1")


def _run_sample(options: argparse.Namespace) -> int:
    from revnet.app.sample import Sampling, sample

    how = Sampling(
        options.temperature, options.top_k, options.top_p, options.seed, not options.no_cache
    )
    shown = sample(
        options.run_path,
        options.captions,
        options.out,
        options.each,
        options.length,
        options.device,
        how,
    )
    error = show(shown)
    if error is not None and error.errno != errno.EPIPE:
        # Whoever closes a pipe has read enough, but a full disk loses what was asked for.
        raise MachineError(f"cannot print what was drawn: {error.strerror}")
    return 0


def _add_compare(commands: argparse._SubParsersAction) -> None:
    line = (
        "Compare stored, checkpointed, planned and reversible execution of one network on this "
        "machine."
    )
    command = _command(commands, "compare", "[RUN] [options]", line)
    command.set_defaults(run=_run_compare)
    _add_case(command)
    command.add_argument(
        "--memory",
        default="25%",
        metavar="SIZE",
        help="for the plan's activations, as 8GiB or 25%% (25%%)",
    )
    command.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="timed steps of each; the median counts (5)",
    )
    command.add_argument(
        "--out", metavar="FILE", help="compare.png, or FILE.md for a table with its plot"
    )


def _add_case(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_path", nargs="?", metavar="RUN", help="a run whose network to take")
    command.add_argument("--depth", type=int, metavar="N", help="blocks (12, or the run's)")
    command.add_argument(
        "--width", type=int, metavar="N", help="features per token (24 x depth, rounded up to 32)"
    )
    command.add_argument("--tokens", type=int, metavar="N", help="tokens of an example (256)")
    command.add_argument(
        "--batch", type=int, metavar="N", help="examples per step (4, or the run's)"
    )
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1")
    command.add_argument(
        "--dtype",
        metavar="T",
        choices=DTYPES,
        help=f"{' or '.join(DTYPES)} ({DTYPES[0]}, or the run's)",
    )
    command.add_argument(
        "--streams", metavar="S", choices=STREAMS, help=f"{', '.join(STREAMS)} (auto, or the run's)"
    )


def _case(options: argparse.Namespace, device: str) -> Case:
    from revnet.app.case import find_case

    sizes = (options.depth, options.width, options.tokens, options.batch)
    return find_case(options.run_path, *sizes, device, options.dtype, options.streams)


def _run_compare(options: argparse.Namespace) -> int:
    from revnet.app.compare import compare

    return compare(_case(options, options.device), options.memory, options.repeats, options.out)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    line = "Find the fastest executions that fit a memory budget, and draw time against memory."
    command = _command(commands, "plan", "[RUN] [options]", line)
    command.set_defaults(run=_run_plan)
    _add_case(command)
    command.add_argument(
        "--memory", metavar="SIZE", help="for activations, as 8GiB or 25%% (what is free)"
    )
    command.add_argument(
        "--device-memory", metavar="SIZE", help="or for all: also weights, gradients, AdamW's state"
    )
    command.add_argument(
        "--meta", action="store_true", help="allocate and compute nothing; times follow from FLOPs"
    )
    command.add_argument(
        "--out", metavar="PNG", help="plan.png; the plan is saved beside it as JSON"
    )


def _run_plan(options: argparse.Namespace) -> int:
    from revnet.app.plan import show_plan

    case = _case(options, "meta" if options.meta else options.device)
    return show_plan(case, options.memory, options.device_memory, options.out)
