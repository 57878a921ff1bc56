"""Sources of text: two small collections that need only a package index, two of the hub's, and local files.

`wiki-mini` and `news-mini` are test data in gensim's wheel. Each is split into a calibration part and a held-out part;
the split is fixed, so that all runs see the same text.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_ext.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

CALIBRATION = "calibration"
HELD_OUT = "held-out"
SPLITS = (CALIBRATION, HELD_OUT)
SELF = "self"  # text that the model writes (data/generate.py); not read here, and not taken as a file's name

_SPLIT_SEED = 0

# What is removed from a wiki page, in this order: pattern, replacement, passes. Several passes remove nested mark-up,
# the innermost first. Published figures depend on this table: any change moves every perplexity on wiki-mini. So known
# errors stay too: of a picture whose caption holds a link, the caption and some brackets remain.
_WIKI_MARKUP = [
    (re.compile(r"<!--.*?-->", re.S), "", 1),  # comments
    (re.compile(r"<ref[^>/]*/>"), "", 1),  # a footnote used again: <ref name=x />
    (re.compile(r"<ref.*?</ref>", re.S), "", 1),  # a footnote
    (re.compile(r"\{\{[^{}]*\}\}"), "", 6),  # templates: {{cite|...}}
    (re.compile(r"\{\|.*?\|\}", re.S), "", 1),  # tables: {| ... |}
    (re.compile(r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*\]\]"), "", 1),  # pictures, categories, languages
    (re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]"), r"\1", 1),  # links: [[page]] and [[page|words]] leave the words
    (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1", 1),  # links out: [http://... words]
    (re.compile(r"'{2,}"), "", 1),  # ''italic'' and '''bold'''
    (re.compile(r"<[^>]+>"), "", 1),  # any other tag
    (re.compile(r"\n[*#:;|!][^\n]*"), "", 1),  # list items, indented lines, rows of tables
    (re.compile(r"==( ?)(?:References|See also)\1==.*", re.S), "", 1),  # the sections after the article's text
    (re.compile(r"\n{3,}"), "\n\n", 1),  # the empty lines that all this leaves
]
_WIKI_PAGE = re.compile(r"<text[^>]*>(.*?)</text>", re.S)
_WIKI_MIN_CHARACTERS = 2000  # of mark-up; what is shorter is a stub or a redirect
_WIKI_CALIBRATION_ARTICLES = 70  # of 103
_NEWS_CALIBRATION_ITEMS = 200  # of 293

# The hashes of both files, so that another release of gensim cannot change a figure unnoticed.
_WIKI_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS_FILE = "lee_background.cor"
_SHA256 = {
    _WIKI_FILE: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    _NEWS_FILE: "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
}
_GENSIM = "gensim==4.4.0"
# Only data is read from the wheel, so the wheel of one platform serves all machines.
_PIP_DOWNLOAD = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
_PIP_DOWNLOAD += ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]

# C4 comes in shards of some 356,000 documents; the first few thousand hold millions of tokens. 1,100 held-out documents
# is what Wanda's evaluation takes.
_C4_DOCUMENTS = {CALIBRATION: 4000, HELD_OUT: 1100}
_C4_SHARD = {
    CALIBRATION: ("train", "en/c4-train.00000-of-01024.json.gz"),
    HELD_OUT: ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}


def load_text(
    source: str, split: str, text_field: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """Return the documents of a source.

    source      `wiki-mini`, `news-mini`, `wikitext2`, `c4`, or the path of a `.txt` file (UTF-8, one document) or a
                `.jsonl` file (one JSON object a line).
    split       `calibration` or `held-out`: two disjoint parts. Of a local file both are the whole file.
    text_field  the field of a `.jsonl` line that holds the text.
    cache_dir   the folder where gensim's wheel is looked for and kept; default: see :func:`cache_folder`. `wikitext2`
                and `c4` use the cache of `datasets`.

    The documents joined by empty lines are the text that published perplexities use.

    Raises:
        InputError: an unknown source or split, a file that cannot be read, a source without text, or one that cannot
            be reached.
    """
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is unknown; use one of {', '.join(SPLITS)}")
    read = _READERS.get(source)
    documents = read(split, cache_dir) if read else _read_file(source, split, text_field)
    if not any(document.strip() for document in documents):
        raise InputError(f"source: {source} holds no text; give a file with at least one document that is not blank")
    return documents


def cache_folder() -> Path:
    """The folder for downloaded text: `$ACE_CACHE`; else `~/.cache/ace_ext` if it is there, where earlier versions kept
    it; else the platform's folder for caches."""
    given = os.environ.get("ACE_CACHE")
    if given:
        return Path(given)
    earlier = Path("~/.cache/ace_ext").expanduser()
    if earlier.is_dir():
        return earlier
    from platformdirs import user_cache_path  # imported here: pruning on tokens of one's own does without it

    return user_cache_path("ace_ext", appauthor=False)


