"""One process or many: what a stage needs to know of the launcher that started it.

python, torchrun and deepspeed all leave RANK and WORLD_SIZE in the environment; without them there is
one rank. Nothing here imports torch before `start` finds more than one.
"""

import os
from pathlib import Path
from typing import Any

JOB = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")  # after the user, the name of DeepSpeed's shared memory


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def start(deepspeed: str | None = None) -> None:
    """Join the process group. Under DeepSpeed this must come before any model is built (ZeRO-3)."""
    import torch

    if torch.cuda.is_available():  # else every rank of a node would load its model on the first device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if deepspeed:
        _single_rank_environment()
        import deepspeed as engine

        engine.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    elif world() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _single_rank_environment() -> None:
    """Plain `python` with a DeepSpeed config: without these five, DeepSpeed looks for MPI."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def _grouped() -> bool:
    if world() == 1:
        return False
    import torch

    return bool(torch.distributed.is_initialized())


def barrier() -> None:
    if _grouped():
        import torch

        torch.distributed.barrier()


def gather(item: Any) -> list[Any]:
    """Every rank's item, in rank order, on every rank."""
    if not _grouped():
        return [item]
    import torch

    items: list[Any] = [None] * world()
    torch.distributed.all_gather_object(items, item)
    return items


def most(number: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if not _grouped():
        return number
    import torch

    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor(number, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def stop() -> None:
    """Leave the process group; without it a ZeRO-3 process may abort at exit after its work is done."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # DeepSpeed on CPUs reduces through shared memory, 69 MB a rank, and leaves it there
        name = "_".join([str(os.getuid()), *(os.environ.get(key, "") for key in JOB)])
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{name}").unlink(missing_ok=True)
