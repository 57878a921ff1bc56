"""What a contest measures: the dense folder, packed folders, and the dense weights in other engines."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ace_ext.bench.gguf_writer import TYPES
from ace_ext.errors import InputError
from ace_ext.models.gguf_header import check_gguf
from ace_ext.packed.files import SUFFIX

LLAMA = "llama.cpp"


@dataclass(frozen=True)
class Candidate:
    """One thing that is measured."""

    name: str
    """Unique in a contest."""
    path: Path
    """A folder for torch, a GGUF file for llama.cpp."""
    engine: str = "torch"
    """``torch`` or ``llama.cpp``."""

    def file_bytes(self) -> int:
        """The bytes of the weight files."""
        if self.path.is_file():
            return self.path.stat().st_size
        files = sorted(self.path.glob(f"*{SUFFIX}")) or sorted(self.path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)


def gguf_sources(texts: Iterable[str]) -> list[str | Path]:
    """What ``--against`` names, each once, in its order: types of GGUF to write, and GGUF files that exist.

    Args:
        texts: each a list separated by commas of ``llama.cpp`` (every type), ``llama.cpp:TYPE`` and
            ``llama.cpp:FILE.gguf``. Capital letters of a type and spaces do not matter.

    Raises:
        InputError: another engine or type, a file that is not there or is damaged, or xllamacpp is not installed.
    """
    found: dict[str | Path, None] = {}
    for text in texts:
        for part in text.split(","):
            engine, colon, source = (word.strip() for word in part.partition(":"))
            if engine != LLAMA or (colon and source.lower() not in TYPES and not source.endswith(".gguf")):
                known = ", ".join(f"{LLAMA}:{name}" for name in (*TYPES, "FILE.gguf"))
                raise InputError(f"against must be {LLAMA} or of {known} (got {part.strip()!r})")
            if source.endswith(".gguf"):
                found[_gguf_file(source)] = None
            else:
                found |= dict.fromkeys([source.lower()] if colon else TYPES)
    if found and importlib.util.find_spec("xllamacpp") is None:
        raise InputError(f"against {LLAMA} needs xllamacpp, which is not installed; pip install 'ace_ext[llama]'")
    return list(found)


def _gguf_file(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"against {text!r} is not a file; check the path")
    check_gguf(path)
    return path


def packed_candidates(folders: Iterable[str]) -> list[Candidate]:
    """A candidate for each packed folder, named by the folder's name, or by its path if two have the same name.

    Raises:
        InputError: a folder is given twice.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"folder {str(path)!r} is given twice; give each folder once")
    names = [path.name for path in paths]
    return [Candidate(path.name if names.count(path.name) == 1 else str(path), path) for path in paths]