# --- gensim's test data -----------------------------------------------------------------------------------------------


def _wiki_mini(split: str, cache_dir: str | os.PathLike[str] | None) -> list[str]:
    dump = bz2.decompress(_gensim_data("wiki-mini", _WIKI_FILE, cache_dir)).decode("utf-8")
    pages = (page for page in _WIKI_PAGE.findall(dump) if len(page) >= _WIKI_MIN_CHARACTERS)
    articles = [_strip_wiki_markup(page) for page in pages if not page.startswith("#REDIRECT")]
    return _part(articles, _WIKI_CALIBRATION_ARTICLES, split)


def _news_mini(split: str, cache_dir: str | os.PathLike[str] | None) -> list[str]:
    items = _gensim_data("news-mini", _NEWS_FILE, cache_dir).decode("utf-8").splitlines()
    # Seven of the 300 items occur twice: without this, calibration would see held-out text.
    return _part(list(dict.fromkeys(items)), _NEWS_CALIBRATION_ITEMS, split)


def _part(documents: list[str], calibration_count: int, split: str) -> list[str]:
    random.Random(_SPLIT_SEED).shuffle(documents)
    return documents[:calibration_count] if split == CALIBRATION else documents[calibration_count:]


def _strip_wiki_markup(page: str) -> str:
    """Return the running text of a wiki page as it stands, escaped, in a dump."""
    text = html.unescape(html.unescape(page))  # once for the XML, once for the author's own entities (&nbsp;)
    for pattern, replacement, passes in _WIKI_MARKUP:
        for _ in range(passes):
            text = pattern.sub(replacement, text)
    return text.strip()


def _gensim_data(source: str, name: str, cache_dir: str | os.PathLike[str] | None) -> bytes:
    """Return a file of gensim's test data: from an installed gensim, a wheel in the cache, or a fresh download."""
    cache = Path(cache_dir) if cache_dir else cache_folder()
    for data in _local_gensim_data(name, cache):
        if hashlib.sha256(data).hexdigest() == _SHA256[name]:
            return data
    wheel = _download_gensim(source, cache)
    fetched = _read_from_wheel(wheel, name)
    if fetched is None or hashlib.sha256(fetched).hexdigest() != _SHA256[name]:
        raise InputError(f"source {source}: {wheel} does not hold the expected {name}; delete it, or use a local file")
    return fetched


def _local_gensim_data(name: str, cache: Path) -> Iterator[bytes]:
    gensim = importlib.util.find_spec("gensim")  # finds it without importing it
    for folder in (gensim.submodule_search_locations or []) if gensim else []:
        file = Path(folder, "test", "test_data", name)
        if file.is_file():
            yield file.read_bytes()
    for wheel in sorted(cache.glob("gensim*.whl")):
        data = _read_from_wheel(wheel, name)
        if data is not None:
            yield data


