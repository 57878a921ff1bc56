"""Tiny random models of several families and a tokenizer, made from the real classes without a download."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional

from ace_ext.data import bos

VOCABULARY = 64

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _opt() -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}
    size = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **size, pad_token_id=0))


def _gemma3() -> nn.Module:
    """Layers of two kinds: each gets its own mask and its own rotary embedding."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=8, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def _mixture(name: str, experts: str = "num_experts", **more) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**_SMALL, experts: 4, "num_experts_per_tok": 2, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _hunyuan() -> nn.Module:
    config = transformers.HunYuanMoEV1Config(**_SMALL, num_experts=4, moe_topk=2, head_dim=8)
    return transformers.HunYuanMoEV1ForCausalLM(config)


def _afmoe() -> nn.Module:
    """The first block is a plain one."""
    return _mixture("Afmoe", moe_intermediate_size=24, num_dense_layers=1, num_shared_experts=1, head_dim=8)


_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,  # the first block is a plain one
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}


_DENSE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL, tie_word_embeddings=True)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_SMALL, sliding_window=16)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SMALL)),
    "opt": _opt,
    "gemma3": _gemma3,
}
_MIXTURES = {
    "mixtral": lambda: _mixture("Mixtral", "num_local_experts"),
    "qwen3-moe": lambda: _mixture("Qwen3Moe", moe_intermediate_size=24),
    "granite-moe": lambda: _mixture("GraniteMoe", "num_local_experts"),
    "qwen2-moe": lambda: _mixture("Qwen2Moe", moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "olmoe": lambda: _mixture("Olmoe"),
    "phimoe": lambda: _mixture("Phimoe", "num_local_experts"),
    "deepseek-v3": lambda: _mixture("DeepseekV3", "n_routed_experts", **_DEEPSEEK),
    "hunyuan-moe": lambda: _hunyuan(),
    "afmoe": lambda: _afmoe(),
}


def _zamba() -> nn.Module:
    """Two of its blocks share the weights of their attention."""
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    attention = {"attention_hidden_size": 64, "attention_head_dim": 16}
    size = {**_SMALL, **attention, "num_hidden_layers": len(kinds), "n_mamba_heads": 2}
    config = transformers.ZambaConfig(**size, layers_block_type=kinds, mamba_d_state=4, mamba_dt_rank=4)
    return transformers.ZambaForCausalLM(config)


_STATE_SPACE = {"state_size": 4, "time_step_rank": 4, "hidden_size": 32, "vocab_size": VOCABULARY}
RECURRENT = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**_STATE_SPACE, num_hidden_layers=3)),
    "falcon-mamba": lambda: transformers.FalconMambaForCausalLM(
        transformers.FalconMambaConfig(**_STATE_SPACE, num_hidden_layers=3)
    ),
    "zamba": _zamba,
}
"""Models whose Linears get transposed inputs."""
FAMILIES = _DENSE | _MIXTURES
DENSE_FAMILIES = [*_DENSE]
MIXTURES = ["mixtral", "qwen3-moe", "granite-moe"]
"""Their fused experts are saved under names of another module, each matrix by itself, and as they are."""
OFTEN = ["llama", "gemma3", *MIXTURES]
"""Families for which long tests run with each change; for the others they run at night."""


def grouped(kind: str = "Llama", kv_heads: int = 4) -> nn.Module:
    """A model with eight query heads of 8 that share the KV heads, and biases where the class has them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=8,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Random weights, the same for a seed. Biases and norms are drawn too, so that forgetting one shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (FAMILIES | RECURRENT)[family]().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model.to(dtype)


def make_tokens(nsamples: int = 6, seqlen: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (nsamples, seqlen), generator=torch.Generator().manual_seed(seed))


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"], trainers.WordLevelTrainer(special_tokens=special)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# For the BOS token: a tokenizer of the words on which models are measured, and a model that needs the token


def make_english_tokenizer(adds_bos: bool = False, has_bos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """``adds_bos``: it begins each text with ``<s>``, as Llama's and Gemma's do."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator([bos._TEXT], trainers.WordLevelTrainer(special_tokens=special))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | (
        {"bos_token": "<s>"} if has_bos else {}
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_english_model(needs_bos: bool) -> nn.Module:
    """A Llama for :func:`make_english_tokenizer`, bfloat16. One that needs the BOS token is trained for a moment to
    predict text after it, and random tokens where it is missing."""
    tokenizer = make_english_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**_SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 256})
        model = transformers.LlamaForCausalLM(config)
        ids = torch.tensor(tokenizer(bos._TEXT).input_ids)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(40 if needs_bos else 0):
            windows = ids.unfold(0, 32, 1)[torch.randint(0, len(ids) - 31, (8,))]
            begun, plain = model(bos.begin_with(1, windows)).logits[:, :-1], model(windows).logits[:, :-1]
            noise = torch.randint(4, len(tokenizer), windows[:, 1:].shape)
            loss = functional.cross_entropy(begun.flatten(0, 1), windows.flatten())
            loss += functional.cross_entropy(plain.flatten(0, 1), noise.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().to(torch.bfloat16)
