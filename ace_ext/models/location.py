"""The location of a model (a folder, a ``.gguf`` file or a hub name), and its configuration and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_ext.errors import InputError, one_line
from ace_ext.models._transformers import quiet_stderr
from ace_ext.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_REMOTE_CODE: ContextVar[bool] = ContextVar("remote_code", default=False)


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """If ``allowed``, Python code in a model's files may run within this context, in this thread. Outside it never
    runs. Code that loads a model asks :func:`remote_code_allowed`, so callers need not pass the answer on."""
    token = _REMOTE_CODE.set(allowed)
    try:
        yield
    finally:
        _REMOTE_CODE.reset(token)


def remote_code_allowed() -> bool:
    """The value of ``trust_remote_code`` for each call of transformers. It is never None: transformers would then ask
    on the terminal, and accept a ``y`` from a pipe."""
    return _REMOTE_CODE.get()


@dataclass(frozen=True)
class ModelLocation:
    """The arguments of ``from_pretrained``: a folder or a hub name, and for a GGUF file its name in the folder."""

    name: str
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained`` after the name."""
        file = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {**file, "trust_remote_code": remote_code_allowed()}

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises what transformers raises; see :func:`as_input_error`."""
        from transformers import AutoConfig

        with quiet_stderr():
            config = AutoConfig.from_pretrained(self.name, **self.options)
        _check_counts(config)
        if getattr(config, "return_dict", True) is False:
            raise ValueError("return_dict must be true in config.json, or left out: without names outputs are not read")
        return config

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. It is tried on a word, because its settings are checked only when they are first used.
        Raises what transformers raises; see :func:`as_input_error`."""
        from transformers import AutoTokenizer

        with quiet_stderr():
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(self.name, **self.options)
            tokenizer("word")
            return tokenizer


def locate(source: str) -> ModelLocation:
    """The location that a user names.

    Raises:
        InputError: it is not a folder with a configuration, a whole ``.gguf`` file or a hub name like ``org/model``.
            The hub is not asked whether it has that name.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {source!r} is not a file; check the path")
        from ace_ext.models.gguf_header import check_gguf  # imported here: most models are folders

        check_gguf(path)
        return ModelLocation(str(path.parent), path.name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise InputError(
                f"model folder {source!r} holds an adapter of PEFT; merge it into its base model first "
                "(AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained)"
            )
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {source!r} has no config.json; give a folder that save_pretrained wrote")
        return ModelLocation(str(path))
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.parent.is_dir():
        raise InputError(f"model {source!r} is not a folder, a .gguf file or a hub name like org/model; check the path")
    return ModelLocation(source)


def hub_name(source: str) -> str | None:
    """The hub's name of a model that :func:`locate` finds: the name that the user gave, or the one in the path of a
    hub's cache. None for any other folder or file."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    kept = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", path.parent.parent.name)
    return f"{kept[1]}/{kept[2]}" if kept and path.parent.name == "snapshots" else None


_MOST = {"num_hidden_layers": 10_000, "num_experts": 100_000, "num_local_experts": 100_000, "n_routed_experts": 100_000}
"""Limits above those of any model. A module is made for each layer: with a number from a damaged file this would not
end."""


def _check_counts(config: PreTrainedConfig) -> None:
    """Raises ValueError for a configuration that asks for more modules than any model has."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, most in _MOST.items():
            count = getattr(part, name, None)
            if isinstance(count, int) and count > most:
                raise ValueError(f"{name} must be at most {most} (got {str(count)[:40]})")


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turns what transformers raises for files that it cannot load into ``InputError("<what>: <reason>")``.

    The error can be of any kind. Wrong types in a configuration fail wherever a value is first used. A tokenizer can
    fail with an error of a Rust library, and that error is not an ``Exception``.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interruption
        if "trust_remote_code" in str(error) and not remote_code_allowed():
            raise InputError(
                f"{what}: it needs Python code that comes with it, which does not run unless you ask for it; read that "
                "code, then pass --trust-remote-code"
            ) from error
        known = isinstance(error, (OSError, ValueError, ImportError))  # these say what is wrong
        kind = "" if known else f"{type(error).__name__}: "
        raise InputError(f"{what}: {kind}{one_line(error)}; check its files, or fetch them again") from error
