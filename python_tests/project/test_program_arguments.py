"""Wrong arguments of the programs in ``tools`` and ``benchmarks``: status 2 and a line that names the argument, before
anything is written or measured."""

import subprocess
import sys

import pytest
from folders import tree
from helpers import ROOT, script
from tiny_models import make_model

LLAMA, MIXTURE, FETCH = "tools/make_synthetic_llama.py", "tools/make_mixture.py", "tools/fetch_models.py"
OPS, SOLVERS = "benchmarks/bench_ops.py", "benchmarks/bench_solvers.py"
END_TO_END, TEXTS, NETWORKS = (f"benchmarks/{name}.py" for name in ("bench_end_to_end", "engine_texts", "networks"))
COUNT, FOLDER = "must be a whole number of at least 1", "must be a folder"
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
        (END_TO_END, ("--model", "nowhere"), "model 'nowhere' is not a folder"),
        (END_TO_END, ("--model", "opt", "--repeats", "0"), f"--repeats: {COUNT} (got '0')"),
        ("benchmarks/bench_loop.py", ("--model", "opt", "--repeats", "0"), f"--repeats: {COUNT} (got '0')"),
        ("benchmarks/bench_loop.py", ("--model", "file"), f"--model: {FOLDER} (got 'file')"),
        ("benchmarks/decode_step.py", ("opt", "nowhere"), f"packed: {FOLDER} (got 'nowhere')"),
        ("benchmarks/decode_step.py", ("opt", "opt", "--tokens", "-1"), f"--tokens: {COUNT} (got '-1')"),
        ("benchmarks/decode_step.py", ("opt", "opt"), "'opt' holds no packed.safetensors files"),
        ("benchmarks/draw_overview.py", ("--folder", "file"), f"--folder: {FOLDER} (got 'file')"),
        ("benchmarks/engine_pairs.py", ("opt", "nowhere"), f"folder: {FOLDER} (got 'nowhere')"),
        ("benchmarks/engine_pairs.py", ("opt", "opt", "--engines", "llama"), "--engines: invalid choice: 'llama'"),
        (TEXTS, ("nowhere",), f"folder: {FOLDER} (got 'nowhere')"),
        (TEXTS, ("opt", "--engines", "vllm:int4"), "--engines: must be one of transformers:bfloat16"),
        (TEXTS, ("opt", "--python", "vllm"), "--python: must be ENGINE=PATH"),
        (TEXTS, ("opt", "--engines", "onnxruntime", "--python", "vllm=file"), "--python vllm: no engine of --engines"),
        ("benchmarks/equal_bytes.py", ("--model", "opt", "--output", "file"), "--output 'file' is a file"),
        ("benchmarks/equal_bytes.py", ("--model", "nowhere", "--output", "new"), "model 'nowhere' is not a folder"),
        (
            "benchmarks/equal_bytes.py",
            ("--model", "opt", "--output", "new", "--zeros", "half"),
            "method 'balanced': sparsities must be numbers from 0 to 1 (got 'half')",
        ),
        ("benchmarks/float32_products.py", ("--threads", "0"), f"--threads: {COUNT} (got '0')"),
        ("benchmarks/gguf_reader.py", ("nowhere",), "MODEL.gguf: must be a file (got 'nowhere')"),
        ("benchmarks/gguf_reader.py", ("file",), "model 'file' is not a complete GGUF file"),
        (NETWORKS, ("encoder", "nowhere"), f"model: {FOLDER} (got 'nowhere')"),
        (NETWORKS, ("vision", "opt"), "vision does not use the folder"),
        (NETWORKS, ("encoder", "opt", "--clips", "3"), "encoder does not use --clips"),
        (NETWORKS, ("vision", "--amounts", "1.5"), "method 'wanda': sparsity must be"),
        ("benchmarks/packed_text.py", ("nowhere", "opt"), f"dense: {FOLDER} (got 'nowhere')"),
        ("benchmarks/predict.py", ("--measured", "nowhere"), "--measured: must be a file (got 'nowhere')"),
        ("benchmarks/predict.py", ("--measured", "file"), "--measured 'file' is not what bench_ops.py --json writes"),
        ("benchmarks/predict.py", ("--measured", "file", "--check"), "--measured counts nothing"),
        ("benchmarks/study.py", ("record",), "record needs folders"),
        ("benchmarks/study.py", ("record", "full"), "'full/results.json': No such file or directory"),
        ("benchmarks/study.py", ("tables", "full"), "tables prints what was recorded"),
        ("tools/check_memory.py", ("--place", "nowhere"), f"--place: {FOLDER} (got 'nowhere')"),
        ("tools/drop_ptx.py", ("--ptx", "full", "--build", "full"), "no full/sm_80/moments.ptx"),
        ("tools/drop_ptx.py", ("--then", "nowhere"), f"--then: {FOLDER} (got 'nowhere')"),
        ("tools/fuzz.py", ("--seconds", "-1"), "--seconds: must be a number above 0 (got '-1')"),
        ("tools/make_bundled.py", ("file",), "'file': File exists"),
        ("tools/mutate.py", ("nothing",), "headers: must be of "),
        ("tools/mutate.py", ("--sample", "0"), f"--sample: {COUNT} (got '0')"),
        ("tools/whisper_folder.py", ("nowhere", "file", "file", "new"), "model_bin: must be a file (got 'nowhere')"),
        ("tools/whisper_folder.py", ("file", "file", "file", "full"), "folder 'full' exists and is not empty"),
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


def test_output_that_its_reader_closed():
    writes = [sys.executable, ROOT / "benchmarks/study.py", "tables"]
    with subprocess.Popen(writes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        program.stdout.close()
        error = program.stderr.read()
    assert program.returncode == 2
    assert error.splitlines()[-1] == "study.py: error: the reader of the output closed it early"
    assert "Traceback" not in error
