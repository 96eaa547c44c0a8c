"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Something the user can mend, told in one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
