"""Divergences between a student's and a teacher's logits, as pure functions.

Every function returns one value a row, shape (B,), in float32 or wider, so that whoever calls it
decides over what to average. Logits are raw, shape (B, C). Below, p = softmax(teacher/T) and
q = softmax(student/T); a divergence that is of second order in p - q carries T², which keeps the size of
its gradient as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2), one of first order carries T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -1  # the label of a row without a hard label


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels, -log softmax(logits)[label]; 0 where the label is -1.

    logits (B, C), labels (B,) int64 -> (B,)
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(_wide(logits), labels, reduction="none", ignore_index=IGNORE)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(p || q), summed over classes.

    The teacher's entropy is included, so kl(p, p) = 0. student, teacher (B, C) -> (B,)
    """
    log_p, log_q = _logs(student, teacher, temperature)
    return temperature**2 * _divergence(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(q || p): the student need not cover what the teacher holds, but pays for what it rules out
    (Gu et al. 2023, arXiv 2306.08543, section 2). student, teacher (B, C) -> (B,)
    """
    log_p, log_q = _logs(student, teacher, temperature)
    return temperature**2 * _divergence(log_q, log_p)


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, beta: float = 0.5) -> Tensor:
    """T² · (β KL(p || m) + (1 - β) KL(q || m)), with the mixture m = β p + (1 - β) q, 0 < β < 1.

    Generalised Jensen-Shannon (Agarwal et al. 2023, arXiv 2306.13649, section 2). Divided by β it tends
    to KL(p || q) as β falls to 0, divided by 1 - β to KL(q || p) as β rises to 1.
    student, teacher (B, C) -> (B,)
    """
    log_p, log_q = _logs(student, teacher, temperature)
    log_m = _mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _divergence(log_p, log_m) + (1 - beta) * _divergence(log_q, log_m))


def skew_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, alpha: float = 0.1) -> Tensor:
    """T² · KL(p || α p + (1 - α) q), from the teacher to the mixture, 0 < α < 1.

    Bounded by -T² log α wherever the student has no mass (Ko et al. 2024, DistiLLM, arXiv 2402.03898,
    section 3.1). student, teacher (B, C) -> (B,)
    """
    log_p, log_q = _logs(student, teacher, temperature)
    return temperature**2 * _divergence(log_p, _mixture(log_p, log_q, alpha))


def tvd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T · ½ Σ_c |p_c - q_c|, total variation; T and not T², as it is of first order in p - q.

    Its gradient does not fade near the teacher; at p = q the subgradient 0 is taken.
    student, teacher (B, C) -> (B,)
    """
    log_p, log_q = _logs(student, teacher, temperature)
    return temperature * (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """½ · mean_c (z_c - v_c)² of logits whose row mean is taken off: what T² · KL(p || q) tends to, with
    its gradient (z - v)/C, as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2.1, eq. 4).

    The limit knows no temperature: whichever is given changes nothing. student, teacher (B, C) -> (B,)
    """
    z, v = (_wide(logits) - _wide(logits).mean(-1, keepdim=True) for logits in (student, teacher))
    return (z - v).square().mean(-1) / 2


def cosine(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - cos(q, p), the reference recipe's third term.

    Bounded, so it carries no T². student, teacher (B, C) -> (B,)
    """
    from torch.nn.functional import cosine_similarity

    p = (_wide(teacher) / temperature).softmax(-1)  # (B, C)
    q = (_wide(student) / temperature).softmax(-1)  # (B, C)
    return 1 - cosine_similarity(q, p, dim=-1)


def dkd(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T² · (α KL(p_y, 1 - p_y || q_y, 1 - q_y) + β KL(p̂ || q̂)), y the label, p̂ and q̂ the probabilities of
    the other classes, renormalised (Zhao et al. 2022, Decoupled KD, arXiv 2203.08679, eq. 7).

    With α = 1 and β = 1 - p_y it is `kl`. Of two classes the second part is 0. Where the label is -1 the
    teacher's top class stands in for it: plain KL would be a term of another size on those rows.
    student, teacher (B, C), labels (B,) int64 -> (B,)
    """
    import torch

    log_p, log_q = _logs(student, teacher, temperature)
    target = torch.where(labels == IGNORE, teacher.argmax(-1), labels)  # (B,)
    p_binary, p_rest = _decoupled(log_p, target)
    q_binary, q_rest = _decoupled(log_q, target)
    parts = alpha * _divergence(p_binary, q_binary) + beta * _divergence(p_rest, q_rest)
    return temperature**2 * parts


def hidden(
    student: Tensor, teacher: Tensor, mask: Tensor, *, how: Literal["mse", "cosine"] = "mse"
) -> Tensor:
    """Distance of hidden states, a mean over a row's real tokens; 0 for a row without any.

    mse: ‖s/‖s‖ - t/‖t‖‖², summed over H (Sun et al. 2019, patient KD, arXiv 1908.09355, eq. 7);
    cosine: 1 - cos(s, t) (Sanh et al. 2019, arXiv 1910.01108, section 3), which is exactly half of it.
    student, teacher (B, L, H), mask (B, L), 1 = real -> (B,)
    """
    from torch.nn.functional import normalize

    real = mask.bool()  # (B, L)
    # padding is blanked first: what is not finite there must not reach the gradient
    s, t = (
        normalize(_wide(states).masked_fill(~real[..., None], 0), dim=-1)  # (B, L, H)
        for states in (student, teacher)
    )
    distance = (s - t).square().sum(-1) if how == "mse" else 1 - (s * t).sum(-1)  # (B, L)
    return (distance * real).sum(-1) / real.sum(-1).clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    """float32 at least: sums of small differences of logarithms do not survive bf16."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of the teacher and log q of the student, (B, C) each."""
    return (_wide(teacher) / temperature).log_softmax(-1), (_wide(student) / temperature).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), (..., C) twice -> (...)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 - share) · q), (B, C) twice -> (B, C)"""
    return (log_p + math.log(share)).logaddexp(log_q + math.log1p(-share))


def _decoupled(log_p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log (p_target, 1 - p_target), (B, 2), and log p of the other classes, renormalised, (B, C - 1)."""
    import torch

    others = torch.arange(log_p.shape[-1] - 1, device=log_p.device).expand(len(log_p), -1)  # (B, C - 1)
    others = others + (others >= target[:, None])  # the target's number is skipped
    rest = log_p.gather(-1, others)  # (B, C - 1)
    binary = [log_p.gather(-1, target[:, None]), rest.logsumexp(-1, keepdim=True)]
    return torch.cat(binary, dim=-1), rest.log_softmax(-1)


# name in `distill.terms` -> function of (student, teacher, temperature), or of (logits, labels) for ce;
# those of LABELLED take labels=, and each takes its PARAMETERS, by name
LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": ce,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "tvd": tvd,
    "mse": mse,
    "cosine": cosine,
    "dkd": dkd,
}
LABELLED = ("dkd",)
PARAMETERS: dict[str, dict[str, tuple[float, float]]] = {  # each strictly between these
    "jsd": {"beta": (0, 1)},
    "skew_kl": {"alpha": (0, 1)},
    "dkd": {"alpha": (0, math.inf), "beta": (0, math.inf)},
}


def parameter_faults(params: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is wrong with terms' parameters, {term: {name: value}}: one line each."""
    faults = []
    for term, given in params.items():
        known = PARAMETERS.get(term, {})
        for name, value in given.items():
            if name not in known:
                faults.append(f"{term}.{name}: unknown; {term} takes {', '.join(known) or 'no parameter'}")
            elif not known[name][0] < value < known[name][1]:
                low, high = known[name]
                faults.append(f"{term}.{name} = {value:g}: must lie between {low:g} and {high:g}")
    return faults
