"""The exception for mistakes of the user."""


class UserError(Exception):
    """An error that the user can correct. Its message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
