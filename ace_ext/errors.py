"""The exception for errors that the caller can correct; any other exception is an internal error."""


class InputError(ValueError):
    """An error that the caller can correct: in an argument, a file or a model. The command line then exits with 2.

    The message is one line: which argument, what was found, how to correct it.
    """
