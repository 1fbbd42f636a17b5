"""What the command reports in one line instead of a traceback."""


class UserError(Exception):
    """The user's input cannot be used as it is; the message says what to change. Exit code 2."""


class MachineError(Exception):
    """The machine has no room, in memory or on the disk; the message says what is lost. Exit code 1."""
