"""The loss of sequence distillation with and without the logits: seconds and peak memory, side by side.

    python benchmarks/sequence_loss.py [--tokens 2048] [--hidden 512] [--vocab 256000] [--rounds 2]

Each way runs in a process of its own, in turn (plain, chunked, plain, chunked, ...), so that neither finds
the other's memory. A pass is forward and backward, to the student's hidden states and head; CE + T² KL
against one teacher at T = 2, float32, CPU. Memory is what the pass adds to the process at its peak (VmHWM,
Linux). The plain way is what one writes with torch: whole logits, cross_entropy and kl_div.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

WAYS = ("plain", "chunked")


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    asked = parser.parse_args()
    if asked.way:
        return print(json.dumps(measure(asked)))
    needed, free = 7.3 * 4 * asked.tokens * asked.vocab, available()
    if free < needed:
        sys.exit(
            f"the plain way needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take fewer --tokens"
        )
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(asked.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append(json.loads(lines.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
    report(found, asked)


def report(found: dict[str, list[dict[str, float]]], asked: argparse.Namespace) -> None:
    print(f"{asked.tokens} tokens, hidden {asked.hidden}, vocabulary {asked.vocab}, {asked.threads} threads")
    middle = {
        way: {name: median(run[name] for run in runs) for name in runs[0]} for way, runs in found.items()
    }
    print(f"{'way':10}{'seconds':>9}{'CPU':>8}{'peak extra MB':>15}{'loss':>12}")
    for way, run in middle.items():
        print(f"{way:10}{run['seconds']:9.1f}{run['cpu']:8.1f}{run['mb']:15.0f}{run['loss']:12.5f}")
    plain, chunked = middle["plain"], middle["chunked"]
    speed, memory = plain["seconds"] / chunked["seconds"], chunked["mb"] / plain["mb"]
    print(f"chunked against plain: {speed:.2f} of the speed, {memory:.3f} of the memory")


def measure(asked: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    hidden, teacher = (torch.randn(asked.tokens, asked.hidden) for _ in range(2))
    weight, theirs = (torch.randn(asked.vocab, asked.hidden).mul_(0.05) for _ in range(2))
    targets = torch.randint(asked.vocab, (asked.tokens,))
    loss_of = {"plain": plain, "chunked": chunked(asked.chunk)}[asked.way]
    loss_of(hidden[:64].clone().requires_grad_(), weight.requires_grad_(), targets[:64], teacher[:64], theirs)
    hidden.requires_grad_()
    before = reset_peak()
    began, worked = time.perf_counter(), time.process_time()
    loss = loss_of(hidden, weight, targets, teacher, theirs)
    loss.backward()
    seconds = time.perf_counter() - began
    cpu = time.process_time() - worked
    assert weight.grad is not None
    return {
        "seconds": round(seconds, 2),
        "cpu": round(cpu, 2),
        "mb": round(peak() - before),
        "loss": loss.item(),
    }


def plain(hidden, weight, targets, teacher, theirs, temperature=2.0):  # type: ignore[no-untyped-def]
    from torch.nn.functional import cross_entropy, kl_div

    logits, wanted = hidden @ weight.T, teacher @ theirs.T  # (N, V)
    log_q, log_p = (logits / temperature).log_softmax(-1), (wanted / temperature).log_softmax(-1)
    soft = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return cross_entropy(logits, targets) + temperature**2 * soft


def chunked(chunk):  # type: ignore[no-untyped-def]
    from llmkd.chunked import CHUNK, chunked_loss
    from llmkd.models.head import Head
    from llmkd.objective import Objective

    objective = Objective({"ce": 1.0, "kl": 1.0}, ["teacher"], [1.0], [2.0], normalize=False)

    def loss_of(hidden, weight, targets, teacher, theirs):  # type: ignore[no-untyped-def]
        pairs = [(teacher, Head(theirs))]
        loss, _ = chunked_loss(hidden, Head(weight), targets, objective, pairs, chunk=chunk or CHUNK)
        return loss.mean()

    return loss_of


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Most memory this process has held since it was reset, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def available() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


if __name__ == "__main__":
    main()
