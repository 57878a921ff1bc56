"""The loss: the Kullback-Leibler divergence of the student's next-token distribution from the teacher's."""

import torch
from torch import Tensor

from ace_ext.models.tail import Tail

LOGITS_AT_ONCE = 2**23
"""The largest number of the student's logits at a time, so that memory does not grow with tokens and vocabulary."""
LOGIT_BYTES = 24
"""Bytes for each of them at the peak: both models' logits and log-probabilities, and two temporaries in float32."""


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits are computed together."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


@torch.no_grad()
def divergence(tail: Tail, student: Tensor, teacher: Tensor) -> float:
    """The sum over tokens of ``KL(teacher ‖ student)`` in nats; arguments as :func:`divergence_and_gradient`."""
    total = 0.0
    for x, y in zip(_parts(tail, student), _parts(tail, teacher), strict=True):
        total += _kl_(_log_probabilities(tail.logits(x)), _log_probabilities(tail.logits(y)))[0]
    return total


def divergence_and_gradient(tail: Tail, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The sum over tokens of ``KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)``, and its gradient.

    ``p`` and ``q`` are the teacher's and the student's distribution at temperature 1, in float32. The gradient with
    respect to the student's logits is ``q - p``. Autograd carries it back through the tail.

    Args:
        tail: the tail of both models; they differ only in their blocks.
        student: ``[..., d_model]``, outputs of the last block.
        teacher: the same shape, the dense model's.

    Returns:
        The divergence in nats, and the gradient with respect to ``student``, in its shape and dtype. It is that of the
        sum over tokens: that of the mean would underflow in float16, and Adam does not depend on the scale.
    """
    total = 0.0
    gradient = torch.empty_like(student)
    parts = zip(_parts(tail, student), _parts(tail, teacher), _parts(tail, gradient), strict=True)
    for x, y, part in parts:
        with torch.no_grad():
            target = _log_probabilities(tail.logits(y))
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            logits = tail.logits(x)
        with torch.no_grad():
            loss, difference = _kl_(_log_probabilities(logits), target)
        total += loss
        part.copy_(torch.autograd.grad(logits, x, difference.to(logits.dtype))[0])
    return total, gradient


def _parts(tail: Tail, states: Tensor) -> tuple[Tensor, ...]:
    """``[..., d_model]`` as views ``[tokens, d_model]`` of a few tokens each."""
    return torch.split(states.view(-1, states.shape[-1]), tokens_at_once(tail.vocabulary))


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.detach().log_softmax(-1, dtype=torch.float32)


def _kl_(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The divergence of log-probabilities ``[tokens, vocabulary]``, and ``q - p``. Overwrites both arguments."""
    p = teacher.exp()
    loss = float(teacher.sub_(student).mul_(p).sum())
    return loss, student.exp_().sub_(p)
