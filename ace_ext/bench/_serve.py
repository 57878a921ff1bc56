"""The program of a candidate's process: reads requests from stdin and answers on stdout, one line of JSON each.

It imports nothing of ace_ext, so that a process of another engine has no torch in it. Whatever libraries print goes to
stderr.
"""

import json
import os
import runpy
import sys


def main(file: str) -> None:
    """Serves the class ``Engine`` of a file until stdin ends. A request ``{"do": name, ...}`` calls a method with the
    other fields as arguments. The answer is ``{"found": result}`` or ``{"error": text}``."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = runpy.run_path(file)["Engine"]()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"found": getattr(engine, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
