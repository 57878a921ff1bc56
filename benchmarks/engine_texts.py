"""Greedy text of a model folder in several engines, beside that of transformers in float32.

    python benchmarks/engine_texts.py FOLDER [--engines transformers:bfloat16 llama.cpp:q8_0 onnxruntime]
    python benchmarks/engine_texts.py FOLDER --engines vllm --python vllm=VENV/bin/python

Each engine runs in a process of its own, in which ``import ace_ext`` fails. ``--python ENGINE=PATH`` names the
environment of an engine. llama.cpp reads files of ``ace_ext.bench.gguf_writer``, so it needs xllamacpp in this
environment; onnxruntime needs onnx, onnxscript and onnxruntime, and runs what ``torch.onnx.export`` writes.

For each engine the table has the number of prompts whose text is that of transformers in float32; the share of tokens
before the first that differs; and how much less likely a chosen token is than the likeliest one, by the logits of
transformers in float32 for that engine's text: median and maximum over the tokens, in nats. Rounding differs, so texts
part where two tokens are about equally likely.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, existing_file, existing_folder, one_line_errors

PROMPTS = (
    "The capital of France is",
    "Once upon a time, a small dog",
    "Water boils at",
    "def add(a, b):",
    "The three primary colours are",
    "In 1969, the first man",
    "To make bread you need",
    "My favourite season is",
)
ENGINES = (
    "transformers:bfloat16",
    "llama.cpp:bf16",
    "llama.cpp:q8_0",
    "llama.cpp:q4_0",
    "onnxruntime",
    "vllm:float32",
    "vllm:bfloat16",
)
KNOWN = (*ENGINES, "transformers:float16", "transformers:float32", "vllm:float16")


def transformers_tokens(folder: str, prompts: list[list[int]], count: int, kind: str) -> list[list[int]]:
    """Greedy tokens by ``generate``, ``[prompts][count]``."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).eval()
    return greedy(model, prompts, count)


