"""Commands as processes side by side: their environment, how they are stopped, how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

STDERR = 2  # its file descriptor
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


class Child(Protocol):
    """A process that was started, the first of its group: a `subprocess.Popen`, or a fork."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str], bool], Child]


def abreast(commands: Sequence[Sequence[str]], jobs: int, quiet: bool, start: Start) -> int:
    """Run commands, `jobs` at a time. The exit code of the first that failed, else 0.

    After a failure no further one is started, and those that run come to their end. `quiet` sends their
    stdout to stderr. A signal is passed on once, as a child takes a second one for "at once".
    """
    from llmkd import interrupt
    from llmkd.errors import Stopped

    environment = surroundings(jobs if len(commands) > 1 else 1)
    waiting, running, failed = list(commands), list[Child](), 0
    try:
        while running or (waiting and not failed):
            while waiting and len(running) < jobs and not failed:
                with interrupt.deferred():  # a signal now would lose sight of the child
                    running.append(start(waiting.pop(0), environment, quiet))
                if number := interrupt.asked():
                    raise Stopped(number)
            ended = [child for child in running if _is_over(child)]
            running = [child for child in running if child not in ended]
            failed = failed or next((exit_code(child) for child in ended if child.returncode), 0)
            time.sleep(0 if ended else 0.05)
    except Stopped as stopped:
        stop(running, stopped.signal)
        raise
    return failed


def surroundings(jobs: int) -> dict[str, str]:
    """The environment of each of `jobs` processes: its share of the cores; no progress bar where several
    would write over one another, or into a file."""
    beside, path = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    found = {**os.environ, "PATH": f"{beside}{os.pathsep}{path}"}
    if jobs > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    if jobs > 1 or not sys.stderr.isatty():
        found.setdefault("TQDM_DISABLE", "1")
    return found


def cores() -> int:
    """Those that this process may use, or where the system does not tell (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(command: Sequence[str], environment: Mapping[str, str], quiet: bool) -> subprocess.Popen[bytes]:
    """In a process group of its own, or a terminal's Ctrl-C would reach it from there and from here."""
    from llmkd.errors import ConfigError

    adopt_orphans()

    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=STDERR if quiet else None,
            process_group=0,
            preexec_fn=mortal(os.getpid()) if sys.platform == "linux" else None,
        )
    except OSError as error:
        reason = "no such command" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"--launch {command[0]}: {reason}; install it or correct it") from None


def mortal(parent: int) -> Callable[[], None]:
    """What a child calls before it becomes its command: it is sent SIGTERM when `parent` ends, however that
    ends, so that it saves what can be gone on with. Linux watches the thread that starts it: the main one."""
    import ctypes

    libc = ctypes.CDLL(None)  # loaded here: between fork and exec little may be done

    def bound() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended just before
            os.kill(os.getpid(), signal.SIGTERM)

    return bound


def adopt_orphans() -> None:
    """Processes whose parent ends are this one's from now on (Linux): a launcher's ranks that outlive it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stop(running: Sequence[Child], number: int) -> None:
    """Pass a signal on until all have ended: of a launcher its ranks, too, as one may pass nothing on
    (`deepspeed` on one node) and end while they save. A child takes a second one, seconds later, for "at
    once"; a third ends by force what heard neither."""
    from llmkd import interrupt

    asked = list[float]()

    def pass_on(number: int, frame: object = None) -> None:
        now = time.monotonic()
        if not asked or now - asked[-1] >= interrupt.SAME:
            asked.append(now)
        for child in running:
            if child.returncode is None or _some_are_left(child.pid):
                with suppress(ProcessLookupError, PermissionError):  # ended (macOS has the second of zombies)
                    os.killpg(child.pid, number if len(asked) < 3 else signal.SIGKILL)

    for each in interrupt.SIGNALS:
        signal.signal(each, pass_on)
    pass_on(number)
    for child in running:
        child.wait()
        while _some_are_left(child.pid):
            time.sleep(0.05)


def _is_over(child: Child) -> bool:
    """Whether a process has ended, and where it failed its whole group: a launcher's ranks may still save."""
    return child.poll() is not None and (child.returncode == 0 or not _some_are_left(child.pid))


def _some_are_left(group: int) -> bool:
    """Of a process group whose first process has ended: those of them that are this process's children.

    torchrun's ranks are in groups of their own; it waits for them itself.
    """
    try:
        os.waitpid(-group, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def exit_code(child: Child) -> int:
    """As a shell tells it: 128 and the signal for one that a signal ended."""
    code = child.returncode or 0
    return 128 - code if code < 0 else code
