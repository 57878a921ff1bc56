"""Wrong arguments of the programs in ``tools`` and ``benchmarks``: status 2 and a line that names the argument, before
anything is written or measured."""

import pytest
from folders import tree
from helpers import script
from tiny_models import make_model

LLAMA, MIXTURE, FETCH = "tools/make_synthetic_llama.py", "tools/make_mixture.py", "tools/fetch_models.py"
OPS, SOLVERS = "benchmarks/bench_ops.py", "benchmarks/bench_solvers.py"
SMALL = ("--hidden", "128", "--intermediate", "8")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (LLAMA, ("new", "--layers", "-3"), "--layers must be a multiple of 1 above 0 (got -3)"),
        (LLAMA, ("new", "--hidden", "200"), "--hidden must be a multiple of 128 above 0 (got 200)"),
        (LLAMA, ("new", "--intermediate", "0"), "--intermediate must be a multiple of 1 above 0 (got 0)"),
        (LLAMA, ("file", "--layers", "1", *SMALL), "folder 'file' cannot be written: File exists"),
        (LLAMA, ("file/new", "--layers", "1", *SMALL), "folder 'file/new' cannot be written: Not a directory"),
        (LLAMA, ("full", "--layers", "1", *SMALL), "folder 'full' holds files"),
        (MIXTURE, ("nowhere", "new"), "model 'nowhere' is not a folder"),
        (MIXTURE, ("opt", "new"), "model 'opt' must be a Llama (got opt)"),
        (MIXTURE, ("opt", "new", "--experts", "1"), "--experts must be at least 2"),
        (MIXTURE, ("opt", "file"), "folder 'file' exists; give another name"),
        (FETCH, ("file",), "folder 'file' cannot be written: File exists"),
        (OPS, ("--shapes", "3x"), "--shapes: must be ROWSxCOLS, separated by commas (got '3x')"),
        (OPS, ("--json", "nowhere/x.json"), "--json: cannot be written (got 'nowhere/x.json')"),
        (SOLVERS, ("--shapes", "8x8,0x8"), "--shapes: must be ROWSxCOLS, separated by commas (got '8x8,0x8')"),
        ("benchmarks/equal_bytes.py", ("--table", "full"), "--table 'full' has no rows.jsonl"),
        ("benchmarks/equal_bytes.py", ("--table", "full", "--then", "train"), "--table prints what was measured"),
        ("benchmarks/packed_products.py", ("--zeros", "3"), "--zeros: must be a share of at least 0"),
        ("benchmarks/packed_products.py", ("--zeros", "4:2"), "--zeros: must be a share of at least 0"),
        ("benchmarks/packed_products.py", ("--tokens", "0"), "--threads and --tokens must be at least 1"),
        ("benchmarks/structures.py", ("neurons=2", "--model", "opt"), "remove: neurons must be a share"),
        (SOLVERS, ("--json", "full"), "--json: cannot be written (got 'full')"),
    ],
)
def test_wrong_arguments(program, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").touch()
    if "opt" in arguments:
        make_model("opt").save_pretrained("opt")
    before, main = tree(tmp_path), script(program).main
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.replace("argument ", "")
    assert tree(tmp_path) == before


def test_right_arguments_write_a_model(tmp_path, capsys):
    script(LLAMA).main([str(tmp_path / "new"), "--layers", "1", *SMALL])
    assert capsys.readouterr().out.endswith("GB in 2 shards\n")
    script(MIXTURE).main([str(tmp_path / "new"), str(tmp_path / "mixture"), "--experts", "2"])
    assert (tmp_path / "mixture/model.safetensors").is_file()
