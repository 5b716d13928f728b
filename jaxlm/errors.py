"""The one exception type for mistakes a user can mend."""


class UserError(Exception):
    """Wrong input: the commands print the message without a traceback and exit with status 2.

    The message names the key or file, the value found, and the way out.
    """
