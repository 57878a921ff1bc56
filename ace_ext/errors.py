"""The exception for errors that the caller can correct. Any other exception is an internal error."""

import os
from pathlib import Path


class InputError(ValueError):
    """An error that the caller can correct: in an argument, a file or a model. The command line then exits with 2.

    The message is one line: which argument, what was found, how to correct it.
    """


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    """``folder`` as a path.

    Raises:
        InputError: it is not a folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{str(folder)!r} is not a folder; check the path")
    return Path(folder)


def one_line(error: BaseException, longest: int = 400) -> str:
    """The message of an exception without line breaks, cut to ``longest`` characters; its type if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
