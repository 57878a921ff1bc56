"""Measures of agreement, against values computed by hand and models of one answer."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ace_ext.data.agreement import (
    Answers,
    agreement,
    answers,
    edit_distance,
    mean_cosine,
    rank_correlation,
    spearman,
    word_error_rate,
    words,
)
from ace_ext.errors import InputError

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_mean_cosine():
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    pruned = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert mean_cosine(dense, pruned) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 5.0], [10.0, 11.0, 99.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], math.sqrt(3) / 2),  # ranks 1.5, 1.5, 3
    ],
)
def test_spearman(first, second, expected):
    assert spearman(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected)


def test_rank_correlation_is_of_the_pairs():
    """Three directions whose pairs have angles of 10, 40 and 30 degrees, and then of 10, 25 and 15."""
    dense, pruned = (
        torch.stack([angles.cos(), angles.sin()], 1)
        for angles in (torch.tensor([0.0, 10.0, 40.0]).deg2rad(), torch.tensor([0.0, 10.0, 25.0]).deg2rad())
    )
    assert rank_correlation(dense, pruned) == pytest.approx(1)
    turned = torch.tensor([0.0, 35.0, 40.0]).deg2rad()  # angles 35, 40, 5: ranks 2, 1, 3 instead of 3, 1, 2
    assert rank_correlation(dense, torch.stack([turned.cos(), turned.sin()], 1)) == pytest.approx(0.5)


def test_equal_embeddings_have_no_rank_correlation():
    assert spearman(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) is None
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])))
    scattered = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]])
    parallel = torch.tensor([[0.1], [0.3], [0.7]]) * torch.tensor([0.3, 0.7])  # cosines of 1, but for rounding
    assert agreement(Answers((scattered,), None), Answers((parallel,), None)).rank_correlation is None
    found = agreement(Answers((scattered, scattered), None), Answers((scattered, parallel), None))
    assert found.rank_correlation == pytest.approx(1)  # of the embeddings that have one


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(first, second, expected):
    assert edit_distance(first, second) == edit_distance(second, first) == expected


def test_word_error_rate_ignores_case_and_punctuation():
    assert words("It’s “A” well-known fact: 3 of 4.") == ["it's", "a", "well", "known", "fact", "3", "of", "4"]
    assert word_error_rate(["The cat sat.", "It's here"], ["the CAT sat on", "its here"]) == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("references", "transcripts", "message"),
    [(["a"], [], "one for each of 1 references"), (["..."], ["a"], "have no word")],
)
def test_references_that_cannot_be_compared(references, transcripts, message):
    with pytest.raises(InputError, match=message):
        word_error_rate(references, transcripts)


def bert(kind):
    torch.manual_seed(0)
    return kind(BertConfig(**TINY, vocab_size=40)).train()


def test_an_encoder_is_compared_without_padding():
    model = bert(BertModel)
    short = torch.randint(40, (3, 4))
    padded = {"input_ids": functional_pad(short), "attention_mask": functional_pad(torch.ones_like(short))}
    whole = {"input_ids": short, "attention_mask": torch.ones_like(short)}
    first, second = answers(model, [padded]), answers(model, [whole])
    assert model.training  # as it was
    assert torch.allclose(first.embeddings[0], second.embeddings[0], atol=1e-6)
    found = agreement(first, second)
    assert (found.samples, found.labels) == (3, None)
    assert found.cosine == pytest.approx(1)
    assert found.rank_correlation == 1


def functional_pad(tokens):
    return nn.functional.pad(tokens, (0, 3))


def test_a_classifier_is_compared_by_labels():
    model = bert(BertForSequenceClassification)
    dense = answers(model, [{"input_ids": torch.randint(40, (4, 5))}, {"input_ids": torch.randint(40, (2, 3))}])
    assert dense.labels.shape == (6,)
    other = Answers(dense.embeddings, torch.where(torch.arange(6) < 4, dense.labels, 1 - dense.labels))
    assert agreement(dense, other).labels == pytest.approx(4 / 6)
    assert agreement(dense, dense).to_dict()["labels"] == 1


def test_a_model_that_labels_each_position_is_compared_without_padding():
    model = bert(BertForMaskedLM)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = answers(model, [{"input_ids": torch.randint(40, (2, 4)), "attention_mask": mask}])
    assert found.labels.shape == (5,)
    assert found.embeddings[0].shape == (2, 40)


def test_an_encoder_with_a_decoder_has_the_embeddings_of_its_encoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    batch = {"input_ids": torch.randint(40, (3, 4)), "decoder_input_ids": torch.randint(40, (3, 6))}
    found = answers(model, [batch])
    assert found.embeddings[0].shape == (3, 16)
    assert found.labels.shape == (18,)


def test_two_towers_have_two_embeddings():
    torch.manual_seed(0)
    text, vision = {**TINY, "vocab_size": 40, "eos_token_id": 39}, {**TINY, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    batch = {"input_ids": torch.randint(40, (4, 5)), "pixel_values": torch.randn(4, 3, 8, 8)}
    found = answers(model, [batch])
    assert [list(e.shape) for e in found.embeddings] == [[4, 6], [4, 6]]
    blind = Answers((found.embeddings[0], -found.embeddings[1]), None)
    assert agreement(found, blind).cosine == pytest.approx(0, abs=1e-6)  # the mean of 1 and -1


class Captions(nn.Module):
    """As BLIP's: what is named as an embedding has a vector for each patch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, states, attention_mask=None):
        return {"logits": states[:, :1], "image_embeds": states, "last_hidden_state": states}


def test_vectors_of_patches_are_averaged():
    states = torch.arange(12.0).view(2, 3, 2)
    (embedding,) = answers(Captions(), [{"states": states}]).embeddings
    assert torch.equal(embedding, states.mean(1))


def test_the_mean_of_positions_is_in_float32_and_without_padding():
    states, mask = torch.full((1, 512, 2), 200.0, dtype=torch.float16), torch.ones(1, 512)
    states[0, 400:], mask[0, 400:] = torch.nan, 0
    (embedding,) = answers(Captions(), [{"states": states, "attention_mask": mask}]).embeddings
    assert torch.equal(embedding, torch.full((1, 2), 200.0))


def test_answers_that_cannot_be_compared():
    with pytest.raises(InputError, match="none found"):
        answers(bert(BertModel), [])
    nameless = bert(BertModel)
    nameless.config.return_dict = False
    with pytest.raises(InputError, match="gives a tuple; set return_dict=True in its configuration"):
        answers(nameless, [{"input_ids": torch.randint(40, (3, 4))}])
    with pytest.raises(InputError, match="must have answers of the shapes"):
        agreement(Answers((torch.ones(3, 2),), None), Answers((torch.ones(4, 2),), None))
