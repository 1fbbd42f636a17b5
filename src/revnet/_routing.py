"""Send keyword arguments to the branches that take them."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ._step import BoundStep, Step
from ._sum import Sum

# What one branch does with a keyword: take it or not, or take it under a name of its own.
Entry = bool | str
Pair = tuple[Entry, Entry]
Routes = Mapping[str, Sequence[Pair] | Pair | Literal["signature"]] | Literal["signature"]
StepRoutes = Mapping[str, Sequence[Entry] | Entry] | Literal["signature"]
SIGNATURE = "signature"


def route_args(
    router: Routes, args: Mapping[str, Any], depth: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return for each of `depth` blocks the keyword arguments of `f` and of `g`.

    Args:
        router: for each keyword, one pair `(to_f, to_g)` for all blocks, or one per block. An
            entry is a boolean, or the name under which the branch takes the value.
        args: the keywords of the call. A keyword without a route reaches no branch.
        depth: number of blocks.

    Returns:
        `depth` pairs `(f_args, g_args)`, each a new dict.

    Raises:
        ValueError: the number of pairs of a route is not `depth`; "signature", which a sequence
            alone can look up.

    Example:
        >>> route_args({"mask": (True, False), "scale": ((0, 0), (0, "by"))},
        ...            {"mask": 0, "scale": 2}, depth=2)
        [({'mask': 0}, {}), ({'mask': 0}, {'by': 2})]
    """
    if isinstance(router, str) or SIGNATURE in router.values():
        raise ValueError("route_args does not know the branches, whose signatures it would read")
    known = {key: value for key, value in args.items() if key in router}
    flat = keywords_of(router, known, [None] * (2 * depth), 2)
    return [(flat[2 * i], flat[2 * i + 1]) for i in range(depth)]


def keywords_of(
    args_route: Any, kwargs: Mapping[str, Any], branches: Sequence[Any], group: int = 2
) -> list[dict[str, Any]]:
    """Return the keywords of every branch, those that a `Step` asks for itself included.

    Args:
        args_route: routes of keywords, or "signature".
        kwargs: the keywords of the call.
        branches: in the order of the steps; only signatures are read.
        group: how many branches one entry of a route is for: 2 in a block, else 1.

    Raises:
        TypeError: a keyword that no branch takes, or that a branch gets twice.
        ValueError: a route that fits no program of so many branches.
    """
    # `args_route` may have been changed since the last call.
    check = check_routes if group == 2 else check_step_routes
    check(args_route, len(branches) // group)
    steps = [branch for branch in branches if isinstance(branch, Step)]
    claimed = [key for step in steps for key in step.names]
    check_keywords(args_route, kwargs, claimed, group)
    flat = [branch.keywords(kwargs) if isinstance(branch, Step) else {} for branch in branches]
    for key, value in kwargs.items():
        route = args_route if args_route == SIGNATURE else args_route.get(key, False)
        if route is False:
            continue
        if route == SIGNATURE:
            entries: list[Entry] = [takes(branch, key) for branch in branches]
            if value is not None and key not in claimed and not any(entries):
                raise TypeError(
                    f"no branch takes the keyword {key!r}: args_route='signature' sends a keyword "
                    f"to the branches whose forward names it. Leave it out of the call, add it to "
                    f"a forward, or drop it here: args_route={{{key!r}: {_NOWHERE[group]}, ...}} "
                    f"with 'signature' as the route of the other keywords."
                )
        else:
            entries = _spread(route, len(branches), group)
        for branch_args, entry in zip(flat, entries, strict=True):
            if not entry:
                continue
            name = entry if isinstance(entry, str) else key
            if name in branch_args:
                raise TypeError(
                    f"a branch gets {name!r} twice, once as the keyword {key!r} of the call: "
                    f"change args_route, or the args, kwargs and constants of its revnet.Step"
                )
            branch_args[name] = value
    return flat


_NOWHERE = {1: "False", 2: "(False, False)"}
_EVERYWHERE = {1: "True", 2: "(True, False)"}


def is_one(route: Any, group: int) -> bool:
    """Check whether a route is one entry, or one pair of entries, for all steps or blocks."""
    if group == 1:
        return isinstance(route, bool | str)
    return len(route) == 2 and not any(_is_pair(entry) for entry in route)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str)


