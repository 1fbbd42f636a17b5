"""What the command reports in one line instead of a traceback."""


class UserError(Exception):
    """The user's input cannot be used as it is; the message says what to change. Exit code 2."""
