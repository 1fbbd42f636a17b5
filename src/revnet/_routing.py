"""Send keyword arguments to the branches that take them."""

from collections.abc import Mapping, Sequence
from typing import Any

Routes = Mapping[str, Sequence[tuple[bool, bool]]]


def route_args(
    router: Routes, args: Mapping[str, Any], depth: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return for each of `depth` blocks the keyword arguments of `f` and of `g`.

    Args:
        router: for each keyword, one pair `(to_f, to_g)` per block.
        args: the keywords of the call. A keyword without a route reaches no branch.
        depth: number of blocks.

    Returns:
        `depth` pairs `(f_args, g_args)`, each a new dict.

    Raises:
        ValueError: the number of pairs of a route is not `depth`.

    Example:
        >>> route_args({"mask": ((True, False), (True, True))}, {"mask": 0}, depth=2)
        [({'mask': 0}, {}), ({'mask': 0}, {'mask': 0})]
    """
    check_routes(router, depth)
    routed: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in range(depth)]
    for key, value in args.items():
        for branches, goes in zip(routed, router.get(key, ()), strict=False):
            for branch_args, wanted in zip(branches, goes, strict=True):
                if wanted:
                    branch_args[key] = value
    return routed


def check_routes(args_route: Routes, depth: int) -> None:
    """Raise `ValueError` unless every route has `depth` pairs `(to_f, to_g)`."""
    for key, route in args_route.items():
        if len(route) != depth:
            raise ValueError(
                f"args_route[{key!r}] has {len(route)} pairs for {depth} blocks: give one (to_f, "
                f"to_g) pair per block, such as {key}=((True, False),) * {depth}"
            )
        for i, pair in enumerate(route):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(
                    f"args_route[{key!r}][{i}] is {pair!r}: give a pair (to_f, to_g) of booleans"
                )


def check_keywords(args_route: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `TypeError` if a keyword has no route, so that no branch would see it, unless None."""
    lost = [key for key, value in kwargs.items() if key not in args_route and value is not None]
    if lost:
        routes = ", ".join(map(repr, args_route)) or "none"
        raise TypeError(
            f"no route for keyword {', '.join(map(repr, lost))} (routes: {routes}): "
            f"add it to args_route, as in args_route={{{lost[0]!r}: ((True, False), ...)}} with "
            f"one pair per block"
        )
