"""What a contest measures: the dense folder, packed and smaller folders, and dense weights in other engines."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ace_ext.bench.gguf_writer import TYPES
from ace_ext.errors import InputError
from ace_ext.models.gguf_header import check_gguf
from ace_ext.packed.files import SUFFIX, is_packed

LLAMA = "llama.cpp"
VLLM = "vllm"
DENSE = "dense"
"""The name of the dense folder in torch."""


@dataclass(frozen=True)
class Candidate:
    """One thing that is measured."""

    name: str
    """Unique in a contest."""
    path: Path
    """A folder for torch and vLLM, a GGUF file for llama.cpp."""
    engine: str = "torch"
    """``torch``, ``llama.cpp`` or ``vllm``."""
    beside: str = ""
    """The name of the candidate with the dense model in the same engine and type of weights, if this one is a smaller
    model."""

    def file_bytes(self) -> int:
        """The bytes of the weight files."""
        if self.path.is_file():
            return self.path.stat().st_size
        files = sorted(self.path.glob(f"*{SUFFIX}")) or sorted(self.path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)


def engines_of(texts: Iterable[str]) -> tuple[list[str | Path], bool]:
    """What ``--against`` names: the GGUF of :func:`gguf_sources`, and whether vLLM is among the engines.

    Raises:
        InputError: as of :func:`gguf_sources`, or vLLM is not installed.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    served = any(part.lower() == VLLM for part in parts)
    sources = gguf_sources(part for part in parts if part.lower() != VLLM)
    if served and importlib.util.find_spec(VLLM) is None:
        raise InputError(f"against {VLLM} needs vLLM, which is not installed; pip install 'ace_ext[vllm]'")
    return sources, served


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
                raise InputError(f"against must be {LLAMA} or of {known}, {VLLM} (got {part.strip()!r})")
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


def folder_candidates(folders: Iterable[str]) -> list[Candidate]:
    """A candidate for each folder, packed or of a smaller model, named by the folder's name, or by its path if two have
    the same name.

    Raises:
        InputError: a folder is given twice.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"folder {str(path)!r} is given twice; give each folder once")
    names = [path.name for path in paths]
    return [
        Candidate(
            path.name if names.count(path.name) == 1 else str(path), path, beside="" if is_packed(path) else DENSE
        )
        for path in paths
    ]
