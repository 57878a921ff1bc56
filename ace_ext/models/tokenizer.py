"""The interface of a tokenizer that ace_ext uses. Any object with these members can be one."""

import os
from collections.abc import Mapping
from typing import Protocol


class Tokenizer(Protocol):
    """A tokenizer of transformers, or one of the caller's own."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None without one."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None without one."""

    def __len__(self) -> int:
        """The size of the vocabulary, added tokens included."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, list[int]]:
        """The ids of a text, under ``"input_ids"``. ``add_special_tokens``: with the tokens that begin and end a text,
        if the tokenizer adds them. ``verbose=False``: no warning for a text longer than the model's context."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object:
        """Writes the tokenizer's files into a folder."""
