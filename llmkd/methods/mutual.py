"""Peers that teach each other while they learn (Deep Mutual Learning, arXiv 1706.00384)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.errors import ModelError
from llmkd.losses import kl
from llmkd.methods.online import Beside
from llmkd.models.pooling import autocast, class_logits
from llmkd.objective import Objective


class Mutual(nn.Module):
    """Σ_k [objective(z_k) + weight · mean over j ≠ k of T² KL(softmax(z_j/T) || softmax(z_k/T))].

    The others' logits are detached, so each of the K >= 2 peers gets the gradient of its own loss (the
    paper's equations 7 and 8, which have T = 1). The first peer is `student` and reads `inputs`; another
    reads `beside[name]`, or else `inputs` too. The objective's terms, with teachers or without, are every
    peer's.
    """

    def __init__(
        self,
        peers: Mapping[str, nn.Module],
        objective: Objective,
        temperature: float = 4.0,
        precision: str = "fp32",
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if len(peers) < 2:
            raise ModelError(f"mutual learning among {list(peers)}: add a peer, it takes two")
        self.names = list(peers)
        self.student, *others = peers.values()
        self.others = nn.ModuleList(others)
        self.objective, self.temperature = objective, temperature
        self.precision, self.weight = precision, weight

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def peers(self) -> dict[str, nn.Module]:
        return dict(zip(self.names, [self.student, *self.others], strict=True))

    def forward(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        beside: Beside | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        read = {**(beside or {}), self.names[0]: inputs}
        with autocast(self.precision, labels.device):
            logits = {
                name: class_logits(peer, **read.get(name, inputs)) for name, peer in self.peers.items()
            }  # {peer: (B, C)}
        losses, parts = list[Tensor](), dict[str, Tensor]()
        for name, own in logits.items():
            loss, terms = self.objective(own, labels, teacher_logits)
            others = [z.detach() for other, z in logits.items() if other != name]
            mutual = torch.stack([kl(own, z, self.temperature) for z in others]).mean(0)  # (B,)
            losses.append(loss + self.weight * mutual)
            parts |= {f"{name}/{term}": part for term, part in {**terms, "mutual": mutual}.items()}
        return torch.stack(losses).sum(0), parts
