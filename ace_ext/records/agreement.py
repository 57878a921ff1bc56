"""How far a pruned model agrees with the dense one, for models that perplexity does not measure."""

from dataclasses import asdict, dataclass

from ace_ext.records.healing import finite


@dataclass(frozen=True)
class Agreement:
    """How far the answers of two models agree. A figure that the model does not have is None."""

    samples: int
    cosine: float | None = None
    """Mean cosine of the two models' embeddings of a sample."""
    rank_correlation: float | None = None
    """Spearman's correlation of the cosines of all pairs of samples, in the two models. None: there are fewer than
    three samples, or all pairs are equally similar in one of the models."""
    labels: float | None = None
    """Share of samples, or of positions, with the same most probable label."""
    changed_words: float | None = None
    """Word error rate of the pruned model's transcripts, with the dense model's as references."""
    word_error_rate: float | None = None
    """Of the pruned model's transcripts, with the known texts as references."""
    dense_word_error_rate: float | None = None
    """Of the dense model's transcripts, with the known texts as references."""
    source: str = ""
    """Where the samples are from."""

    @property
    def figures(self) -> dict[str, float]:
        """What was measured, by the names of :data:`NAMES`; the dense model's word error rate is not among it."""
        measured = {name: getattr(self, field) for field, name in NAMES.items()}
        return {name: value for name, value in measured.items() if value is not None}

    def summary(self) -> str:
        """One line."""
        texts = [f"{name} {value:.3f}" for name, value in self.figures.items()]
        if self.word_error_rate is not None and self.dense_word_error_rate is not None:
            texts[-1] += f" ({self.dense_word_error_rate:.3f} dense)"
        return f"agreement with the dense model: {', '.join(texts)} ({self.samples} samples of {self.source})"

    def to_dict(self) -> dict[str, float | str | None]:
        """The fields as JSON values."""
        return {name: finite(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


NAMES = {
    "cosine": "cosine",
    "rank_correlation": "rank correlation",
    "labels": "same labels",
    "changed_words": "changed words",
    "word_error_rate": "word error rate",
}
"""The names of figures in tables, by field."""
LOWER_IS_BETTER = ("changed words", "word error rate")
"""Figures of which 0 is the best value; of all others it is 1."""