def _spread(route: Any, count: int, group: int) -> list[Entry]:
    """Return one entry per branch."""
    if group == 1:
        return [route] * count if is_one(route, group) else list(route)
    if is_one(route, group):
        return list(route) * (count // group)
    return [entry for pair in route for entry in pair]


def sliced(args_route: Any, places: Sequence[int], group: int = 2) -> Any:
    """Return the routes of some blocks, or steps."""
    if args_route == SIGNATURE:
        return args_route
    return {
        key: route
        if route == SIGNATURE or is_one(route, group)
        else tuple(route[i] for i in places)
        for key, route in args_route.items()
    }


def check_routes(args_route: Any, depth: int) -> None:
    """Raise `ValueError` unless each route is a pair `(to_f, to_g)`, or `depth` of them."""
    if isinstance(args_route, str):
        _check_name(args_route, "args_route")
        return
    for key, route in args_route.items():
        where = f"args_route[{key!r}]"
        if isinstance(route, str):
            _check_name(route, where)
            continue
        if not isinstance(route, Sequence):
            raise ValueError(f"{where} is {route!r}: give a pair (to_f, to_g), or one per block")
        if is_one(route, 2):
            continue
        if len(route) != depth:
            raise ValueError(
                f"{where} has {len(route)} pairs for {depth} blocks: give one (to_f, to_g) pair "
                f"for all blocks, such as {key}=(True, False), or one per block, as in "
                f"((True, False),) * {depth}"
            )
        for i, pair in enumerate(route):
            if not _is_pair(pair) or len(pair) != 2:
                raise ValueError(
                    f"{where}[{i}] is {pair!r}: give a pair (to_f, to_g) of booleans, or of the "
                    f"names under which the branches take it"
                )


def check_step_routes(args_route: Any, count: int) -> None:
    """Raise `ValueError` unless each route is a boolean or a name, or `count` of them."""
    if isinstance(args_route, str):
        _check_name(args_route, "args_route")
        return
    for key, route in args_route.items():
        if is_one(route, 1):
            continue
        if not isinstance(route, Sequence):
            raise ValueError(f"args_route[{key!r}] is {route!r}: give a boolean, or one per step")
        if len(route) != count:
            raise ValueError(
                f"args_route[{key!r}] has {len(route)} entries for {count} steps: give one "
                f"boolean for all steps, or one per step"
            )


def check_names(args_route: Any) -> None:
    """Raise `ValueError` where the call itself has a parameter of the name of a route."""
    if not isinstance(args_route, str) and "taps" in args_route:
        raise ValueError(
            "args_route['taps']: `taps` is a parameter of the network's forward. Route another "
            "name to the branch: args_route={'places': ('taps', False)}"
        )


def _check_name(route: str, where: str) -> None:
    if route != SIGNATURE:
        raise ValueError(f"{where} is {route!r}, which is not 'signature' and no route")


def check_keywords(
    args_route: Any, kwargs: Mapping[str, Any], claimed: Sequence[str] = (), group: int = 2
) -> None:
    """Raise `TypeError` if a keyword has no route, so that no branch would see it, unless None.

    False raises, too: the branch may have another default.
    """
    if args_route == SIGNATURE:
        return
    lost = [
        key
        for key, value in kwargs.items()
        if key not in args_route and key not in claimed and value is not None
    ]
    if lost:
        routes = ", ".join(map(repr, args_route)) or "none"
        raise TypeError(
            f"no route for keyword {', '.join(map(repr, lost))} (routes: {routes}): "
            f"add it to args_route, as in args_route={{{lost[0]!r}: {_EVERYWHERE[group]}}}, use "
            f"args_route='signature', or drop it by args_route={{{lost[0]!r}: {_NOWHERE[group]}}}"
        )


class _Parameters(NamedTuple):
    """Names of the parameters of a branch that stand behind its streams."""

    names: frozenset[str]
    positional: frozenset[str]
    takes_any: bool


def takes(branch: Any, key: str) -> bool:
    """Check whether the signature of a branch names a keyword, or takes any.

    Raises:
        TypeError: it can be given by position alone.
    """
    found = _parameters(branch)
    if isinstance(branch, Step) and key in (*branch.args, *branch.kwargs, *branch.constants):
        return False
    if key in found.positional:
        raise TypeError(
            f"{_kind(branch)} takes {key!r} by position alone: allow it as a keyword (remove the "
            f"`/`), or use revnet.Step(fn, args=({key!r},)) in a revnet.Reversible"
        )
    return found.takes_any or key in found.names


def inner(branch: Any) -> Any:
    """Return the branch inside of steps and of wrappers that hand on whatever they get."""
    while isinstance(branch, nn.Module):
        if isinstance(branch, Step):
            branch = branch.fn
            continue
        if isinstance(branch, Sum):
            # All of its branches are given the same.
            branch = branch[0]
            continue
        children = list(branch.children())
        if len(children) != 1 or not _hands_on(branch.forward):
            return branch
        branch = children[0]
    return branch


def _hands_on(forward: Callable[..., Any]) -> bool:
    kinds = {parameter.kind for parameter in _signature(forward)}
    kinds.discard(inspect.Parameter.KEYWORD_ONLY)
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _parameters(branch: Any) -> _Parameters:
    streams = branch.reads if isinstance(branch, Step) else 1
    branch = inner(branch)
    if branch is None:
        return _Parameters(frozenset(), frozenset(), False)
    behind = _signature(branch.forward if isinstance(branch, nn.Module) else branch)
    names: list[str] = []
    positional: list[str] = []
    takes_any = False
    for place, parameter in enumerate(behind):
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and place >= streams:
            only = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
            (positional if only else names).append(parameter.name)
    return _Parameters(frozenset(names), frozenset(positional), takes_any)


def _signature(forward: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """Return the parameters of a function; none where it does not say them."""
    function = getattr(forward, "__func__", None)
    if function is None or torch.compiler.is_compiling():
        return _read_signature(forward)
    if function not in _signatures:
        _signatures[function] = _read_signature(function)
    parameters = _signatures[function]
    # The module itself is among `*args` where there is no `self`.
    bound = bool(parameters) and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    return parameters[1:] if bound else parameters


def _read_signature(forward: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    try:
        return tuple(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return ()


_signatures: WeakKeyDictionary[Callable[..., Any], tuple[inspect.Parameter, ...]] = (
    WeakKeyDictionary()
)


def _kind(branch: Any) -> str:
    branch = inner(branch)
    if isinstance(branch, nn.Module):
        return f"{type(branch).__name__}.forward"
    return getattr(branch, "__name__", type(branch).__name__)


def explain(error: Exception, step: BoundStep, args_route: Any) -> str:
    """Return a note for an exception of a branch: where it is, and what is wrong with its keywords.

    Args:
        error: the exception.
        step: the step whose branch raised it.
        args_route: of the program, None where there is none.
    """
    branch = inner(step.fn)
    note = f"In {step.name}, {type(branch).__name__}"
    parameters = _signature(branch.forward if isinstance(branch, nn.Module) else branch)
    found, given = _parameters(step.fn), step.kwargs
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.name in found.names
        and parameter.name not in given
    ]
    wrong = [key for key in given if not found.takes_any and key not in found.names]
    if not isinstance(error, TypeError) or not (missing or wrong):
        return note
    plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    note += f": its forward takes {inspect.Signature(plain)}."
    if missing:
        note += (
            f" It got no {', '.join(map(repr, missing))}: give it in the call, and send it here."
        )
    if wrong:
        note += f" It got {', '.join(map(repr, wrong))}, which it does not take."
    if isinstance(args_route, Mapping):
        about = {key: route for key, route in args_route.items() if key in {*missing, *wrong}}
        args_route = about or dict(args_route)
    return note if args_route is None else f"{note} args_route={reprlib.repr(args_route)}"
