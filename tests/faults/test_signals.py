"""Real processes that are asked to stop: what they say, how they end, where the next one goes on."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from conftest import STAGES
from test_ranks import BIN, command, start

from llmkd import run

LIMIT = 240  # seconds; an idle machine needs 10
Process = subprocess.Popen[str]


def words(directory: Path) -> list[str]:
    """One fold of stage 02, in a training of thousands of steps that saves each."""
    long = ["teachers.qwen.checkpoint_minutes=0", "teachers.qwen.epochs=20000"]
    return [f"run={directory}", "--teacher=qwen", "--fold=0", *long]


def begin(directory: Path, world: int) -> list[Process]:
    """The stage's ranks, as a launcher would start them."""
    script = [sys.executable, str(tiny.ROOT / "stages" / "02_teachers.py"), "--config", str(tiny.CONFIG)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place["WORLD_SIZE"] = str(world)
    return [
        subprocess.Popen(
            [*script, *words(directory)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def unfinished(directory: Path) -> Path:
    return directory / "02_teachers" / "qwen" / "fold0.partial"


def saved(directory: Path) -> int:
    """The last step that is saved; 0 before the first."""
    steps = (int(path.name[4:13]) for path in unfinished(directory).glob("checkpoint/fit0/step*"))
    return max(steps, default=0)


def stopped(told: str, number: signal.Signals) -> int:
    """How to go on, said once and without a traceback. Returns the step that was saved."""
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if "stopped by" in line]
    assert line.startswith(f"stopped by {number.name}: step ")
    assert line.endswith("is saved; the same command goes on from there")
    return int(line.split("step ")[1].split()[0])


def test_ranks_that_are_asked_to_stop_save_and_one_process_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks of which one hears SIGTERM, then one process that hears Ctrl-C. While the two are at it
    another process is told who they are, and touches nothing."""
    for stage in STAGES[:2]:
        shutil.copytree(finished / stage, tmp_path / stage)
    two = begin(tmp_path, world=2)
    try:
        until = time.monotonic() + LIMIT
        while saved(tmp_path) < 3 and not any(process.poll() for process in two):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert tiny.stage("02_teachers", *words(tmp_path)) == 2
        held = f"error: {tmp_path}/02_teachers/qwen/fold0: held by process {two[0].pid} on "
        assert held in capsys.readouterr().err
        two[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=LIMIT)[1] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [143, 143]
    step = stopped("".join(told), signal.SIGTERM)
    assert "stopped by" in told[0], "the first rank speaks for all"

    seen, over, until = list[int](), threading.Event(), time.monotonic() + LIMIT

    def later() -> None:
        while (last := saved(tmp_path)) <= step and time.monotonic() < until and not over.wait(0.005):
            seen.append(last)
        if not over.is_set():  # also after the limit: nothing else ends that training
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=later)
    thread.start()
    try:
        assert tiny.stage("02_teachers", *words(tmp_path)) == 130
    finally:
        over.set()
        thread.join()
    assert time.monotonic() < until
    assert set(seen) <= {0, step}, "it went on, and did not begin again"  # 0: between two files
    assert stopped(capsys.readouterr().err, signal.SIGINT) > step
    assert unfinished(tmp_path).exists()
    assert not (tmp_path / "02_teachers" / "qwen" / "fold0" / run.MANIFEST).exists()


def asked(argv: list[str], directory: Path, ask: Callable[[int], None]) -> tuple[int, str]:
    """Two ranks under a launcher, which is asked to stop once they have saved: its code, all it told."""
    process = start(argv)
    try:
        until = time.monotonic() + LIMIT
        while saved(directory) < 3 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        before = saved(directory)
        ask(process.pid)
        told, _ = process.communicate(timeout=LIMIT)  # when all that hold its output have ended
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (line,) = [line for line in told.splitlines() if "stopped by SIGTERM: step" in line]
    assert int(line.split("step ")[1].split()[0]) == saved(directory) >= before >= 3
    assert "Error" not in told.split(line)[0], "no rank was ended in the middle of its step"
    return process.returncode, told


@pytest.mark.parametrize(
    ("launcher", "ask"),
    [("torchrun", os.killpg), ("torchrun", os.kill), ("deepspeed", os.killpg), ("deepspeed", os.kill)],
    ids=["torchrun, its group", "torchrun alone", "deepspeed, its group", "deepspeed alone"],
)
def test_a_launcher_s_ranks_save(
    launcher: str, ask: Callable[[int, int], None], finished: Path, tmp_path: Path
) -> None:
    """Asked with the whole process group, as a scheduler or a terminal asks, ranks are asked again by their
    launcher; alone, deepspeed asks none. Launchers have an exit code of their own."""
    for stage in STAGES[:2]:
        shutil.copytree(finished / stage, tmp_path / stage)
    argv = command(launcher, "02_teachers", *words(tmp_path))
    code, _ = asked(argv, tmp_path, lambda pid: ask(pid, signal.SIGTERM))
    assert code != 0


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_llmkd_run_waits_for_a_launcher_s_ranks_and_has_the_signal_s_code(
    launcher: str, finished: Path, tmp_path: Path
) -> None:
    """They have all ended when it ends: the same command may follow at once."""
    for stage in STAGES[:2]:
        shutil.copytree(finished / stage, tmp_path / stage)
    argv = command(launcher, "02_teachers")
    words_of_launcher = shlex.join(argv[: next(at for at, word in enumerate(argv) if word.endswith(".py"))])
    own = [str(BIN / "llmkd"), "run", "--config", str(tiny.CONFIG), "teachers"]
    left = list[int]()

    def ask(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        left.extend(run_by(tmp_path))

    code, told = asked([*own, "--launch", words_of_launcher, *words(tmp_path)], tmp_path, ask)
    assert code == 143
    assert not left
    assert told.count("the same command goes on from there") == 2, "the first rank, and the command"


def run_by(directory: Path) -> Iterator[int]:
    """The processes whose command line names a directory."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            if f"run={directory}".encode() in path.read_bytes():
                yield int(path.parent.name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_trainings_ends_the_stage_by_its_code(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is half done there: what is finished is kept, and said so."""

    def asked(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("llmkd.mapped.write", asked)
    assert tiny.stage("00_prepare", f"run={tmp_path}") == code
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"stopped by {number.name}: finished work is kept; the same command goes on from there"
    assert not (tmp_path / "00_prepare").exists()
