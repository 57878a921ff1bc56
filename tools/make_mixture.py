"""Makes a mixture of experts with real weights from a Llama model: each MLP is copied several times, and a random
router chooses among the copies (sparse upcycling, arXiv 2212.05055). Its output is that of the original model.

    python tools/make_mixture.py MODEL FOLDER [--experts 4]

``MODEL`` is a folder or a ``.gguf`` file. The result is a Mixtral checkpoint in bfloat16.
"""

import argparse
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from ace_ext.models.loading import load_model


@torch.no_grad()
def make(model: str, folder: Path, experts: int = 4) -> None:
    """Writes the mixture of ``model`` to ``folder``."""
    loaded = load_model(model)
    llama = loaded.model
    shared = {key: value for key, value in llama.config.to_dict().items() if key in MixtralConfig().to_dict()}
    shared.pop("model_type"), shared.pop("architectures")
    config = MixtralConfig(**{**shared, "num_local_experts": experts, "num_experts_per_tok": 2, "sliding_window": None})
    mixture = MixtralForCausalLM(config).to(torch.bfloat16)
    mixture.load_state_dict(llama.state_dict(), strict=False)
    random = torch.Generator().manual_seed(0)
    for block, dense in zip(mixture.model.layers, llama.model.layers, strict=True):
        fused, mlp = block.mlp.experts, dense.mlp
        fused.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(fused.gate_up_proj))
        fused.down_proj.copy_(mlp.down_proj.weight.expand_as(fused.down_proj))
        block.mlp.gate.weight.copy_(torch.randn(block.mlp.gate.weight.shape, generator=random))
    mixture.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    args = parser.parse_args()
    make(args.model, args.folder, args.experts)


if __name__ == "__main__":
    main()
