"""The end of a command that failed: one line on stderr, and an exit status."""

import contextlib
import os
import sys

from ace_ext.errors import InputError, one_line

BAD_INPUT, INTERNAL, INTERRUPTED = 2, 1, 130


CONTINUES = {
    "run": "; continue from here with --resume",
    "heal": "; continue from here with --resume",
    "compare": "; the same command continues from here",
}
"""What an interrupted verb can do later."""


def ending(error: BaseException, verb: str = "") -> int:
    """Writes one line on stderr that says what ended the program (``verb``: what it did), and returns the exit status.

    The status is 2 for errors that input can cause: an :class:`ace_ext.InputError`, a file that cannot be read or
    written, too little memory. Every other error is an internal one.
    """
    if isinstance(error, KeyboardInterrupt):
        return _say(f"interrupted{CONTINUES.get(verb, '')}", INTERRUPTED)
    if isinstance(error, InputError):
        return _say(one_line(error, 2000), BAD_INPUT)
    if isinstance(error, BrokenPipeError):
        return _closed_early()
    if isinstance(error, OSError):
        return _say(_of_system(error), BAD_INPUT)
    if _is_memory(error):
        return _say(
            f"not enough memory ({one_line(error, 200)}); lower --nsamples or --seqlen, write a "
            'smaller batch_tokens as in --method "balanced(batch_tokens=4096)", or pass --offload disk',
            BAD_INPUT,
        )
    return _say(
        f"internal error: {type(error).__name__}: {one_line(error)}; please report it with what --debug shows", INTERNAL
    )


def _say(text: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        print(f"ace-prune: {text}", file=sys.stderr, flush=True)
    return status


def _of_system(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f"{', '.join(repr(name[:300]) for name in names)}: " if names else ""
    return f"{where}{error.strerror or one_line(error)}; check the path, its permissions, and the space that is left"


def _is_memory(error: BaseException) -> bool:
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _closed_early() -> int:
    """The reader of the output has closed it. Later writes would fail too, so they go to the null device."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return _say("the reader of the output closed it early", INTERNAL)
