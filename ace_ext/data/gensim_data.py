"""The small texts in gensim's wheel: articles of Wikipedia, news items, and gensim's own Python code.

pip fetches the wheel once. The wheel is not installed, and none of its code runs. Each text has a calibration part and
a held-out part. The split is fixed, so that all runs see the same text.
"""

import bz2
import hashlib
import html
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ace_ext.errors import InputError

Parts = tuple[list[str], list[str]]
"""The documents to calibrate on, and those held out."""

_SPLIT_SEED = 0

# What is removed from a wiki page, in this order: pattern, replacement, passes. Several passes remove nested mark-up,
# the innermost first. Published figures depend on this table: any change alters every perplexity on wiki-mini. So known
# errors stay too: a picture with a link in its caption leaves the caption and some brackets.
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
_WIKI_MIN_CHARACTERS = 2000  # with mark-up; a shorter page is a stub or a redirect
_WIKI_CALIBRATION_ARTICLES = 70  # of 103
_NEWS_CALIBRATION_ITEMS = 200  # of 293
_CODE_CALIBRATION_FILES = 80  # of 120

# Files that share more than half of their longer lines with another one. They are left out, because calibration would
# otherwise see held-out text.
_CODE_REPEATS = {
    "gensim/models/lsi_dispatcher.py",  # of lda_dispatcher.py
    "gensim/models/lsi_worker.py",  # of lda_worker.py
    "gensim/scripts/make_wiki_online.py",  # of make_wiki.py, like the next two
    "gensim/scripts/make_wiki_online_nodebug.py",
    "gensim/scripts/make_wikicorpus.py",
    "gensim/test/simspeed2.py",  # of simspeed.py
}


@dataclass(frozen=True)
class _Files:
    """Files of the package: their name in error messages, a test of their paths in the wheel, and a SHA-256. The hash
    covers their contents in the order of their paths, joined by a zero byte. It detects another release of gensim,
    which would change the figures."""

    title: str
    wanted: Callable[[str], bool]
    sha256: str

    def check(self, contents: list[bytes]) -> bool:
        """Whether these are the files."""
        return hashlib.sha256(b"\0".join(contents)).hexdigest() == self.sha256


def _test_data(name: str, sha256: str) -> _Files:
    return _Files(name, lambda path: path == f"gensim/test/test_data/{name}", sha256)


_WIKI = _test_data(
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
_NEWS = _test_data("lee_background.cor", "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb")
_CODE = _Files(
    "Python files",
    lambda path: path.startswith("gensim/") and path.endswith(".py") and path not in _CODE_REPEATS,
    "a5c31b92129a8c975160eed27d21d9bfad420cae3621cb1d5e96f1ee30dbedc8",
)

_GENSIM = "gensim==4.4.0"
# Only data is read from the wheel, so the wheel of one platform serves all machines.
_PIP_DOWNLOAD = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
_PIP_DOWNLOAD += ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]


def wiki_mini(cache: Path) -> Parts:
    """103 articles of Wikipedia as running text. ``cache``: the folder that caches the wheel.

    Raises:
        InputError: the wheel cannot be fetched, or its files are not the expected ones.
    """
    (packed,) = _read("wiki-mini", _WIKI, cache)
    pages = _WIKI_PAGE.findall(bz2.decompress(packed).decode("utf-8"))
    articles = [page for page in pages if len(page) >= _WIKI_MIN_CHARACTERS and not page.startswith("#REDIRECT")]
    return _split([_strip_wiki_markup(page) for page in articles], _WIKI_CALIBRATION_ARTICLES)


def news_mini(cache: Path) -> Parts:
    """293 news items; arguments and errors as :func:`wiki_mini`."""
    (items,) = _read("news-mini", _NEWS, cache)
    # Seven of the 300 items occur twice. Repeats are removed, because calibration would otherwise see held-out text.
    return _split(list(dict.fromkeys(items.decode("utf-8").splitlines())), _NEWS_CALIBRATION_ITEMS)


def code_mini(cache: Path) -> Parts:
    """120 Python files, licence headers included; arguments and errors as :func:`wiki_mini`."""
    files = [content.decode("utf-8") for content in _read("code-mini", _CODE, cache)]
    return _split([file for file in files if file.strip()], _CODE_CALIBRATION_FILES)


def _split(documents: list[str], calibration_count: int) -> Parts:
    random.Random(_SPLIT_SEED).shuffle(documents)
    return documents[:calibration_count], documents[calibration_count:]


def _strip_wiki_markup(page: str) -> str:
    """Return the running text of a wiki page; `page` is its escaped mark-up from a dump."""
    text = html.unescape(html.unescape(page))  # once for the XML, once for the author's own entities (&nbsp;)
    for pattern, replacement, passes in _WIKI_MARKUP:
        for _ in range(passes):
            text = pattern.sub(replacement, text)
    return text.strip()


# --- where the files are ----------------------------------------------------------------------------------------------


def _read(source: str, files: _Files, cache: Path) -> list[bytes]:
    """The files' contents, in the order of their paths: from an installed gensim, a wheel in the cache, or a fresh
    download."""
    for contents in _local(files, cache):
        if files.check(contents):
            return contents
    wheel = _download_gensim(source, cache)
    fetched = _read_wheel(wheel, files)
    if not files.check(fetched):
        raise InputError(
            f"text: {source}: {wheel} does not hold the expected {files.title}; delete it, or use a local file"
        )
    return fetched


def _local(files: _Files, cache: Path) -> Iterator[list[bytes]]:
    gensim = importlib.util.find_spec("gensim")  # finds it without importing it
    for folder in (gensim.submodule_search_locations or []) if gensim else []:
        yield _read_folder(Path(folder), files)
    for wheel in sorted(cache.glob("gensim*.whl")):
        yield _read_wheel(wheel, files)


def _read_folder(folder: Path, files: _Files) -> list[bytes]:
    """The contents of the files in the folder of an installed gensim; empty if one cannot be read."""
    found = {f"gensim/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
    try:
        return [found[name].read_bytes() for name in sorted(found) if files.wanted(name)]
    except OSError:
        return []


def _read_wheel(wheel: Path, files: _Files) -> list[bytes]:
    """The contents of the files in a wheel; empty if the wheel is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(name) for name in sorted(archive.namelist()) if files.wanted(name)]
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return []


def _download_gensim(source: str, cache: Path) -> Path:
    """Let pip fetch the wheel into a temporary folder, then move it, so the cache never has an incomplete wheel."""
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
        f"text: {source}: gensim with this text is neither installed nor in {cache}, and pip could not fetch it "
        f"({reason}); {remedy}"
    )


TEXTS = {"wiki-mini": wiki_mini, "news-mini": news_mini, "code-mini": code_mini}
"""The texts by their names in :mod:`ace_ext.data.corpora`."""
