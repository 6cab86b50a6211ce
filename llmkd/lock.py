"""One process at a unit: a lock that ends with its process, however that ends.

A POSIX record lock: the kernel drops it at kill -9 too, children do not inherit it, and shared file
systems carry it from node to node. What the file says is for people only.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkd.errors import RunError

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the unit `directory` while the block runs. Raises RunError naming who holds it already."""
    path = directory.with_name(directory.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(path, directory)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: whoever waits for this inode looks again
        os.close(handle)


def _acquire(path: Path, directory: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(f"{path}: this disk knows no locks; see that only one process works here", flush=True)
                return handle
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RunError(
                f"{directory}: held by {holder}; wait for it, or end it and run this again"
            ) from None
        if _is_still(path, handle):
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %Z")}
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(who).encode(), 0)
            return handle
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    """Whether the locked file still bears the name: its last holder may just have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 4096, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):  # its holder is about to write who it is
        return "another process"
