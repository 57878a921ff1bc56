"""A user's patterns of names. Regular expressions are matched within a time limit: some would take years on a short
name."""

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from ace_ext.errors import InputError


def glob_pattern(glob: str) -> str:
    """The regular expression of a pattern in which ``*`` stands for any characters and ``?`` for one."""
    return re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")


def all_but(globs: Iterable[str]) -> str:
    """A regular expression that finds every name which none of the globs match as a whole."""
    return f"^(?!({'|'.join(map(glob_pattern, globs))})$)"


def globs_of(pattern: str) -> dict[str, str]:
    """The globs of a regular expression that :func:`all_but` made, and the regular expression of each; none of another
    one."""
    found = re.fullmatch(r"\^\(\?!\((.*)\)\$\)", pattern, re.DOTALL)
    parts = re.split(r"(?<!\\)\|", found[1]) if found else []
    globs = [re.sub(r"\\(.)|\.\*|\.", _glob_part, part, flags=re.DOTALL) for part in parts]
    return {glob: f"^{glob_pattern(glob)}$" for glob in globs} if pattern == all_but(globs) else {}


def _glob_part(found: re.Match[str]) -> str:
    return found[1] or ("*" if found[0] == ".*" else "?")


def search_within(seconds: float, pattern: re.Pattern[str], name: str) -> bool:
    """Whether the pattern matches somewhere in ``name``. Processor time is limited in the main thread only: there a
    signal can end the search.

    Raises:
        InputError: it takes longer.
    """
    with _limited(seconds, pattern.pattern):
        return pattern.search(name) is not None


@contextmanager
def _limited(seconds: float, pattern: str) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise InputError(
            f"skip {pattern[:100]!r} takes more than {seconds:g} s to match one name; write it without nested repeats"
        )

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield  # no signals here, or the timer is the caller's
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
