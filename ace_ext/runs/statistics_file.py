"""The statistics file: a zip file with one safetensors blob per block. A model is pruned from it without a forward
pass.

It holds statistics of the dense model: in a run that saves them, each block reads the output of dense blocks. So one
file serves every sparsity and pattern, and every method whose statistics it holds.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.fingerprint import differences
from ace_ext.models.safetensors_files import bytes_of, flush
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.metrics import METRICS
from ace_ext.pruning.sketch import SketchState
from ace_ext.pruning.stages import MatrixStage, stages_of
from ace_ext.pruning.statistics import LinearStatistics, MomentState
from ace_ext.runs.own_files import DESCRIPTION, stored_member
from ace_ext.whole_files import written_whole

FORMAT = 1


class StatisticsWriter:
    """Writes one blob per block to a folder, and packs them into the file at the end. The blobs survive a crash.

    Args:
        path: the file to write.
        folder: for the blobs.
        fingerprint: of the model and the calibration tokens that the statistics belong to.
        writes: whether this process writes; all processes have the same statistics, so one suffices.
    """

    def __init__(self, path: Path, folder: Path, fingerprint: dict[str, Any], writes: bool = True) -> None:
        self.path, self.folder, self.fingerprint, self.writes = path, folder, fingerprint, writes
        self._own: set[str] = set()  # the names of the blobs that this process wrote
        if writes:
            folder.mkdir(parents=True, exist_ok=True)

    def block(self, name: str, stats: dict[str, LinearStatistics]) -> None:
        """Writes a block's statistics; they are on the disk when this returns."""
        if not self.writes:
            return
        tensors, shared = _flatten(stats)
        part = self.folder / f"{name}.part"
        text = json.dumps(shared)
        save_file({**tensors, _SUM: _sha256(tensors, text)}, part, {"linears": text})
        flush(part)
        part.replace(self.folder / name)
        self._own.add(name)

    def finish(self, kinds: frozenset[str]) -> str:
        """Packs the blobs into the file, and returns a line about it. ``kinds``: the kinds of statistics that they
        hold.

        Raises:
            InputError: the file cannot be written.
        """
        note = f"statistics written to {self.path}: {reusable(kinds)}"
        if not self.writes:
            return note
        description = {"format": FORMAT, "inputs": "dense model", "kinds": sorted(kinds), **self.fingerprint}
        try:
            self._pack(description)
        except OSError as error:  # not that of the output, which may be on another disk
            raise InputError(
                f"save-stats {str(self.path)!r} cannot be written: {error.strerror or error}; correct that and "
                "continue with --resume"
            ) from error
        return note

    def _pack(self, description: dict[str, Any]) -> None:
        with (
            written_whole(self.path) as part,
            zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            archive.writestr(zipfile.ZipInfo(DESCRIPTION), json.dumps(description, indent=1))  # without the time of day
            for blob in sorted(self.folder.iterdir()):
                if blob.name not in self._own:
                    _check(blob)
                entry = zipfile.ZipInfo(blob.name)
                with blob.open("rb") as found, archive.open(entry, "w", force_zip64=True) as stored:
                    shutil.copyfileobj(found, stored)


def reusable(kinds: frozenset[str]) -> str:
    """Describes what ``run --stats`` can do with a file that has these kinds of statistics."""
    stages: list[MatrixStage] = []
    for kind in stages_of(MatrixStage).values():
        grams = next((setting.choices for setting in kind.settings() if setting.name == "gram"), ("",))
        stages += [kind(**{"gram": gram} if gram else {}) for gram in grams]
    scores = [name for name, metric in METRICS.items() if metric.needs <= kinds]
    served = [*scores, *(str(stage) for stage in stages if stage.needs <= kinds)]
    return f"run --stats prunes this model from them at any sparsity or pattern with {', '.join(served)}"


_DAMAGE = (
    zipfile.BadZipFile,
    SafetensorError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,  # also for an encrypted member, or an unknown compression
)
"""Exceptions that a damaged file or a file of another kind may raise."""


def _check(blob: Path) -> None:
    """Checks a blob that an earlier process wrote."""
    try:
        _unpack(blob.read_bytes(), "cpu")
    except _DAMAGE as error:
        raise InputError(f"resume: {blob} is damaged ({error}); start over without --resume") from error


class SavedStatistics:
    """A file of :class:`StatisticsWriter`, opened for a model.

    Args:
        path: the file.
        model_fingerprint: of the model to prune, as the writer got it.
        needs: the kinds of statistics that the run will read.

    Raises:
        InputError: it is not such a file, it belongs to another model, or it does not hold all kinds of ``needs``.
    """

    def __init__(self, path: str | Path, model_fingerprint: dict[str, Any], needs: frozenset[str]) -> None:
        self.path = Path(path)
        try:
            if not self.path.is_file():
                raise FileNotFoundError("No such file")
            self._archive = zipfile.ZipFile(self.path)
            description = json.loads(stored_member(self._archive, DESCRIPTION))
            if description["format"] != FORMAT:
                raise ValueError(f"its format is {description['format']}, not {FORMAT}")
            kept = frozenset(description["kinds"])
            self.calibration: dict[str, Any] = description["calibration"]
            changed = differences(description["model"], model_fingerprint)
        except (OSError, *_DAMAGE) as error:
            raise InputError(f"stats {str(path)!r} is not a file of --save-stats: {error}") from error
        if changed:
            raise InputError(f"stats {str(path)!r} belongs to another model: {'; '.join(changed)}")
        if not needs <= kept:
            raise InputError(
                f"stats {str(path)!r} holds {', '.join(sorted(kept)) or 'no kind'} of statistics, not "
                f"{', '.join(sorted(needs - kept))}; collect again with --save-stats and this method"
            )

    @property
    def sha256(self) -> str:
        """A SHA-256, in hex, of the members' names, sizes and checksums: what distinguishes two files that describe the
        same model and text."""
        members = sorted((member.filename, member.file_size, member.CRC) for member in self._archive.infolist())
        return hashlib.sha256(json.dumps(members).encode()).hexdigest()

    def block(self, name: str, children: Iterable[str], device: torch.device | str) -> dict[str, LinearStatistics]:
        """The statistics of a block's Linears, by their names in the block, on ``device``.

        Raises:
            InputError: the file lacks one of ``children``, or is damaged.
        """
        try:
            blob = stored_member(self._archive, name) if name in self._archive.namelist() else None
            stats = {} if blob is None else _unflatten(*_unpack(blob, device))
        except _DAMAGE as error:
            raise InputError(
                f"stats {str(self.path)!r} is damaged at {name}: {error}; collect again with --save-stats"
            ) from error
        for child in children:
            if child not in stats:
                raise InputError(
                    f"stats {str(self.path)!r} has no statistics of {name}.{child}; collect again with the "
                    "same skip, include and exclude"
                )
        return stats


def _unpack(blob: bytes, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors = load(blob)
    length = int.from_bytes(blob[:8], "little")
    text = json.loads(blob[8 : 8 + length])["__metadata__"]["linears"]
    recorded = tensors.pop(_SUM, None)
    if recorded is None or not torch.equal(recorded, _sha256(tensors, text)):
        raise ValueError("its checksum differs")
    return {key: value.to(device) for key, value in tensors.items()}, json.loads(text)


_SUM = "sha256"
"""The name of a tensor of 32 bytes: the checksum of all other tensors and of the text beside them."""


def _sha256(tensors: dict[str, Tensor], linears: str) -> Tensor:
    digest = hashlib.sha256(linears.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


# Each state is stored once: Linears with the same input share it, in the file as in memory.


def _flatten(stats: dict[str, LinearStatistics]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    linears = {}
    for child, own in stats.items():
        entry: dict[str, Any] = {"tokens": own.tokens}
        for kind, value in own.parts().items():
            if id(value) not in names:
                names[id(value)] = f"{child}/{kind}"
                tensors.update({f"{child}/{kind}/{leaf}": t.contiguous() for leaf, t in _leaves(value).items()})
            entry[kind] = names[id(value)]
        linears[child] = entry
    return tensors, linears


def _unflatten(tensors: dict[str, Tensor], linears: dict[str, dict[str, Any]]) -> dict[str, LinearStatistics]:
    made: dict[str, Any] = {}

    def value(name: str | None) -> Any:
        if name is not None and name not in made:
            kind = name.rpartition("/")[2]
            made[name] = _grow(kind, {k[len(name) + 1 :]: t for k, t in tensors.items() if k.startswith(name + "/")})
        return None if name is None else made[name]

    return {
        child: LinearStatistics(
            input=value(entry.get("input")),
            weighted=value(entry.get("weighted")),
            moment=value(entry.get("moment")),
            gram=value(entry.get("gram")),
            tokens=entry["tokens"],
            sampled=value(entry["probe"]),
        )
        for child, entry in linears.items()
    }


def _leaves(value: MomentState | GramState | SketchState | Tensor | list[Tensor]) -> dict[str, Tensor]:
    if isinstance(value, list):
        return {"rows": torch.cat(value)}
    return {"matrix": value} if isinstance(value, Tensor) else value.tensors()


def _grow(kind: str, leaves: dict[str, Tensor]) -> Any:
    if kind == "probe":
        return [leaves["rows"]]
    if kind == "moment":
        return leaves["matrix"]
    if kind == "gram" and "product" in leaves:
        return SketchState.of_tensors(leaves)
    return _STATES[kind].of_tensors(leaves)


_STATES: dict[str, type[MomentState] | type[GramState]] = {
    "input": MomentState,
    "weighted": MomentState,
    "gram": GramState,
}
