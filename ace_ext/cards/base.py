"""What a model card takes from the card of the model that was pruned: its licence and its language."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata keys whose values also hold for the pruned model."""

_MOST_BYTES, _MOST_WORDS, _LONGEST = 2**20, 100, 300


@dataclass(frozen=True)
class BaseCard:
    """The part of a card's metadata that the card of a pruned model repeats."""

    kept: dict[str, Any] = field(default_factory=dict)
    """The keys of :data:`KEPT` that it has, each a text or a list of texts."""
    base_model: str | None = None
    """The hub's name of the model from which the card's own model was made."""


def read_base(path: Path) -> BaseCard:
    """The metadata of a card. Empty for a missing, unreadable or damaged card: a hand-written card must not end a
    run."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return BaseCard()
        text = path.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("---"):
            return BaseCard()
        found = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except Exception:  # whatever the YAML library raises
        return BaseCard()
    base_model = found.get("base_model")
    return BaseCard(
        {key: found[key] for key in KEPT if _is_text(found.get(key)) or _is_list(found.get(key))},
        base_model if _is_text(base_model) else None,
    )


def _is_text(value: object) -> bool:
    """Whether a value is a short text in one line."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and not re.search(r"[\x00-\x1f\x7f]", value)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_WORDS and all(map(_is_text, value))
