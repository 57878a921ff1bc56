"""Sources of text: gensim's wheel, the hub through a local data set, local files; and their errors."""

import ast
import collections
import hashlib
import importlib.util
import itertools
import json
import re
import sys
import zipfile

import pytest

from ace_ext.data import corpora, gensim_data
from ace_ext.data.corpora import load_text
from ace_ext.errors import InputError

pytestmark = pytest.mark.network
"""pip fetches gensim's wheel once, by whichever test comes first."""


def refusal(source, split="calibration", **kwargs):
    """Return the one-line message with which a source is refused."""
    with pytest.raises(InputError) as caught:
        load_text(source, split, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def wiki():
    return {split: load_text("wiki-mini", split) for split in corpora.SPLITS}


@pytest.fixture(scope="module")
def news():
    return {split: load_text("news-mini", split) for split in corpora.SPLITS}


def joined_sha256(documents):
    return hashlib.sha256("\n\n".join(documents).encode()).hexdigest()


# --- wiki-mini and news-mini ------------------------------------------------------------------------------------------


def test_wiki_mini_is_the_text_behind_the_published_figures(wiki):
    assert joined_sha256(wiki["calibration"]) == "9fd4596eaf2af7eed29767db2d63391b37e2bef74965882d916eb6bc8749d3be"
    assert joined_sha256(wiki["held-out"]) == "caca4623bdac0ccef8d89466edad9e6dc5601d992335ef964e2b776c7d4d6142"


def test_wiki_mini_parts_are_whole_disjoint_and_fixed(wiki):
    calibration, held_out = wiki["calibration"], wiki["held-out"]
    assert (len(calibration), len(held_out)) == (70, 33)
    assert len(set(calibration) | set(held_out)) == 103
    assert load_text("wiki-mini", "held-out") == held_out


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_wiki_mini_is_running_text(wiki, split):
    text = "\n\n".join(wiki[split])
    for mark in ("<ref", "</", "<!--", "'''", "{|", "|}", "&nbsp;", "&amp;", "[[Category:", "[[File:", "\n\n\n", "\n*"):
        assert mark not in text, mark
    # What the published extraction leaves: captions that hold a link, and formulas.
    assert text.count("[[") < len(text) / 3000
    assert text.count("{{") < len(text) / 100_000


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("a [[page]] and a [[page|few words]]", "a page and a few words"),
        ("see [http://example.org the site]", "see the site"),
        ("x{{cite|a={{b|{{c}}}}}}y", "xy"),
        ("fact&lt;ref name=a /&gt;, fact&lt;ref&gt;a\nbook&lt;/ref&gt;", "fact, fact"),
        ("a&lt;!-- a\nnote --&gt;b&lt;br&gt;c", "abc"),
        ("text\n{| class=x\n|-\n| cell\n|}\nmore", "text\n\nmore"),
        ("text [[File:a.png|thumb|a caption]][[Category:X]][[de:Y]]", "text"),
        ("text\n* item\n: indented\nmore", "text\nmore"),
        ("a&amp;nbsp;b &amp;amp; c", "a\xa0b & c"),
        ("text\n\n\n\nmore\n== See also ==\nlinks\n==References==\nbooks", "text\n\nmore"),
    ],
)
def test_wiki_markup_is_stripped(page, text):
    assert gensim_data._strip_wiki_markup(page) == text


def test_news_mini_parts_are_disjoint_and_fixed(news):
    calibration, held_out = news["calibration"], news["held-out"]
    assert (len(calibration), len(held_out)) == (200, 93)
    assert len(set(calibration) | set(held_out)) == 293  # the file's 300 items hold 7 twice
    assert joined_sha256(calibration) == "5bf4ad0c8882b8c83112f51cdec6a830ec10f208e246089473b7f240ffa7cdd2"
    assert joined_sha256(held_out) == "fc554c7c49cb38adfbfc3ed5fed324cd7ec9f39ac5274300eadaef48cf204e96"


@pytest.fixture(scope="module")
def code():
    return {split: load_text("code-mini", split) for split in corpora.SPLITS}