def greedy(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The likeliest tokens, also after the end of a text."""
    import torch

    endless = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **endless)[0, len(ids) :].tolist() for ids in prompts]


def onnx_tokens(folder: str, prompts: list[list[int]], count: int, _: str) -> list[list[int]]:
    """Greedy tokens of an export in float32 without a cache: each step computes all tokens again."""
    import onnxruntime
    import torch
    from torch import Tensor, nn
    from transformers import AutoModelForCausalLM

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits

    with tempfile.TemporaryDirectory() as place:
        file = f"{place}/model.onnx"
        length = torch.export.Dim("length", min=2, max=512)
        sample = torch.tensor([prompts[0]])
        torch.onnx.export(Logits().eval(), (sample,), file, dynamo=True, dynamic_shapes=({1: length},))
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (own.name for own in session.get_inputs())
    found = []
    for ids in prompts:
        text = torch.tensor([ids])
        for _ in range(count):
            logits = torch.from_numpy(session.run(None, {name: text.numpy()})[0])
            text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        found.append(text[0, len(ids) :].tolist())
    return found


def vllm_tokens(folder: str, prompts: list[list[int]], count: int, kind: str) -> list[list[int]]:
    """Greedy tokens of vLLM's own class of the model."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=folder, dtype=kind, max_model_len=512, max_num_seqs=len(prompts), enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def llama_tokens(folder: str, prompts: list[list[int]], count: int, kind: str) -> list[list[int]]:
    """Greedy tokens of llama.cpp from a GGUF file that is written first. In the caller's process and its own."""
    from ace_ext.bench.candidates import LLAMA, Candidate
    from ace_ext.bench.gguf_writer import write_gguf
    from ace_ext.bench.worker import Worker

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        write_gguf(folder, file, kind)
        with Worker(Candidate(LLAMA, file, LLAMA), 1) as worker:
            worker.load(512)
            return [worker.generate(ids, count) for ids in prompts]


APART = {"transformers": transformers_tokens, "onnxruntime": onnx_tokens, "vllm": vllm_tokens}


class Reference:
    """transformers in float32.

    Args:
        folder: of the model.
        prompts: token ids.
    """

    def __init__(self, folder: str, prompts: list[list[int]]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._prompts = prompts

    def tokens(self, count: int) -> list[list[int]]:
        """Greedy tokens, ``[prompts][count]``."""
        return greedy(self._model, self._prompts, count)

    def below(self, found: list[list[int]]) -> list[float]:
        """For each token how far its logit is below the largest."""
        import torch

        gaps: list[float] = []
        for prompt, ids in zip(self._prompts, found, strict=True):
            with torch.inference_mode():
                logits = self._model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            gaps += (logits.amax(-1) - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]).tolist()
        return gaps


def tokens_of(
    engine: str, folder: str, prompts: list[list[int]], count: int, pythons: dict[str, str]
) -> list[list[int]]:
    """The tokens of an engine, from a process of its own."""
    name, _, kind = engine.partition(":")
    if name not in APART:
        return llama_tokens(folder, prompts, count, kind)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        request = json.dumps([engine, folder, prompts, count, answer.name])
        command = [pythons.get(name, sys.executable), __file__, "--child", request]
        subprocess.run(command, check=True, stdout=sys.stderr)  # vLLM's log
        found: list[list[int]] = json.load(answer)
    return found


def child(request: str) -> None:
    """Computes the tokens of an engine without ace_ext."""
    sys.modules["ace_ext"] = None  # type: ignore[assignment]  # an import of it fails
    engine, folder, prompts, count, answer = json.loads(request)
    name, _, kind = engine.partition(":")
    Path(answer).write_text(json.dumps(APART[name](folder, prompts, count, kind)))


def alike(found: list[int], expected: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    different = (place for place, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    return next(different, len(expected))


def engine_of(text: str) -> str:
    """An engine and its kind of weights, if they can be run."""
    if text not in KNOWN:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(KNOWN)} (got {text!r})")
    return text


def python_of(text: str) -> tuple[str, str]:
    """An engine of another environment, and the interpreter of that."""
    name, _, path = text.partition("=")
    if name not in APART or not path:
        raise argparse.ArgumentTypeError(f"must be ENGINE=PATH, with an engine of {', '.join(APART)} (got {text!r})")
    existing_file(path)
    return name, path


def main(argv: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=existing_folder)
    parser.add_argument("--engines", nargs="+", type=engine_of, default=ENGINES)
    parser.add_argument("--python", action="append", type=python_of, default=[], metavar="ENGINE=PATH")
    parser.add_argument("--tokens", type=count, default=24)
    args = parser.parse_args(argv)
    unused = [name for name, _ in args.python if name not in {engine.partition(":")[0] for engine in args.engines}]
    if unused:
        parser.error(f"--python {unused[0]}: no engine of --engines runs in it; leave it out")
    with one_line_errors(parser):
        print_table(args)


def print_table(args: argparse.Namespace) -> None:
    """Runs the engines one after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    pythons, folder = dict(args.python), str(args.folder)
    reference = Reference(folder, prompts)
    expected = reference.tokens(args.tokens)
    for text, ids in zip(PROMPTS, expected, strict=True):
        print(repr(text + tokenizer.decode(ids)))
    print(f"\n| engine | equal texts of {len(PROMPTS)} | tokens before the first that differs | nats below | at most |")
    print("|---|--:|--:|--:|--:|")
    for engine in args.engines:
        found = tokens_of(engine, folder, prompts, args.tokens, pythons)
        same = [alike(one, other) for one, other in zip(found, expected, strict=True)]
        below, equal = reference.below(found), sum(one == args.tokens for one in same)
        share = sum(same) / (args.tokens * len(same))
        print(f"| {engine} | {equal} | {share:.0%} | {statistics.median(below):.3f} | {max(below):.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()
