"""The loss: the Kullback-Leibler divergence of the student's next-token distribution from the teacher's."""

import torch
from torch import Tensor

from ace_ext.models.tail import Tail

LOGITS_AT_ONCE = 2**25
"""The largest number of the student's logits at a time, so that memory does not grow with tokens and vocabulary. Each
time the LM head is read three times: with 2**24 a step's logits and their gradients take a CPU 1.3 times as long
(gemma-3-270m: 64 tokens at a time in place of 128)."""
LOGIT_BYTES = 20
"""Bytes for each of them at the peak, in float32: both models' logits, and of a soft cap the saved tanh and two
gradients. Measured: 20.0 for a Gemma 2 in float32."""
SOFTMAX_ON_CPU, SOFTMAX_ELSEWHERE = 2**18, 2**22
"""The largest number of logits whose probabilities are computed at a time: few enough for a processor's cache, and
enough to keep another device busy."""


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits are computed together."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


@torch.no_grad()
def divergence(tail: Tail, student: Tensor, teacher: Tensor) -> float:
    """The sum over tokens of ``KL(teacher ‖ student)`` in nats; arguments as :func:`divergence_and_gradient`."""
    parts = zip(_parts(tail, student), _parts(tail, teacher), strict=True)
    return sum(_kl(tail.logits(x), tail.logits(y)) for x, y in parts)


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
            target = tail.logits(y)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            logits = tail.logits(x)
        with torch.no_grad():
            total += _kl(logits, target, gradient=target)
        part.copy_(torch.autograd.grad(logits, x, target)[0])
    return total, gradient


def _parts(tail: Tail, states: Tensor) -> tuple[Tensor, ...]:
    """``[..., d_model]`` as views ``[tokens, d_model]`` of a few tokens each."""
    return torch.split(states.view(-1, states.shape[-1]), tokens_at_once(tail.vocabulary))


def _kl(student: Tensor, teacher: Tensor, gradient: Tensor | None = None) -> float:
    """The divergence of logits ``[tokens, vocabulary]``. Writes ``q - p`` to ``gradient``, which may be ``teacher``."""
    total = 0.0
    at_once = SOFTMAX_ON_CPU if student.device.type == "cpu" else SOFTMAX_ELSEWHERE
    tokens = max(1, at_once // student.shape[-1])
    for row in range(0, len(student), tokens):
        rows = slice(row, row + tokens)
        q, p = _log_probabilities(student[rows]), _log_probabilities(teacher[rows])
        difference = p - q
        total += float(difference.mul_(p.exp_()).sum())
        if gradient is not None:
            gradient[rows] = q.exp_().sub_(p)
    return total


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.detach().log_softmax(-1, dtype=torch.float32)
