"""The two kinds of failure a caller may want to tell apart."""


class InputError(ValueError):
    """Something the caller can mend: an argument, a file or a model. The command line ends with status 2.

    The message is one line: which argument, what was found, how to mend it.
    """
