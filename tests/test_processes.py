"""Processes that outlive what started them, and what is written when nobody reads it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkd import interrupt
from llmkd.cli import processes

# waits to be asked to stop, in the middle of something, and tells by how it was
WAITS = """
import sys, time
from pathlib import Path
from llmkd import interrupt
with interrupt.heard(), interrupt.deferred():
    Path(sys.argv[1]).write_text("ready")
    until = time.monotonic() + float(sys.argv[2])
    while interrupt.asked() is None and time.monotonic() < until:
        time.sleep(0.01)
    print("what is still told")
    print("of both kinds", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(str(interrupt.asked()))
"""


def wait_for(path: Path, texts: tuple[str, ...], seconds: float = 60) -> str:
    until = time.monotonic() + seconds
    while (found := path.read_text() if path.exists() else "") not in texts:
        assert time.monotonic() < until, found
        time.sleep(0.01)
    return found


def test_a_step_goes_on_where_nobody_reads_what_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS, str(tmp_path / "said"), "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(tmp_path / "said", ("ready",))
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    process.terminate()
    assert process.wait(60) == 0
    assert (tmp_path / "said").read_text() == str(int(signal.SIGTERM))


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"LOCAL_RANK": "0"}, "None"),
        ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, str(int(signal.SIGTERM))),
    ],
    ids=["a rank from a shell", "a rank of torchrun's"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="a launcher is looked for in /proc")
def test_a_rank_is_asked_to_stop_by_its_launcher_s_end_alone(
    variables: dict[str, str], asked: str, tmp_path: Path
) -> None:
    """What started it ends once it is ready: a shell may, under nohup, and a launcher may not."""
    said = tmp_path / "said"
    script = f"{sys.executable} -c '{WAITS}' {said} 3 & until [ -e {said} ]; do sleep 0.05; done; kill -9 $$"
    subprocess.run(["sh", "-c", script], env={**os.environ, **variables}, capture_output=True)
    assert wait_for(said, ("None", str(int(signal.SIGTERM)))) == asked


def group(script: str, directory: Path) -> list[str]:
    return ["sh", "-c", f"cd {directory}; {script}"]


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")
def test_what_a_failed_launcher_leaves_is_waited_for(tmp_path: Path) -> None:
    script = "(sleep 1; touch saved) & exit 3"
    assert processes.abreast([group(script, tmp_path)], 1, False, processes.start) == 3
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")
def test_a_third_signal_ends_what_heard_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "SAME", 0.2)
    deaf = processes.start(group("trap '' TERM INT; touch ready; sleep 60", tmp_path), os.environ, False)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    again = subprocess.Popen(["sh", "-c", f"for i in 1 2; do sleep 0.4; kill -TERM {os.getpid()}; done"])
    began = time.monotonic()
    try:
        processes.stop([deaf], signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        again.wait()
    assert time.monotonic() - began < 30
    assert deaf.returncode == -signal.SIGKILL
