"""Sources of text: one in this package, three small ones that need only a package index, two of the hub, and local
files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_ext.data.local_files import read_file
from ace_ext.data.media_items import is_media, listing_sha256
from ace_ext.data.mixture import Part, parts_of
from ace_ext.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

CALIBRATION = "calibration"
HELD_OUT = "held-out"
SPLITS = (CALIBRATION, HELD_OUT)
BUNDLED = "bundled"  # the text in this package (data/bundled.py), and the default for calibration
SELF = "self"  # text that the model writes (data/generate.py); not read here, and not taken as a file's name

# C4 comes in shards of some 356,000 documents; the first few thousand hold millions of tokens. Wanda's evaluation takes
# 1,100 held-out documents.
_C4_DOCUMENTS = {CALIBRATION: 4000, HELD_OUT: 1100}
_C4_SHARD = {
    CALIBRATION: ("train", "en/c4-train.00000-of-01024.json.gz"),
    HELD_OUT: ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}


def load_text(
    source: str, split: str, text_field: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """Return the documents of a source.

    source      `bundled`, `wiki-mini`, `news-mini`, `code-mini`, `wikitext2`, `c4`, or the path of a `.txt` file
                (UTF-8, one document) or a `.jsonl` file (one JSON object a line). Not a mixture: see `load_parts`.
    split       `calibration` or `held-out`: two disjoint parts. For a local file both are the whole file.
    text_field  the field of a `.jsonl` line that holds the text.
    cache_dir   the folder that caches gensim's wheel; default: see :func:`cache_folder`. `wikitext2` and `c4` use the
                cache of `datasets`.

    Published perplexities use the documents joined by empty lines.

    Raises:
        InputError: an unknown source or split, a file that cannot be read, a source without text, or one that cannot
            be reached.
    """
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if len(texts_of(source)) > 1:
        raise InputError(f"text: {source!r} is a mixture, which is for calibration only; give one text")
    if source == BUNDLED:
        from ace_ext.data.bundled import bundled_text  # imported here: other sources do not need it

        documents = bundled_text(split)
    elif source in SMALL_SOURCES:
        from ace_ext.data.gensim_data import TEXTS  # imported here: other sources do not need it

        cache = Path(cache_dir) if cache_dir else cache_folder()
        documents = TEXTS[source](cache)[SPLITS.index(split)]
    elif source in _HUB_TEXTS:
        documents = _HUB_TEXTS[source](split)
    else:
        documents = read_file(source, text_field, [*SOURCES, SELF] if split == CALIBRATION else SOURCES)
    if not any(document.strip() for document in documents):
        raise InputError(f"text: {source} has no text; give a file with at least one document that is not blank")
    return documents


def texts_of(source: str) -> tuple[Part, ...]:
    """The texts that the name of a calibration text stands for; errors as :func:`ace_ext.data.mixture.parts_of`."""
    return parts_of(source, SELF)


def load_parts(
    source: str, text_field: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> list[tuple[Part, list[str]]]:
    """The calibration documents of each text of a mixture, or of the one text that ``source`` names.

    Raises:
        InputError: as :func:`texts_of` and :func:`load_text`.
    """
    return [(part, load_text(part.source, CALIBRATION, text_field, cache_dir)) for part in texts_of(source)]


def source_sha256(source: str, split: str, text_field: str) -> str | None:
    """The SHA-256, in hex, of the documents of a local file, or of all local files of a mixture; of images or sound
    that of the files' names and sizes, and of their texts. None for texts that are fixed.

    Raises:
        InputError: as :func:`load_text`, :func:`texts_of` and :func:`ace_ext.data.media_items.media_items`.
    """
    if is_media(source):
        return listing_sha256(source)
    texts = [part.source for part in texts_of(source)] if split == CALIBRATION else [source]
    fixed = (*SOURCES, SELF) if split == CALIBRATION else SOURCES
    files = [load_text(text, split, text_field) for text in texts if text not in fixed]
    joined = "\n\n".join(document for file in files for document in file)
    return hashlib.sha256(joined.encode("utf-8")).hexdigest() if files else None


def cache_folder() -> Path:
    """The folder for downloaded text: `$ACE_CACHE`; else `~/.cache/ace_ext`, the folder of earlier versions, if it
    exists; else the platform's folder for caches."""
    given = os.environ.get("ACE_CACHE")
    if given:
        return Path(given)
    earlier = Path("~/.cache/ace_ext").expanduser()
    if earlier.is_dir():
        return earlier
    from platformdirs import user_cache_path  # imported here: pruning on the caller's tokens does not need it

    return user_cache_path("ace_ext", appauthor=False)


def _wikitext2(split: str) -> list[str]:
    hub_split = "train" if split == CALIBRATION else "test"
    return list(_load_dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=hub_split)["text"])


def _c4(split: str) -> list[str]:
    hub_split, shard = _C4_SHARD[split]
    data = _load_dataset("c4", "allenai/c4", data_files={hub_split: shard}, split=hub_split)
    return list(data.select(range(min(len(data), _C4_DOCUMENTS[split])))["text"])


def _load_dataset(source: str, *path: str, **options: Any) -> Dataset:
    """Call datasets.load_dataset; whatever it raises becomes an InputError."""
    remedy = "use a local .txt or .jsonl file, or wiki-mini"
    try:
        import datasets  # slow to import, and only these two sources need it
    except ImportError as error:
        raise InputError(f"text: {source} needs the package datasets; pip install datasets, or {remedy}") from error
    try:
        return datasets.load_dataset(*path, **options)
    except Exception as error:  # datasets, hub and http each raise types of their own; the cause is kept
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"text: {source} could not be loaded ({type(error).__name__}: {reason}); check the network, or {remedy}"
        ) from error


_HUB_TEXTS: dict[str, Callable[[str], list[str]]] = {"wikitext2": _wikitext2, "c4": _c4}
SMALL_SOURCES = (BUNDLED, "wiki-mini", "news-mini", "code-mini")
"""Sources whose two splits come from one small file."""
SOURCES = (*SMALL_SOURCES, *_HUB_TEXTS)
