"""One tiny random model of every causal-LM class of the installed transformers.

Configurations are shrunk by the names of their numbers, not by family; what a class needs beside that is in
:data:`BESIDE`.
"""

import inspect
import re
from typing import Any

import torch
from torch import nn

VOCABULARY = 64

_RULES: list[tuple[str, int]] = [
    (r".*vocab_size.*|.*_vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|seq_length|max_seq_len|max_sequence_length|context_length", 128),
    (r"(max|decoder_max|original_max)_(source|target|position).*", 128),
    (r"num_(hidden_)?layers|n_layers?|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_mem_blocks", 2),
    (r"(swa_)?num_key_value_heads|n_kv_heads|num_kv_heads|kv_n_heads|num_query_groups|num_global_key_value_heads", 2),
    (r".*num_(key_|value_|linear_)?attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads", 4),
    (r"(global_|local_|swa_)?(v_)?head_dim|kv_channels|attention_head_size|attention_head_dim|d_kv|key_length", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|index_head_dim|rotary_dim|rope_dim", 8),
    (r"qk_head_dim", 16),
    (r".*lora_rank|.*_rank", 16),
    (r"index_n_heads|index_topk", 4),
    (r"(moe_|n_|num_)?(num_|local_|routed_)?(local_|routed_)?experts|moe_num_experts|n_routed_experts", 4),
    (r".*(experts_per_tok(en)?|moe_topk|top_?k|moe_k|moe_top_k|num_selected_experts|topk_method_k)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"router_hidden_size", 16),
    (r"(n|num)_shared_experts?|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*(intermediate|ffn(_hidden)?|inner|feed_forward|mlp)_(size|dim|hidden_size)|d_ff|ffn_dim|n_inner", 48),
    (r"(en|de)coder_ffn_dim|ffn_hidden_size|shared_expert_intermediate_size|block_ff_dim|mlp_dim", 48),
    (
        r"hidden_size|d_model|n_embd|dim|model_dim|embed_dim|embedding_size|word_embed_proj_dim|hidden_dim|emb_dim|hidden_size_global",
        32,
    ),
    (r"\w+_(embedding_size|embed_dim)", 32),
    (r"decoder_hidden_size|cross_attention_hidden_size|input_embedding_size|lru_width|out_hidden_size", 32),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_state_dim", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_ssm", 64),
    (r"(mamba_)?n_groups|mamba_ngroups", 1),
    (r"linear_num_key_heads|linear_num_value_heads", 4),
    (r"linear_key_head_dim|linear_value_head_dim", 8),
    (r"image_size|patch_size", 16),
    (
        r"rel_extent|sliding_window|sliding_window_size|attention_window_size|window_size|chunk_size|mamba_chunk_size|attention_chunk_size",
        16,
    ),
]
"""Names of numbers in a configuration, and what they become if they are larger."""

_UNSET = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
}
"""Settings that a default configuration may leave open, but the model asks for."""

_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
BESIDE: dict[str, dict[str, Any]] = {
    "dbrx": {
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {
        **_SHARED_KV,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _SHARED_KV,
    "gemma4_unified_text": _SHARED_KV,
    "deepseek_v4": {"hc_mult": 2},
    "hy_v4": {"hc_mult": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "hidden_size": 32, "expand": 2},
    "recurrent_gemma": {"num_attention_heads": 8},
    "roc_bert": {"num_hidden_layers": 4},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
}
"""What else a class needs, by its configuration's ``model_type``."""

NOT_SMALL = {"cpmant", "ctrl"}
"""Types whose small configuration is not small: sizes in names that no other class has."""


def model_types() -> list[str]:
    """One ``model_type`` of each class of the mapping, in its order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    firsts: dict[str, str] = {}
    for name, known in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        firsts.setdefault(known if isinstance(known, str) else known[0], name)
    return [*firsts.values()]


def shrunk(config: Any, beside: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, smaller."""
    settings: dict[str, Any] = {}
    accepted = set(inspect.signature(type(config).__init__).parameters) | set(
        getattr(type(config), "__annotations__", {})
    )
    for name, value in vars(config).items():
        if name.startswith("_") and name not in accepted:
            continue
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            if re.fullmatch(r"(pad|bos|eos|sep|cls|unk|decoder_start|forced_.*)_token_id", name):
                settings[name] = min(value, 3) if value >= 0 else value
            elif re.fullmatch(r".*_token_(id|index)|.*token_id", name):
                settings[name] = min(value, VOCABULARY - 1)
            for pattern, small in _RULES:
                if re.fullmatch(pattern, name):
                    settings[name] = min(value, small)
                    break
        elif hasattr(value, "to_dict") and hasattr(value, "model_type") and name not in beside:
            settings[name] = type(value)(**shrunk(value, {}))
        elif value is None and name in _UNSET and _UNSET[name] is not None:
            settings[name] = _UNSET[name]
        elif isinstance(value, list) and name.endswith(
            ("layer_types", "layers_block_type", "block_types", "block_type")
        ):
            settings[name] = value
    kinds = next((settings[n] for n in settings if n in ("layer_types", "layers_block_type", "_block_types")), None)
    if kinds:
        distinct = list(dict.fromkeys(kinds))
        distinct = distinct if len(distinct) > 1 else distinct * 2
        for name, value in list(settings.items()):
            if isinstance(value, list) and len(value) == len(kinds):
                order = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
                order = order if len(order) > 1 else order * 2
                settings[name] = [value[i] for i in order]
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in settings:
                settings[name] = len(distinct)
    if settings.get("kv_lora_rank") and "num_key_value_heads" in settings:  # latent attention has as many of both
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return settings | beside


def config_of(model_type: str) -> Any:
    """A small configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**shrunk(kind(), BESIDE.get(model_type, {})))


def build(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, with random matrices, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config_of(model_type)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 0.15)
    return model.to(dtype)
