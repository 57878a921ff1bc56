"""From text to token windows: drawn from documents, or written by the model."""

import dataclasses
import hashlib
import logging
import re
import struct

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ace_ext.data import generate
from ace_ext.data.generate import self_generated, writing_note
from ace_ext.data.windows import evaluation_tokens, load_windows, token_windows
from ace_ext.errors import InputError
from ace_ext.fingerprint import tokens_sha256

BOS, EOS = 256, 257


def byte_tokenizer(**special):
    """Return a tokenizer with one token a byte, so that any token count is a byte count."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": BOS, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model():
    """A tiny random Llama with weights so wide that the next token depends on the row, and dropout in its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_dropout=0.5,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def refusal(function, *args, **kwargs):
    """Return the one-line message with which the arguments are refused."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- windows of documents ---------------------------------------------------------------------------------------------

DOCUMENTS = ["The quick brown fox", "jumps over", "the lazy dog. " * 10]


def test_windows_are_slices_of_the_joined_text(tokenizer):
    windows = token_windows(DOCUMENTS, tokenizer, 200, 24, seed=0)
    assert windows.shape == (200, 24)
    assert windows.dtype == torch.int64
    text = "\n\n".join(DOCUMENTS)
    found = {tokenizer.decode(window) for window in windows}
    assert all(window in text for window in found)
    assert any("fox\n\njumps" in window for window in found)
    assert text[:24] in found  # the first start is drawn too


def test_windows_start_where_the_published_ones_did(tokenizer):
    ids = tokenizer("\n\n".join(DOCUMENTS), return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(7)
    starts = torch.randint(0, len(ids) - 24 - 1, (5,), generator=generator)
    expected = torch.stack([ids[i : i + 24] for i in starts])
    assert torch.equal(token_windows(DOCUMENTS, tokenizer, 5, 24, seed=7), expected)


def test_windows_depend_on_the_seed_alone(tokenizer):
    before = torch.random.get_rng_state()
    first = token_windows(DOCUMENTS, tokenizer, 8, 24, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, token_windows(DOCUMENTS, tokenizer, 8, 24, seed=1))
    assert not torch.equal(first, token_windows(DOCUMENTS, tokenizer, 8, 24, seed=2))


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_text_of_barely_one_window_works(tokenizer, spare):
    text = "abcdefghij" + "k" * spare
    windows = token_windows([text], tokenizer, 3, 10, seed=0)
    assert [tokenizer.decode(window) for window in windows] == ["abcdefghij"] * 3


def test_long_text_brings_no_warning_of_the_tokenizer():
    tokenizer = byte_tokenizer()  # a new one: a tokenizer warns only once
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # the command line, if a test before ran it, turned warnings off
    logger.addHandler(handler)
    try:
        token_windows(DOCUMENTS, tokenizer, 1, 24, seed=0)
        assert records == []
        tokenizer("longer than the sixteen tokens it allows")  # the warning that was spared
        assert len(records) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        (["abc"], {"nsamples": 0}, "nsamples: 0 found; use a whole number of at least 1"),
        (["abc"], {"nsamples": 2.0}, "nsamples: 2.0 found; use a whole number of at least 1"),
        (["abc"], {"nsamples": True}, "nsamples: True found; use a whole number of at least 1"),
        (
            ["abc"],
            {"seqlen": 1},
            "seqlen: 1 found; use a whole number of at least 2; "
            "a window of one token attends to nothing but itself and predicts nothing",
        ),
        (["abc"], {"seed": -1}, "seed: -1 found; use a whole number of at least 0"),
        (["abc"], {"seed": "0"}, "seed: '0' found; use a whole number of at least 0"),
        (["abc"], {"seed": 2**63}, f"seed: {2**63} found; use a whole number from 0 to 2**63 - 1"),
        (
            ["abc", "defg"],
            {"seqlen": 10},
            "seqlen: 10 found, but the whole text has 9 tokens; use 9 or less, or give more text",
        ),
        (["a"], {"seqlen": 10}, "seqlen: 10 found, but the whole text has 1 tokens; give more text"),
        ([], {}, "documents: the tokenizer found no token in the text; give a text that is not empty"),
        ([""], {}, "documents: the tokenizer found no token in the text; give a text that is not empty"),
        ("abc", {}, "documents: found one string; pass a list of strings, one per document"),
    ],
)
def test_bad_request_is_refused(tokenizer, documents, arguments, message):
    arguments = {"nsamples": 1, "seqlen": 2, "seed": 0} | arguments
    assert refusal(token_windows, documents, tokenizer, **arguments) == message


# --- text that the model writes ---------------------------------------------------------------------------------------


def test_model_writes_rows_from_its_first_token(model, tokenizer):
    tokens = self_generated(model, tokenizer, 5, 20, seed=0, batch_size=2)
    assert tokens.shape == (5, 20)
    assert tokens.dtype == torch.int64
    assert tokens.device.type == "cpu"
    assert (tokens[:, 0] == BOS).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 5


def test_written_text_depends_on_the_seed_not_on_the_batch_size(model, tokenizer):
    first = self_generated(model, tokenizer, 6, 20, seed=0, batch_size=4)
    assert torch.equal(first, self_generated(model, tokenizer, 6, 20, seed=0, batch_size=4))
    assert torch.equal(first, self_generated(model, tokenizer, 6, 20, seed=0, batch_size=100))
    assert not torch.equal(first, self_generated(model, tokenizer, 6, 20, seed=1, batch_size=4))


def test_writing_leaves_random_state_and_training_modes_alone(model, tokenizer):
    expected = self_generated(model, tokenizer, 2, 12, seed=0)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    assert torch.equal(self_generated(model, tokenizer, 2, 12, seed=0), expected)  # so no dropout either
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_the_note_about_writing_changes_nothing(model, tokenizer):
    expected = self_generated(model, tokenizer, 2, 12, seed=0)
    model.train()
    before = torch.random.get_rng_state()
    note = writing_note(model, 40, 12)
    assert re.fullmatch(
        r"the model writes 480 tokens of calibration text \(about [\d,]+ s\); pass --calibration TEXT to avoid this",
        note,
    )
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(self_generated(model, tokenizer, 2, 12, seed=0), expected)


def test_a_note_that_fails_leaves_the_mode(model):
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN or infinity"):
        writing_note(model, 2, 8)
    assert all(module.training for module in model.modules())
    with pytest.raises(InputError, match="has no LM head"):
        writing_note(model.model, 2, 8)


def test_the_note_extrapolates_a_step(model, monkeypatch):
    """128 rows of 51 tokens: 8 times 50 steps, here of 3 s."""
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(generate, "_write", lambda *_: None)
    monkeypatch.setattr(generate.time, "perf_counter", lambda: 2 * next(clock))
    assert "(about 1,200 s)" in writing_note(model, 128, 51)


def greedy_from_whole_rows(model, tokens):
    with torch.no_grad():
        return model(tokens.to(model.device)).logits[:, :-1].argmax(dim=-1).cpu()


def test_each_token_follows_from_the_whole_row(model, tokenizer):
    """At a temperature near 0 every token is the likeliest one after all before it: the cache carries the row."""
    tokens = self_generated(model, tokenizer, 2, 32, seed=0, temperature=1e-6)
    assert torch.equal(tokens[:, 1:], greedy_from_whole_rows(model, tokens))
    assert tokens[0].unique().numel() > 5


def test_model_reads_one_token_a_step_or_without_a_cache_the_whole_row(model, tokenizer):
    read = []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    expected = self_generated(model, tokenizer, 3, 16, seed=0)
    assert read == [1] * 15
    read.clear()
    model.register_forward_hook(lambda _, args, output: type(output)(logits=output.logits))
    assert torch.equal(self_generated(model, tokenizer, 3, 16, seed=0), expected)
    assert read == list(range(1, 16))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_from_the_models_distribution(model, tokenizer, temperature):
    tokens = self_generated(model, tokenizer, 8000, 2, seed=0, temperature=temperature, batch_size=8000)
    drawn = torch.bincount(tokens[:, 1], minlength=258) / 8000
    with torch.no_grad():
        logits = model(torch.tensor([[BOS]])).logits[0, -1]

    def distance(temperature):
        return (drawn - torch.softmax(logits / temperature, dim=-1)).abs().sum().item() / 2

    assert distance(temperature) < 0.08  # 8,000 draws of 258 tokens are some 0.06 off by chance
    assert distance(3.0 - temperature) > 0.2  # the other temperature's distribution is another


def test_rows_go_on_after_an_eos(model, tokenizer):
    tokens = self_generated(model, tokenizer, 200, 32, seed=0, batch_size=200)
    row, column = (tokens[:, 1:-1] == EOS).nonzero(as_tuple=True)
    assert len(row) > 3
    assert (tokens[row, column + 2] != EOS).any()


def test_without_bos_rows_start_with_eos(model):
    tokens = self_generated(model, byte_tokenizer(eos_token="</s>"), 2, 4, seed=0)
    assert tokens[:, 0].tolist() == [EOS, EOS]


def test_without_bos_and_eos_rows_start_anywhere(model):
    first = self_generated(model, byte_tokenizer(), 20, 4, seed=0)[:, 0]
    assert first.unique().numel() > 10
    assert torch.equal(first, self_generated(model, byte_tokenizer(), 20, 4, seed=0)[:, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_model_on_a_gpu_writes_to_the_cpu(model, tokenizer):
    before = torch.cuda.get_rng_state()
    tokens = self_generated(model.cuda(), tokenizer, 3, 16, seed=0, temperature=1e-6)
    assert tokens.device.type == "cpu"
    assert torch.equal(tokens[:, 1:], greedy_from_whole_rows(model, tokens))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nsamples": 0}, "nsamples: 0 found; use a whole number of at least 1"),
        ({"seqlen": 65}, "seqlen: 65 found, but the model has 64 positions; use 64 or less"),
        ({"batch_size": 0}, "batch_size: 0 found; use a whole number of at least 1"),
        ({"temperature": 0}, "temperature: 0 found; use a finite number above 0 (1 is the model's own)"),
        ({"temperature": float("nan")}, "temperature: nan found; use a finite number above 0 (1 is the model's own)"),
        ({"temperature": "hot"}, "temperature: 'hot' found; use a finite number above 0 (1 is the model's own)"),
    ],
)
def test_bad_writing_request_is_refused(model, tokenizer, arguments, message):
    arguments = {"nsamples": 1, "seqlen": 4, "seed": 0} | arguments
    assert refusal(self_generated, model, tokenizer, **arguments) == message


def test_tokenizer_of_another_model_is_refused(model, tokenizer):
    model.resize_token_embeddings(200)
    assert refusal(self_generated, model, tokenizer, 1, 4, 0) == (
        "tokenizer: its first token has id 256, but the model knows ids below 200; "
        "pass the tokenizer that belongs to the model"
    )


def test_model_with_nan_logits_is_refused(model, tokenizer):
    model.lm_head.weight.data[3, 3] = float("nan")
    message = "model: its logits hold NaN or infinity, so it cannot write text; use another source"
    assert refusal(self_generated, model, tokenizer, 1, 4, 0) == message


# --- by the name of a source ------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "The quick brown fox"}\n{"body": "jumps over the lazy dog"}\n')
    return str(path)


def test_windows_of_a_source_come_with_what_names_them(tokenizer, file):
    data = load_windows(file, tokenizer, 3, 8, 5, bos="never", text_field="body")
    documents = ["The quick brown fox", "jumps over the lazy dog"]
    assert torch.equal(data.tokens, token_windows(documents, tokenizer, 3, 8, 5))
    assert (data.source, data.seed, data.sha256) == (file, 5, tokens_sha256(data.tokens))
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.seed = 6


def test_windows_of_the_model_itself(model, tokenizer):
    data = load_windows("self", tokenizer, 3, 8, 5, model=model)
    assert torch.equal(data.tokens, self_generated(model, tokenizer, 3, 8, 5))
    assert data.source == "self"


def test_self_without_a_model_is_refused(tokenizer):
    message = "text: 'self' is text that the model writes, and no model was given; pass model="
    assert refusal(load_windows, "self", tokenizer, 3, 8, 5) == message


def test_numbers_are_checked_before_anything_is_read(tokenizer):
    assert refusal(load_windows, "nowhere.txt", tokenizer, 0, 8, 5).startswith("nsamples: 0 found")
    assert refusal(load_windows, "nowhere.txt", tokenizer, 1, 8, 5).startswith("text: 'nowhere.txt' is neither")


def test_hash_covers_shape_and_ids_as_little_endian_int64():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 600]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 600)).hexdigest()
    assert tokens_sha256(tokens) == expected
    assert tokens_sha256(tokens.int()) == expected
    assert tokens_sha256(tokens.T.contiguous().T) == expected
    assert tokens_sha256(tokens.view(3, 2)) != expected


def test_evaluation_tokens_are_the_whole_of_a_file(tokenizer, file):
    tokens = evaluation_tokens(file, tokenizer, text_field="body")
    assert tokens.dtype == torch.int64
    assert tokens.ndim == 1
    assert tokenizer.decode(tokens) == "The quick brown fox\n\njumps over the lazy dog"


@pytest.mark.network
def test_evaluation_text_of_a_source_is_never_calibrated_on(tokenizer):
    """Every document of the held-out news is in the evaluation text and in no calibration window's text."""
    held_out = tokenizer.decode(evaluation_tokens("news-mini", tokenizer)).split("\n\n")
    calibration = load_windows("news-mini", tokenizer, 500, 400, 0, bos="never")
    windows = [tokenizer.decode(window) for window in calibration.tokens]
    assert len(held_out) == 93
    assert not any(document[:100] in window for document in held_out for window in windows)


def test_evaluation_on_the_models_own_text_is_refused(tokenizer):
    message = "text: 'self' is for calibration only; evaluate on wiki-mini, another source or a file"
    assert refusal(evaluation_tokens, "self", tokenizer) == message
