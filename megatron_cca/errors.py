"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input. The message is one line: which key or file, what is wrong, what would be right.

    Command-line programs print it without a traceback and exit with status 2.
    """
