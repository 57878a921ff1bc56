"""A GGUF file in llama.cpp, by the wheel xllamacpp. Runs in a process of its own (``_serve.py``), without torch.

xllamacpp has llama.cpp's server, not its function ``llama_decode``. The server takes token ids, decodes the prompts of
a request as a batch, and reports the seconds of the prompt and of the decoding steps, without those of the request.
"""

from __future__ import annotations

import secrets
from typing import Any

PADDING = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""


class Engine:
    """A model and its measurements; see ``worker.py`` for the requests."""

    _server: Any = None
    _slots: tuple[int, int] | None = None

    def start(self, path: str, threads: int, allowed: bool) -> str:
        """Loads the library; returns its version and the instruction sets that it uses."""
        import xllamacpp

        self._path, self._threads = path, threads
        sets = [part.partition("=") for part in xllamacpp.get_system_info().replace(":", "|").split("|")]
        used = [name.strip() for name, _, value in sets if value.strip() == "1"]
        return f"llama.cpp of xllamacpp {xllamacpp.__version__}, {' '.join(used)}"

    def load(self, path: str, context: int) -> None:
        """Loads a file for one sequence of ``context`` tokens and decodes a token."""
        self._serve(1, context)
        self._complete([[0]], 1)

    def decode(self, prompts: list[list[int]], tokens: list[list[int]]) -> float:
        """Seconds of decoding as many tokens as ``tokens [batch, new]`` has. llama.cpp chooses them itself, the most
        likely one at each step."""
        steps = len(tokens[0])
        self._serve(len(prompts), len(prompts[0]) + steps + 1)
        timings = self._complete(prompts, steps + 1)["timings"]
        if timings["predicted_n"] != steps + 1:
            raise RuntimeError(f"llama.cpp decoded {timings['predicted_n']} tokens, not {steps + 1}")
        return float(timings["predicted_ms"]) / 1000  # of all but the first token, which the prompt's logits give

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of reading a prompt."""
        self._serve(1, len(prompt) + 1)
        timings = self._complete([prompt], 1)["timings"]
        if timings["prompt_n"] != len(prompt):
            raise RuntimeError(f"llama.cpp read {timings['prompt_n']} tokens, not {len(prompt)}")
        return float(timings["prompt_ms"]) / 1000

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy tokens after a prompt, of a file that ``gguf_writer.py`` wrote: their texts are their ids."""
        self._serve(1, len(prompt) + tokens)
        return [int(text) for text in self._complete([prompt], tokens)["choices"][0]["text"].split()]

    def _serve(self, sequences: int, context: int) -> None:
        """Starts a server for this many sequences at once, unless the present one fits. One of 16 sequences would need
        16 times the cache for a long prompt."""
        context = -(-context // PADDING) * PADDING
        if self._slots is not None and self._slots[0] == sequences and self._slots[1] >= context:
            return
        import xllamacpp

        self._server = None  # frees the old one's memory first
        settings = xllamacpp.CommonParams()
        settings.model.path = self._path
        settings.n_parallel = sequences
        settings.n_ctx = sequences * context
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = self._threads
        settings.n_gpu_layers = 0
        settings.cache_ram_mib = 0  # no copies of earlier prompts
        settings.verbosity = 1  # errors alone
        settings.api_keys = [secrets.token_hex()]  # it listens on a port of this machine too
        self._server = xllamacpp.Server(settings)
        self._slots = sequences, context

    def _complete(self, prompts: list[list[int]], tokens: int) -> Any:
        greedy = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        found = self._server.handle_completions({"prompt": prompts, "max_tokens": tokens, **greedy})
        if "choices" not in found:
            raise RuntimeError(str(found.get("error", found)))
        return found
