"""``python -m ace_ext`` and ``ace-prune``: the command line. Loading it takes seconds, and may be interrupted."""

import sys


def main() -> int:
    """Runs the command line; returns its exit status."""
    try:
        from ace_ext.cli.main import main as command_line

        return command_line()
    except KeyboardInterrupt:
        print("ace-prune: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
