"""How much each teacher of an ensemble counts: anew on every row, or once, fitted to out-of-fold logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkd.errors import DataError
from llmkd.losses import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURES = (0.05, 20.0)  # the range that `fit` searches


def confidence(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """log max_c p_c: a teacher counts in proportion to its top probability. (B, N, C), (B,) -> (B, N)"""
    return teacher_logits.log_softmax(-1).amax(-1)


def entropy(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-H(p): a teacher counts as exp(-H), which lies in [1/C, 1] where 1/H has no bound.

    (B, N, C), (B,) -> (B, N)
    """
    log_p = teacher_logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


def ce(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """-CE(p, label): a teacher counts as p[label], so weights are softmax(-CE) over teachers; all alike
    where the label is -1.

    Of two teachers these are the weights of CA-MKD (Zhang et al. 2022, arXiv 2201.00007), which for more
    of them uses (1 - softmax(CE)) / (N - 1). (B, N, C), (B,) -> (B, N)
    """
    known = labels != IGNORE
    at = labels.clamp(min=0)[:, None, None].expand(*teacher_logits.shape[:2], 1)
    return teacher_logits.log_softmax(-1).gather(-1, at).squeeze(-1) * known[:, None]


# name -> function of (teachers' logits, labels): log of what a teacher counts for on a row, before its
# own weight and the division by the ensemble's
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "confidence": confidence,
    "entropy": entropy,
    "ce": ce,
}


def by_row(weighting: str, teacher_logits: Tensor, labels: Tensor, fixed: Sequence[float]) -> Tensor:
    """Teachers' weights row by row, Σ fixed · fixed_i a_i / Σ_j fixed_j a_j, of the probabilities at T = 1.

    They sum to Σ fixed on every row, are `fixed` where all a_i are alike, and a teacher of weight 0 keeps
    it. No gradient flows through them. teacher_logits (B, N, C), labels (B,) -> (B, N) float32 or wider
    """
    import torch

    logits = teacher_logits.detach().to(torch.promote_types(teacher_logits.dtype, torch.float32))
    prior = torch.as_tensor(fixed, dtype=logits.dtype, device=logits.device)  # (N,)
    if not prior.any():
        return prior.expand(logits.shape[:2])
    # logarithms: the probability of a label may underflow for every teacher
    return prior.sum() * (prior.log() + WEIGHTINGS[weighting](logits, labels)).softmax(-1)


class Mixture(NamedTuple):
    """weights (T,) that sum to 1, temperatures (T,), and the log loss in nats: `before` of the plain mean
    of probabilities, `after` of the fitted one."""

    weights: NDArray[np.float64]
    temperatures: NDArray[np.float64]
    before: float
    after: float


def fit(oof_logits: NDArray[np.floating], labels: NDArray[np.int64]) -> Mixture:
    """The convex combination Σ_i w_i softmax(z_i / T_i) of least log loss on the labelled rows.

    oof_logits (N, T, C) of teachers that did not see the rows, labels (N,) with -1 = none. Deterministic,
    in float64; on these rows never worse than the plain mean or than any one teacher, as it is or
    calibrated (each is a candidate). Raises DataError without a labelled row.
    """
    known = labels != IGNORE
    if not known.any():
        raise DataError("weights cannot be fitted: no row has a label; give labels or fixed weights")
    logits, targets = oof_logits[known].astype(np.float64), labels[known]  # (N, T, C), (N,)
    teachers = logits.shape[1]
    uniform, ones, corners = np.full(teachers, 1 / teachers), np.ones(teachers), np.eye(teachers)
    calibrated = np.array(
        [_descend(logits[:, [i]], targets, ones[:1], ones[:1])[1][0] for i in range(teachers)]
    )
    starts = [(uniform, temperatures) for temperatures in (ones, calibrated)]
    fitted = [_descend(logits, targets, *start) for start in starts]
    candidates = [*fitted, *starts, *((corner, t) for corner in corners for t in (ones, calibrated))]
    losses = [_log_loss(logits, targets, *candidate)[0] for candidate in candidates]
    weights, temperatures = candidates[int(np.argmin(losses))]
    return Mixture(weights, temperatures, _log_loss(logits, targets, uniform, ones)[0], min(losses))


def _descend(
    logits: NDArray[np.float64],
    targets: NDArray[np.int64],
    weights: NDArray[np.float64],
    temperatures: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """L-BFGS from (weights, temperatures) over u and log T, with w = softmax(u)."""
    from scipy.optimize import minimize
    from scipy.special import softmax

    def value(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        return _log_loss(logits, targets, softmax(x[:count]), np.exp(x[count:]))

    count = logits.shape[1]
    start = np.concatenate([np.log(weights), np.log(temperatures)])
    bounds = [(-15.0, 15.0)] * count + [(np.log(TEMPERATURES[0]), np.log(TEMPERATURES[1]))] * count
    found = minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-13})
    return softmax(found.x[:count]), np.exp(found.x[count:])


def _log_loss(
    logits: NDArray[np.float64],
    targets: NDArray[np.int64],
    weights: NDArray[np.float64],
    temperatures: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """The mixture's mean negative log likelihood, its gradient over u (w = softmax(u)) and log T, (2T,)."""
    from scipy.special import log_softmax, logsumexp

    z = logits / temperatures[:, None]  # (N, T, C)
    log_p = log_softmax(z, axis=-1)
    rows = np.arange(len(z))
    told = log_p[rows, :, targets]  # (N, T) each teacher's log probability of the label
    mixed = logsumexp(told, axis=1, b=weights, keepdims=True)  # (N, 1)
    credit = weights * np.exp(told - mixed)  # (N, T) each teacher's share in the mixture's probability
    excess = z[rows, :, targets] - (np.exp(log_p) * z).sum(-1)  # (N, T) = -d told / d log T
    gradient = np.concatenate([(weights - credit).mean(0), (credit * excess).mean(0)])
    return -float(mixed.mean()), gradient
