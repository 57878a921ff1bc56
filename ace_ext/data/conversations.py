"""Images or sound with their texts, as a language model that sees or hears reads them: the processor puts the tokens of
the file into the text."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ace_ext.data.media_items import IMAGE, Item, read_item, text_of
from ace_ext.errors import InputError, one_line
from ace_ext.models._transformers import has_encoder, predicts_tokens, takes_argument


def converses(processor: Any, kind: str, model: nn.Module) -> bool:
    """Whether a model is a language model that reads files of this kind with a text: one that predicts its tokens, or
    (PaliGemma, where a text also attends to later tokens) whose processor has a place for the file in the text."""
    if not hasattr(processor, "tokenizer") or has_encoder(model):
        return False
    return predicts_tokens(model) or _template(processor) is not None or _token(processor, kind) is not None


def conversation(item: Item, kind: str, processor: Any, model: nn.Module) -> dict[str, Tensor]:
    """The inputs of one sample: the user shows the file, and the assistant answers with its text, in the words of the
    model's chat template. Without a template: the file's token, if the processor has one, and the text.

    Raises:
        InputError: the file or its text is missing or broken, or the processor refuses them.
    """
    text, content = text_of(item, kind), read_item(item, kind, processor)
    try:
        made = _made(content, text, kind, processor)
    except Exception as error:  # whatever a class of transformers raises
        raise InputError(
            f"input: {item.where}: {type(processor).__name__} makes no inputs of it: {type(error).__name__}: "
            f"{one_line(error, 300)}"
        ) from error
    return {name: value for name, value in made.items() if isinstance(value, Tensor) and _is_read(name, model)}


def _is_read(name: str, model: nn.Module) -> bool:
    return name != "labels" and takes_argument(model, name)


def _template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None)


def _token(processor: Any, kind: str) -> str | None:
    """What stands for the file in a text. None for a processor (BLIP-2, GIT) that adds it itself, if the model reads
    such tokens at all."""
    token = getattr(processor, f"{kind}_token", None)
    return token if isinstance(token, str) else None


def _made(content: Any, text: str, kind: str, processor: Any) -> Mapping[str, Any]:
    if _template(processor) is None:
        files = {"images" if kind == IMAGE else "audio": [content]}
        found: Mapping[str, Any] = processor(
            text=[f"{_token(processor, kind) or ''}{text}"], **files, return_tensors="pt"
        )
        return found
    messages = [
        {"role": "user", "content": [{"type": kind, kind: content}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    found = processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    return found