def _read_from_wheel(wheel: Path, name: str) -> bytes | None:
    """Return a file of gensim's test data, or None from a damaged wheel or one that lacks it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"gensim/test/test_data/{name}")
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def _download_gensim(source: str, cache: Path) -> Path:
    """Let pip fetch the wheel into a folder of its own, then rename it: the cache never holds half a wheel."""
    remedy = f"put a wheel of {_GENSIM} into that folder, or use a local .txt or .jsonl file"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
            command = [sys.executable, *_PIP_DOWNLOAD, "--dest", folder, _GENSIM]
            pip = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            wheels = list(Path(folder).glob("gensim*.whl"))
            if pip.returncode == 0 and wheels:
                return wheels[0].replace(cache / wheels[0].name)
            reason = (pip.stderr.strip().splitlines() or [f"pip ended with status {pip.returncode}"])[-1]
    except OSError as error:
        reason = str(error)
    raise InputError(
        f"source {source}: no gensim with this text is installed or in {cache}; pip fetched none ({reason}); {remedy}"
    )


# --- the hub ----------------------------------------------------------------------------------------------------------


def _wikitext2(split: str, cache_dir: str | os.PathLike[str] | None) -> list[str]:
    hub_split = "train" if split == CALIBRATION else "test"
    return list(_load_dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=hub_split)["text"])


def _c4(split: str, cache_dir: str | os.PathLike[str] | None) -> list[str]:
    hub_split, shard = _C4_SHARD[split]
    data = _load_dataset("c4", "allenai/c4", data_files={hub_split: shard}, split=hub_split)
    return list(data.select(range(min(len(data), _C4_DOCUMENTS[split])))["text"])


def _load_dataset(source: str, *path: str, **options: Any) -> Dataset:
    """Call datasets.load_dataset; whatever it raises becomes an InputError."""
    remedy = "use a local .txt or .jsonl file, or wiki-mini"
    try:
        import datasets  # slow to import, and only these two sources need it
    except ImportError as error:
        raise InputError(f"source {source}: needs the package datasets; pip install datasets, or {remedy}") from error
    try:
        return datasets.load_dataset(*path, **options)
    except Exception as error:  # datasets, hub and http each raise types of their own; the cause is kept
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"source {source}: could not be loaded ({type(error).__name__}: {reason}); check the network, or {remedy}"
        ) from error


# --- local files ------------------------------------------------------------------------------------------------------


def _read_file(source: str, split: str, text_field: str) -> list[str]:
    file = Path(source)
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl}.get(file.suffix.lower())
    if not os.path.exists(file):  # Path.exists raises where a name is too long
        names = [*_READERS, SELF] if split == CALIBRATION else list(_READERS)
        raise InputError(
            f"source: {source!r} is neither a file nor a known name; use {', '.join(names)}, or a .txt or .jsonl file"
        )
    if reader is None or not file.is_file():
        raise InputError(f"source: {source!r} is no .txt or .jsonl file; give one of these (.jsonl: an object a line)")
    try:
        return reader(file, text_field)
    except UnicodeDecodeError as error:
        raise InputError(f"source: {source} is not UTF-8 ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"source: {source} cannot be read ({error.strerror}); check its permissions") from error


def _read_txt(file: Path, text_field: str) -> list[str]:
    return [file.read_text(encoding="utf-8-sig")]  # -sig: without a byte order mark


def _read_jsonl(file: Path, text_field: str) -> list[str]:
    with file.open(encoding="utf-8-sig") as lines:
        return [_text_of(line, text_field, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _text_of(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"source: {where}: not valid JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"source: {where}: found a JSON {type(record).__name__}; each line must be one JSON object")
    if text_field not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise InputError(f"text_field: {where}: no field {text_field!r}; fields found: {found}; name the one with text")
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            f"text_field: {where}: field {text_field!r} is a {type(text).__name__}, no string; name the one with text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text_field: {where}: field {text_field!r} holds half a surrogate pair ({error.reason}); repair the escape"
        ) from error
    return text


_READERS: dict[str, Callable[[str, str | os.PathLike[str] | None], list[str]]] = {
    "wiki-mini": _wiki_mini,
    "news-mini": _news_mini,
    "wikitext2": _wikitext2,
    "c4": _c4,
}
SOURCES = tuple(_READERS)
