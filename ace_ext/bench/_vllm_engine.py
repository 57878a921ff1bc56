"""Dense folders in vLLM. Runs in a process of its own (``_serve.py``), without ace_ext."""

from __future__ import annotations

import os
import time
from typing import Any

PAUSE = 1.5
"""Seconds after which the worker of an idle engine does not poll any more, and leaves the CPU to others."""
LONGEST = 4096
"""Tokens of a sequence at most: vLLM reserves memory for them."""
SEQUENCES = 16
CACHE = "1"
"""GiB of the cache of keys and values."""


class Engine:
    """A model and its measurements; see ``worker.py`` for the requests. Figures include the time of the scheduler."""

    _llm: Any

    def start(self, path: str, threads: int, allowed: bool) -> str:
        """Loads the library, whose threads get a processor each; returns its version."""
        processors = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, processors)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE)
        import vllm

        self._allowed = allowed
        return f"vLLM {vllm.__version__}, eager"

    def load(self, path: str, context: int) -> None:
        """Loads a folder and reads a token. Without torch.compile, which takes minutes."""
        from transformers import AutoConfig
        from vllm import LLM

        config = AutoConfig.from_pretrained(path, trust_remote_code=self._allowed)
        self._llm = LLM(
            model=path,
            max_model_len=min(LONGEST, getattr(config, "max_position_embeddings", LONGEST)),
            max_num_seqs=SEQUENCES,
            enforce_eager=True,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            trust_remote_code=self._allowed,
        )
        self.prefill([0])

    def decode(self, prompts: list[list[int]], tokens: list[list[int]]) -> float:
        """Seconds of decoding as many tokens as ``tokens [batch, new]`` has, the most likely one at each step: a run
        with them, less one with the first token alone."""
        first = self._seconds(prompts, 1)
        return self._idle(self._seconds(prompts, len(tokens[0]) + 1) - first)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of reading a prompt."""
        return self._idle(self._seconds([prompt], 1))

    def _seconds(self, prompts: list[list[int]], tokens: int) -> float:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        found = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(one.outputs[0].token_ids) != tokens for one in found):
            raise RuntimeError(f"vLLM did not decode {tokens} tokens")
        return seconds

    def _idle(self, seconds: float) -> float:
        time.sleep(PAUSE)
        return seconds
