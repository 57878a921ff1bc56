"""Makes a mixture of experts with real weights from a Llama model: each MLP is copied several times, and a random
router chooses among the copies (sparse upcycling, arXiv 2212.05055). Its output is that of the original model.

    python tools/make_mixture.py MODEL FOLDER [--experts 4]

``MODEL`` is a folder or a ``.gguf`` file. The result is a Mixtral checkpoint in bfloat16.
"""

import argparse
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from ace_ext.errors import InputError
from ace_ext.models.loading import load_model

CHOSEN = 2
"""Experts that the router chooses for a token."""


@torch.no_grad()
def make(model: str, folder: Path, experts: int = 4) -> None:
    """Writes the mixture of ``model`` to ``folder``.

    Raises:
        InputError: the model cannot be loaded, or is no Llama.
    """
    loaded = load_model(model)
    llama = loaded.model
    if llama.config.model_type != "llama":
        raise InputError(f"model {model!r} must be a Llama (got {llama.config.model_type})")
    shared = {key: value for key, value in llama.config.to_dict().items() if key in MixtralConfig().to_dict()}
    shared.pop("model_type"), shared.pop("architectures")
    chosen = {"num_local_experts": experts, "num_experts_per_tok": CHOSEN, "sliding_window": None}
    config = MixtralConfig(**{**shared, **chosen})
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


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and writes the mixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    args = parser.parse_args(argv)
    if args.experts < CHOSEN:
        parser.error(f"--experts must be at least {CHOSEN}, as many as a token is sent to (got {args.experts})")
    if args.folder.exists():
        parser.error(f"folder {str(args.folder)!r} exists; give another name")
    try:
        make(args.model, args.folder, args.experts)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"folder {str(args.folder)!r} cannot be written: {error.strerror or error}")


if __name__ == "__main__":
    main()
