"""``python -m ace_ext`` and ``ace-prune``: the command line. It takes seconds to load, and a user may interrupt it."""

import os
import signal
import sys
from types import FrameType

from ace_ext.process_threads import wait_passively


def main() -> int:
    """Runs the command line; returns its exit status."""
    before = signal.signal(signal.SIGINT, _stop)
    wait_passively()  # before torch is loaded, which reads the environment once
    from ace_ext.cli.main import load
    from ace_ext.cli.main import main as command_line

    load(sys.argv[1:])
    signal.signal(signal.SIGINT, before)
    return command_line()


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the program at once while modules are imported. An exception could be swallowed or replaced there, and there
    is nothing to clean up yet."""
    os.write(2, b"ace-prune: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
