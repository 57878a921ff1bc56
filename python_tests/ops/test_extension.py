import subprocess
import sys
import tempfile

import pytest
import torch

import ace_ext
from ace_ext.ops import _extension


def test_build_info():
    info = ace_ext.build_info()
    assert info["version"] == ace_ext.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(info) == {"version", "torch", "cuda", "compiler", "cplusplus"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("libc10_cuda.so: cannot open shared object file", "was built for a torch with CUDA, but torch .* has none"),
        ("_C.so: undefined symbol: _ZN3c10", "was built for another torch than"),
        ("cannot import name '_C' from 'ace_ext'", "the compiled part of ace_ext is not here"),
    ],
)
def test_import_errors_say_what_to_do(text, words):
    message = _extension._explain(ImportError(text))
    assert text in message
    with pytest.raises(ImportError, match=words + ".*pip install --no-build-isolation"):
        raise ImportError(message)


def test_another_minor_release_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.13.1+cpu")
    with pytest.raises(ImportError, match=r"was built for torch .*, but this is torch 1\.13\.1\+cpu; rebuild it"):
        _extension.compiled.__wrapped__()  # not the module that is loaded already


def test_a_patch_release_is_fine():
    assert _extension._same_release("2.13.0+cpu", "2.13.1+cu130")
    assert not _extension._same_release("2.13.0", "2.1.0")


def in_a_new_process(code):
    """What the code prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_ops_registers_them():
    code = "import torch, ace_ext.ops; print(torch.ops.ace_ext.score(torch.tensor([[-2.0]]), 'magnitude').item())"
    assert in_a_new_process(code) == "2.0"


def test_without_the_compiled_part_the_first_call_says_what_to_do():
    code = """
import sys
sys.modules["ace_ext._C"] = None  # as if it were not there
import torch
from ace_ext import ops
for call in (lambda: ops.score(torch.ones(1, 1), "magnitude"), lambda: ops.packed_linear(*[torch.ones(1, 1)] * 3)):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    first, second = in_a_new_process(code).splitlines()
    assert first == second
    assert "the compiled part of ace_ext is not here; rebuild it in this environment: pip install" in first


def test_importing_ace_ext_loads_no_torch():
    assert in_a_new_process("import sys, ace_ext; print('torch' in sys.modules)") == "False"
