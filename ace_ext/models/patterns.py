"""Matches a user's regular expressions within a time limit: some would take years on a short name."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ace_ext.errors import InputError


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
