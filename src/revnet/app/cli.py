"""The command line: it must show its help before torch is loaded, so each command imports what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from revnet.app.config import TrainConfig
from revnet.app.errors import UserError

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except UserError as error:
        print(f"revnet: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("revnet: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="revnet", description="Train reversible transformers and see what you save.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_sample(commands)
    return top


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24)


def _command(commands: argparse._SubParsersAction, name: str, line: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=line, description=line, formatter_class=_Help)


def _add_train(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "train", "Train a model; without arguments, draw digits from captions.")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in fields(TrainConfig):
        more = dict(item.metadata)
        line, group, positional = more.pop("help"), more.pop("group"), more.pop("positional", False)
        into = groups.setdefault(group, command.add_argument_group(group)) if group not in groups else groups[group]
        if positional:
            into.add_argument(item.name, nargs="?", default=item.default, help=line)
            continue
        kind = next((kind for kind in (int, float, str) if kind.__name__ in str(item.type)), str)
        name = "--" + item.name.replace("_", "-")
        into.add_argument(name, type=kind, default=item.default, metavar=kind.__name__.upper()[:3], help=line, **more)
    command.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from revnet.app.train import train

    values = vars(options)
    return train(TrainConfig(**{item.name: values[item.name] for item in fields(TrainConfig)}))


def _add_sample(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "sample", "Draw images from a trained run.")
    command.add_argument("run_path", metavar="RUN", help="folder of the run")
    command.add_argument("captions", nargs="*", metavar="CAPTION", help="what to draw (the run's own captions)")
    command.add_argument("--out", metavar="PNG", help="where to save the grid (RUN/sample.png)")
    command.add_argument("--each", type=int, default=8, metavar="N", help="images for each caption (8)")
    command.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (0.8)")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (all)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest up to P (1)")
    command.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (0)")
    command.add_argument("--no-cache", action="store_true", help="compute every token from scratch")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> int:
    from revnet.app.sample import Sampling, sample

    how = Sampling(options.temperature, options.top_k, options.top_p, options.seed, not options.no_cache)
    print(sample(options.run_path, options.captions, options.out, options.each, options.device, how))
    return 0
