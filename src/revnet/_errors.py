"""The one error that says a reversible computation cannot be trusted."""


class ReversibleError(RuntimeError):
    """Raised instead of a gradient that could be wrong: a replay does not repeat its forward pass.

    The message names the block and the branch, what was seen, what was expected and what to do.
    Wrong arguments raise `TypeError` and `ValueError` as elsewhere in Python.
    """
