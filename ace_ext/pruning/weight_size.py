"""The size of weights.

Adam changes each weight by about the learning rate, whatever its gradient. To suit more than one model, a learning rate
must be a share of the weights' root mean square: 0.19 in SmolLM2-135M, 0.04 in gemma-3-270m, 0.015 in
Qwen2.5-Coder-0.5B.
"""

import torch
from torch import Tensor


def root_mean_square(weight: Tensor, mask: Tensor | None = None) -> float:
    """The root mean square of the entries that the mask keeps, or of all. The other entries must be 0."""
    kept = torch.tensor(weight.numel()) if mask is None else mask.count_nonzero()
    return float(torch.linalg.vector_norm(weight) / kept.clamp_min(1).float().sqrt())
