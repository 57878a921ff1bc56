"""The exception for errors that the caller can correct, and words for messages. Any other exception is an internal
error."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """An error that the caller can correct: in an argument, a file or a model. The command line then exits with 2.

    The message is one line: which argument, what was found, how to correct it.
    """


def path_of(name: str, value: object) -> Path:
    """An argument that must be a path, with the user's folder in place of ``~``. ``name``: of the argument.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(f"{name} must be a path (got {type(value).__name__})")
    return Path(value).expanduser()


def existing_folder(folder: object) -> Path:
    """``folder`` as a path.

    Raises:
        InputError: it is not a folder.
    """
    path = path_of("folder", folder)
    if not os.path.isdir(path if str(folder) else ""):  # an empty text is no folder, and Path("") is the present one
        raise InputError(f"{str(folder)!r} is not a folder; check the path")
    return path


def suggestion(value: object, choices: Iterable[object], cutoff: float = 0.6) -> str:
    """``"; did you mean balanced?"`` if a value is nearly one of the choices, else an empty text. ``cutoff``: the least
    similarity, from 0 to 1."""
    if not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value, [str(choice) for choice in choices], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def one_line(error: BaseException, longest: int = 400) -> str:
    """The message of an exception without line breaks and without a full stop at its end, cut to ``longest``
    characters; its type if it has no message."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def counted(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``, ``1,000 matrices``."""
    plural = f"{noun[:-2]}ices" if noun.endswith("ix") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