def test_code_mini_parts_are_whole_disjoint_and_fixed(code):
    calibration, held_out = code["calibration"], code["held-out"]
    assert (len(calibration), len(held_out)) == (80, 40)
    assert len(set(calibration) | set(held_out)) == 120
    assert joined_sha256(calibration) == "a3e4472da942ca9e8a56628f40c00b4173347aec58caa81d54aeeca0f55c28d6"
    assert joined_sha256(held_out) == "2b43ba3c8413882dbb5d81447dc67b4003c5cdfc2512640d8744d8dff9136876"


def test_code_mini_is_python(code):
    for split in corpora.SPLITS:
        for document in code[split]:
            ast.parse(document)


def test_no_file_of_code_mini_repeats_another(code):
    """Two files share at most half of the longer lines of the shorter one, apart from those of headers and imports,
    which are in many files."""
    documents = [*code["calibration"], *code["held-out"]]
    lines = [{line.strip() for line in document.splitlines() if len(line.strip()) > 25} for document in documents]
    count = collections.Counter(itertools.chain.from_iterable(lines))
    own = [{line for line in found if count[line] < 6} for found in lines]
    for one, other in itertools.combinations([found for found in own if len(found) >= 20], 2):
        assert len(one & other) <= min(len(one), len(other)) / 2


# --- where gensim's data is found -------------------------------------------------------------------------------------


@pytest.fixture
def no_gensim(monkeypatch):
    """Hide an installed gensim, so that the cache and pip are what is tested."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gensim" else find_spec(name, *a))


@pytest.fixture(scope="module")
def news_bytes():
    return gensim_data._read("news-mini", gensim_data._NEWS, corpora.cache_folder())[0]


def write_wheel(folder, data, name="gensim-4.4.0-py3-none-any.whl"):
    """Write a wheel that pip takes, with one file of test data."""
    folder.mkdir(exist_ok=True)
    info = "gensim-4.4.0.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(f"gensim/test/test_data/{gensim_data._NEWS.title}", data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gensim\nVersion: 4.4.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder / name


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Let pip know no index but an empty folder."""
    pytest.importorskip("pip")
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_cache_folder(monkeypatch, tmp_path):
    """The folder that was named, else the one of earlier versions, else the platform's."""
    monkeypatch.delenv("ACE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert corpora.cache_folder() == tmp_path / "xdg" / "ace_ext"
    earlier = tmp_path / "home" / ".cache" / "ace_ext"
    earlier.mkdir(parents=True)
    assert corpora.cache_folder() == earlier
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "named"))
    assert corpora.cache_folder() == tmp_path / "named"


def test_installed_gensim_is_read_without_importing_it(monkeypatch, tmp_path, news, news_bytes):
    data = tmp_path / "site" / "gensim" / "test" / "test_data"
    data.mkdir(parents=True)
    (data / gensim_data._NEWS.title).write_bytes(news_bytes)
    (tmp_path / "site" / "gensim" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "gensim", raising=False)
    monkeypatch.setattr(gensim_data, "_download_gensim", lambda *_: pytest.fail("tried to download"))
    assert load_text("news-mini", "calibration", cache_dir=tmp_path / "empty") == news["calibration"]


@pytest.mark.parametrize("by_variable", [False, True])
def test_wheel_in_the_cache_is_found(monkeypatch, tmp_path, no_gensim, index, news, news_bytes, by_variable):
    write_wheel(tmp_path / "cache", news_bytes)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / ("cache" if by_variable else "elsewhere")))
    cache_dir = None if by_variable else tmp_path / "cache"
    assert load_text("news-mini", "held-out", cache_dir=cache_dir) == news["held-out"]


