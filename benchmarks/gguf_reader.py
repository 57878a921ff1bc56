"""Times the reading of a GGUF file's header by the library's reader and by ace_ext's, alternating in one process.

    python benchmarks/gguf_reader.py MODEL.gguf

CPU time of the process. Prints the least of each in seconds and their ratio.
"""

import argparse
import sys
import time
from pathlib import Path

from gguf import GGUFReader

from ace_ext.models.gguf_header import check_gguf, gguf_reader

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import existing_file, one_line_errors

ROUNDS = 3


def seconds(read, path: Path) -> float:
    start = time.process_time()
    read(path)
    return time.process_time() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", metavar="MODEL.gguf", type=existing_file)
    path = parser.parse_args(argv).path
    with one_line_errors(parser):
        check_gguf(path)
    rounds = [(seconds(GGUFReader, path), seconds(gguf_reader, path)) for _ in range(ROUNDS)]
    library, own = map(min, zip(*rounds, strict=True))
    print(f"{path}: gguf {library:.2f} s, ace_ext {own:.2f} s, {library / own:.1f} x")


if __name__ == "__main__":
    main()
