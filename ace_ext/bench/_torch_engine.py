"""Dense and packed folders in torch. Runs in a process of its own (``_serve.py``)."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
import transformers

from ace_ext.models._transformers import cache_arguments
from ace_ext.models.location import remote_code
from ace_ext.models.skeleton import skeleton
from ace_ext.runtime.loading import open_model


class Engine:
    """A model and its measurements; see ``worker.py`` for the requests."""

    _model: Any
    _last: dict[str, int]
    """The argument that makes the model compute the logits of the last token alone, as ``generate`` does."""

    def start(self, path: str, threads: int, allowed: bool) -> str:
        """Loads the libraries, those of the model's class included; returns a description of the engine."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._allowed = allowed
        with remote_code(allowed):
            skeleton(path, None)
        capability = torch.backends.cpu.get_cpu_capability()
        return f"torch {torch.__version__}, transformers {transformers.__version__}, {capability}"

    def load(self, path: str, context: int) -> None:
        """Loads a folder and reads a token. The cache grows as needed: ``context`` is not used."""
        with remote_code(self._allowed):
            self._model = open_model(path).model
        parameters = inspect.signature(self._model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.prefill([0])

    def decode(self, prompts: list[list[int]], tokens: list[list[int]]) -> float:
        """Seconds of reading ``tokens [batch, new]`` one by one after the prompts."""
        ids, new = torch.tensor(prompts), torch.tensor(tokens)
        output = self._model(ids, use_cache=True, **self._last)
        start = time.perf_counter()
        for at in range(new.shape[1]):
            output = self._model(new[:, at : at + 1], use_cache=True, **cache_arguments(output))
            output.logits[:, -1].argmax(-1).tolist()  # other engines choose a token too
        return time.perf_counter() - start

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of reading a prompt."""
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        self._model(ids, use_cache=True, **self._last).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - start