def test_damaged_and_differing_wheels_are_passed_over(tmp_path, no_gensim, index, news, news_bytes):
    cache = tmp_path / "cache"
    whole = write_wheel(cache, news_bytes).read_bytes()
    write_wheel(cache, b"another release's news", "gensim-1.0-py3-none-any.whl")
    (cache / "gensim-2.0-py3-none-any.whl").write_bytes(whole[: len(whole) // 2])
    (cache / "gensim-3.0-py3-none-any.whl").mkdir()
    assert load_text("news-mini", "calibration", cache_dir=cache) == news["calibration"]


def test_pip_fetches_the_wheel_into_the_cache(tmp_path, no_gensim, index, news, news_bytes, capfd):
    wheel = write_wheel(index, news_bytes)
    cache = tmp_path / "new" / "cache"
    assert load_text("news-mini", "calibration", cache_dir=cache) == news["calibration"]
    assert [file.name for file in cache.iterdir()] == [wheel.name]
    wheel.unlink()
    assert load_text("news-mini", "calibration", cache_dir=cache) == news["calibration"]
    assert capfd.readouterr().out == ""


def test_pip_that_finds_nothing_is_reported_in_its_words(tmp_path, no_gensim, index, capfd):
    cache = tmp_path / "cache"
    message = refusal("news-mini", cache_dir=cache)
    assert message.startswith(f"text: news-mini: gensim with this text is neither installed nor in {cache}, and pip")
    assert "No matching distribution found for gensim" in message
    assert "put a wheel of gensim==4.4.0 into that folder, or use a local .txt or .jsonl file" in message
    assert list(cache.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_fetched_wheel_with_other_content_is_refused(tmp_path, no_gensim, index):
    write_wheel(index, b"another release's news")
    assert "does not hold the expected lee_background.cor; delete it" in refusal("news-mini", cache_dir=tmp_path / "c")


def unpack_code(folder, leave_out=""):
    """Write gensim's Python files below a folder, from the wheel that the cache has by now."""
    wheels = sorted(corpora.cache_folder().glob("gensim*.whl"))
    if not wheels:
        pytest.skip("gensim is installed, so there is no wheel to take its files from")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".py") and name != leave_out]
        wheel.extractall(folder, names)


def test_code_of_an_installed_gensim_is_read_without_running_it(monkeypatch, tmp_path, code):
    unpack_code(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "gensim", raising=False)
    monkeypatch.setattr(gensim_data, "_download_gensim", lambda *_: pytest.fail("tried to download"))
    assert load_text("code-mini", "held-out", cache_dir=tmp_path / "empty") == code["held-out"]
    assert "gensim" not in sys.modules


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_other_code_is_refused(tmp_path, no_gensim, index, code, change):
    name = "gensim/nosy.py"
    unpack_code(tmp_path / "files", leave_out=name)
    with zipfile.ZipFile(write_wheel(index, b"news"), "a") as wheel:
        for file in (tmp_path / "files").rglob("*.py"):
            wheel.write(file, file.relative_to(tmp_path / "files").as_posix())
        if change == "changed":
            wheel.writestr(name, "# another release")
    message = refusal("code-mini", cache_dir=tmp_path / "cache")
    assert "does not hold the expected Python files; delete it, or use a local file" in message


def test_cache_that_cannot_be_made_is_refused(tmp_path, no_gensim):
    (tmp_path / "file").write_text("in the way")
    message = refusal("news-mini", cache_dir=tmp_path / "file")
    assert message.startswith("text: news-mini: gensim with this text is neither installed nor in")
    assert "File exists" in message


# --- the hub, through a local data set --------------------------------------------------------------------------------


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch, datasets):
    """Serve a real Dataset of 5,000 rows in the hub's place; return the calls made."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["", *(f"row {i}" for i in range(1, 5000))]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(("split", "hub_split"), [("calibration", "train"), ("held-out", "test")])
def test_wikitext2_keeps_every_row(hub, split, hub_split):
    rows = load_text("wikitext2", split)
    assert "\n\n".join(rows).startswith("\n\nrow 1\n\nrow 2")  # as published: blank rows and all
    assert len(rows) == 5000
    assert hub == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": hub_split})]


@pytest.mark.parametrize(
    ("split", "hub_split", "shard", "count"),
    [
        ("calibration", "train", "en/c4-train.00000-of-01024.json.gz", 4000),
        ("held-out", "validation", "en/c4-validation.00000-of-00008.json.gz", 1100),
    ],
)
def test_c4_reads_the_head_of_one_shard(hub, split, hub_split, shard, count):
    documents = load_text("c4", split)
    assert (len(documents), documents[-1]) == (count, f"row {count - 1}")
    assert hub == [(("allenai/c4",), {"data_files": {hub_split: shard}, "split": hub_split})]


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
@pytest.mark.parametrize("error", [ConnectionError("no route\nto the hub"), ValueError("no such config")])
def test_unreachable_hub_is_refused_with_a_way_out(monkeypatch, datasets, source, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_text(source, "calibration")
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert str(caught.value) == (
        f"text: {source} could not be loaded ({reason}); check the network, "
        "or use a local .txt or .jsonl file, or wiki-mini"
    )
    assert caught.value.__cause__ is error


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "text: c4 needs the package datasets; pip install datasets, or use a local" in refusal("c4")


# --- local files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_txt_is_one_document(tmp_path, split):
    file = tmp_path / "a.TXT"
    file.write_bytes("\ufeffGrüße,\r\n\r\nworld\n".encode())
    assert load_text(str(file), split) == ["Grüße,\n\nworld\n"]


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_jsonl_is_a_document_a_line(tmp_path, split):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": 1, "body": "one\u2028line"}, ensure_ascii=False), "", '{"body": "zwei\\n", "id": 2}']
    file.write_text("\n".join(lines), encoding="utf-8")
    assert load_text(str(file), split, text_field="body") == ["one\u2028line", "zwei\n"]


GOOD_LINE = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'text': 1}", r"text: .*a\.jsonl, line 2: not valid JSON \(.*\); each line must be one JSON object"),
        ("[" * 100_000, r"text: .*a\.jsonl, line 2: not valid JSON \(.*\); each line must be one JSON object"),
        ('["text"]', r"text: .*a\.jsonl, line 2: found a JSON list; each line must be one JSON object"),
        ('{"id": 1, "body": ""}', r"text_field: .*a\.jsonl, line 2: no field 'text'; fields found: 'id', 'body'; name"),
        ("{}", r"text_field: .*a\.jsonl, line 2: no field 'text'; fields found: none; name"),
        ('{"text": null}', r"text_field: .*a\.jsonl, line 2: field 'text' is a NoneType, not a string; name"),
        (r'{"text": "\ud83d"}', r"text_field: .*a\.jsonl, line 2: field 'text' holds half a surrogate pair"),
    ],
)
def test_bad_jsonl_line_is_refused_by_number(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD_LINE + content + "\n" + GOOD_LINE)
    assert re.match(message, refusal(str(file)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_file_without_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert re.match(r"text: .* has no text; give a file with at least one document", refusal(str(tmp_path / name)))


def test_jsonl_of_blank_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    assert "has no text" in refusal(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_in_another_encoding_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "Gr\xfc\xdfe"}')
    assert re.match(r"text: .* is not UTF-8 \(.*\); convert it to UTF-8", refusal(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.csv", "folder.txt", ""])
def test_what_is_no_text_file_is_refused(tmp_path, name):
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "folder.txt").mkdir()
    assert "is not a .txt or .jsonl file; give one of these" in refusal(f"{tmp_path}/{name}")


@pytest.mark.parametrize("source", ["w", "nowhere/a.txt", "x" * 5000, "self"])
def test_unknown_source_is_refused_with_the_known_names(source):
    known = "use bundled, wiki-mini, news-mini, code-mini, wikitext2, c4, self, or a .txt or .jsonl file"
    assert refusal(source) == f"text: {source!r} is neither a file nor a known name; {known}"
    assert "c4, or a .txt" in refusal(source, "held-out")  # text the model wrote is no measure of it


def test_unknown_split_is_refused():
    assert refusal("wiki-mini", "test") == "split: 'test' is unknown; use one of calibration, held-out"
