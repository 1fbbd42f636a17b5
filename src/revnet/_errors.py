"""The one error that says a reversible computation cannot be trusted."""


class ReversibleError(RuntimeError):
    """Raised where a replay cannot be shown to repeat the forward pass, instead of returning a wrong gradient.

    The message names the block and the branch, what was seen, what was expected and what to do.
    Wrong arguments raise `TypeError` and `ValueError` as elsewhere in Python.
    """
