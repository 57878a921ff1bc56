"""What programs of ``tools`` and ``benchmarks`` share: types of their arguments, and one line for what a user can mend.

Only the standard library is imported: some of them run where ace_ext is not installed.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 (got {text!r})")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0 (got {text!r})")
    return value


def existing_folder(text: str) -> Path:
    """A folder that exists."""
    if not text or not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder (got {text!r}); check the path")
    return Path(text)


def existing_file(text: str) -> Path:
    """A file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file (got {text!r}); check the path")
    return Path(text)


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program as the parser does, with one line and status 2, for what a user can mend: an
    ``ace_ext.InputError``, a file that cannot be read or written, a module that is missing, a command that fails,
    output that its reader closed."""
    try:
        yield
        print(end="", flush=True)  # what is buffered fails here, not when Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        parser.error("the reader of the output closed it early")
    except OSError as error:
        name = f"{str(error.filename)!r}: " if error.filename else ""
        parser.error(f"{name}{error.strerror or _line(error)}")
    except ModuleNotFoundError as error:
        parser.error(f"{_line(error)}; install it first")
    except subprocess.CalledProcessError as error:
        parser.error(f"{_line(error)}; what it wrote is above")
    except _input_errors() as error:
        parser.error(_line(error))


def _input_errors() -> Any:
    """ace_ext's class for errors that a user can mend; none if no module of ace_ext was imported to raise it."""
    return getattr(sys.modules.get("ace_ext.errors"), "InputError", ())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
