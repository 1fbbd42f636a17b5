"""The one error that says a reversible computation cannot be trusted."""


class ReversibleError(RuntimeError):
    """Raised instead of a gradient that could be wrong: a replay does not repeat its forward pass.

    The message names the block and the branch, what was seen, what was expected and what to do.
    Wrong arguments raise `TypeError` and `ValueError` as elsewhere in Python.
    """


def changed_message(where: str, kind: str, name: str) -> str:
    """Return what is said of a tensor that was written to before its replay."""
    return (
        f"{where}: {kind} {name!r} was changed in place between forward and backward, so the "
        "forward pass cannot be replayed. Call backward before the optimizer's step (or any other "
        "in-place write)."
    )
