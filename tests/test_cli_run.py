"""`llmkd run`: which processes it starts, in which order, and how they end. The stages here are stand-ins."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from llmkd.cli import forks, main, processes, run
from llmkd.cli.options import STAGES
from llmkd.config import load

pytestmark = pytest.mark.usefixtures("no_thread_to_wait_for")
# Notes its words, the beginning and the end of its work; ends as a file beside it says, or sleeps till then.
STAND_IN = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__)
def note(**what):
    line = json.dumps({"stage": here.stem, "words": sys.argv[1:], **what}) + "\\n"
    with (here.parent / "notes").open("a") as file:
        file.write(line)
def stop(number, frame):
    note(signal=number)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("words of", here.stem, flush=True)
note(begin=time.time(), threads=os.environ.get("OMP_NUM_THREADS"))
plan = json.loads((here.parent / "plan").read_text()) if (here.parent / "plan").exists() else {}
todo = plan.get(here.stem, {})
time.sleep(todo.get("sleep", 0))
note(end=time.time())
if todo.get("kill"):
    os.kill(os.getpid(), todo["kill"])
sys.exit(todo.get("code", 0))
"""


@pytest.fixture(params=["forks", "processes"])
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Stand-ins for all scripts, in a directory where they leave their notes; as forks, and as processes."""
    for script in STAGES.values():
        (tmp_path / f"{script}.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "script", lambda stage: tmp_path / f"{stage}.py")
    if request.param == "forks" and sys.platform != "linux":
        pytest.skip("stages are forked on Linux alone")
    # what this process has imported, and run, for other tests is no matter to a stand-in
    monkeypatch.setattr(forks, "possible", lambda: request.param == "forks")
    monkeypatch.setattr(forks, "ready", lambda modules: True)
    return tmp_path


def code(*words: str) -> int:
    try:
        main(["run", "--config", str(tiny.CONFIG), *words])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def notes(stages: Path, key: str) -> list[dict[str, Any]]:
    path = stages / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    return [note for note in map(json.loads, lines) if key in note]


def plan(stages: Path, **todo: Any) -> None:
    (stages / "plan").write_text(json.dumps({STAGES[name]: what for name, what in todo.items()}))


def test_all_stages_in_order_with_the_words_given(stages: Path) -> None:
    assert code("seed=5") == 0
    begun = notes(stages, "begin")
    assert [note["stage"] for note in begun] == list(STAGES.values())
    assert all(note["words"] == ["--config", str(tiny.CONFIG), "seed=5"] for note in begun)


def test_without_a_test_part_nothing_is_judged(stages: Path) -> None:
    assert code("task.test=null") == 0
    assert [note["stage"] for note in notes(stages, "begin")] == list(STAGES.values())[:-1]


def test_some_stages_run_in_their_own_order(stages: Path) -> None:
    assert code("merge", "seed=2", "prepare", "03_distill") == 0
    assert [note["stage"] for note in notes(stages, "begin")] == ["00_prepare", "03_distill", "04_merge"]


def test_the_first_failure_ends_the_run_with_its_code(
    stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(stages, teachers={"code": 7})
    assert code("--json") == 7
    assert [note["stage"] for note in notes(stages, "begin")] == ["00_prepare", "01_pretrain", "02_teachers"]
    document = json.loads(capsys.readouterr().out)
    assert [entry["code"] for entry in document["stages"]] == [0, 0, 7]


def test_a_stage_that_was_killed_is_told_as_a_shell_does(stages: Path) -> None:
    plan(stages, prepare={"kill": int(signal.SIGKILL)})
    assert code() == 137


def test_parts_run_side_by_side_before_their_stage(stages: Path) -> None:
    plan(stages, teachers={"sleep": 0.6})
    os.environ.pop("OMP_NUM_THREADS")
    assert code("-j", "2", "teachers") == 0
    begun, ended = notes(stages, "begin"), notes(stages, "end")
    flags = [note["words"][2:] for note in begun]
    parts = [["--teacher", name, "--fold", fold] for name in ("llama", "qwen") for fold in "01"]
    assert sorted(flags[:4]) == parts
    assert flags[4] == []
    assert begun[1]["begin"] < ended[0]["end"] <= begun[2]["begin"]  # two at a time
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [note["threads"] for note in begun] == [share] * 4 + [None]


def test_the_cores_where_the_system_does_not_tell_which_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processes.surroundings(2)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processes.surroundings(2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert processes.surroundings(2)["OMP_NUM_THREADS"] == "5"


def test_parts_of_the_other_stages() -> None:
    config = load(tiny.CONFIG)
    assert run.parts(config, "pretrain") == [["--model", name] for name in ("llama", "qwen", "gemma")]
    assert run.parts(config, "distill") == [["--fold", "0"], ["--fold", "1"]]
    assert run.parts(config, "merge") == []
    single = load(tiny.CONFIG, ["folds.count=1", "views=[in_sample]"])
    assert run.parts(single, "distill") == []


def test_a_stage_s_own_flags_reach_it_alone(stages: Path) -> None:
    assert code("teachers", "distill", "merge", "--fold", "1", "--only", "student") == 0
    assert [note["words"][2:] for note in notes(stages, "begin")] == [
        ["--fold", "1"],
        ["--fold", "1", "--only", "student"],
        [],
    ]


def test_own_flags_choose_among_the_parts_side_by_side(stages: Path) -> None:
    assert code("-j", "2", "teachers", "distill", "--fold", "1", "--only", "baseline") == 0
    words = [note["words"][2:] for note in notes(stages, "begin")]
    assert sorted(words[:2]) == [["--teacher", name, "--fold", "1"] for name in ("llama", "qwen")]
    distill = ["--fold", "1", "--only", "baseline"]
    assert words[2:] == [["--fold", "1"], distill, distill]


@pytest.mark.parametrize("words", [["--fold", "1"], ["merge", "--fold", "1"], ["seed=2", "--fold", "1"]])
def test_a_flag_of_no_named_stage_is_refused(
    stages: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(*words) == 2
    said = "error: --fold 1: name the stage that it is for: llmkd run teachers --fold 1 or llmkd run distill"
    assert capsys.readouterr().err.startswith(said)
    assert not notes(stages, "begin")


def test_every_stage_s_flags_are_known() -> None:
    found = {}
    for name, file in STAGES.items():
        words = re.search(r"^    main\(\w+, __doc__(.*)\)$", run.script(file).read_text(), re.MULTILINE)
        assert words
        found[name] = sorted(re.findall(r'"(\w+)"', words[1]))
    assert found == {name: sorted(run.OWN.get(name, ())) for name in STAGES}


def test_after_a_failed_part_no_further_one_is_started(stages: Path) -> None:
    plan(stages, teachers={"sleep": 0.3, "code": 3})
    assert code("-j", "2", "teachers", "merge") == 3
    assert len(notes(stages, "begin")) == len(notes(stages, "end")) == 2


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_once_to_each_part(
    stages: Path, number: signal.Signals, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(stages, distill={"sleep": 60})

    def later() -> None:
        while len(notes(stages, "begin")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=later)
    thread.start()
    assert code("-j", "2", "distill", "merge") == expected
    thread.join()
    assert [note["signal"] for note in notes(stages, "signal")] == [number, number]
    assert not notes(stages, "end")
    assert "the same command goes on from there" in capsys.readouterr().err


def test_a_launcher_is_found_beside_the_interpreter(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = stages / "bin" / "launcher"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(launcher.parent / "python"))
    assert code("--launch", "launcher --ranks '2 or 3'", "merge") == 0
    assert [note["stage"] for note in notes(stages, "begin")] == ["04_merge"]


def test_a_launcher_that_is_not_there(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("--launch", "nowhere --ranks 2") == 2
    assert capsys.readouterr().err == "error: --launch nowhere: no such command; install it or correct it\n"


@pytest.mark.parametrize(("mode", "reason"), [(0o644, "Permission denied"), (0o755, "Exec format error")])
def test_a_launcher_that_is_no_program(
    stages: Path, mode: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = stages / "launcher"
    launcher.write_text("words\n")
    launcher.chmod(mode)
    assert code("--launch", str(launcher)) == 2
    said = f"error: --launch {launcher}: {reason}; install it or correct it\n"
    assert capsys.readouterr().err == said


def test_without_a_path_the_system_s_own_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    assert processes.surroundings(1)["PATH"].endswith(f"{os.pathsep}{os.defpath}")


def test_json_leaves_stdout_to_one_document(stages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert code("--json", "prepare", "merge") == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert [entry["stage"] for entry in document["stages"]] == ["00_prepare", "04_merge"]
    assert "words of 00_prepare\n" in err


def test_the_scripts_are_found() -> None:
    assert all(run.script(script).is_file() for script in STAGES.values())


def test_bars_are_not_drawn_side_by_side_nor_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert [processes.surroundings(jobs).get("TQDM_DISABLE") for jobs in (1, 2)] == [None, "1"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert processes.surroundings(1)["TQDM_DISABLE"] == "1"
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert processes.surroundings(2)["TQDM_DISABLE"] == "0", "what the user says"


@pytest.mark.parametrize("jobs", ["0", "-2", "two", "1.5"])
def test_a_number_of_jobs_is_at_least_one(
    stages: Path, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code("-j", jobs) == 2
    assert (err := capsys.readouterr().err).startswith(f"error: argument -j/--jobs: {jobs!r} is no number")
    assert err.count("\n") == 1
    assert not notes(stages, "begin")


@pytest.mark.skipif(sys.platform != "linux", reason="children are told of it by Linux alone")
def test_parts_end_where_the_command_itself_is_killed(stages: Path) -> None:
    plan(stages, distill={"sleep": 60})
    script = f"from llmkd.cli import forks, main, run; run.script = lambda stage: f'{stages}/{{stage}}.py'\n"
    script += f"forks.possible = lambda: {forks.possible()}\n"
    script += f"main(['run', '--config', {str(tiny.CONFIG)!r}, '-j', '2', 'distill', 'merge'])"
    command = subprocess.Popen([sys.executable, "-c", script], cwd=tiny.ROOT)
    wait_for(lambda: len(notes(stages, "begin")) == 2)
    command.kill()
    assert command.wait() == -signal.SIGKILL
    wait_for(lambda: len(notes(stages, "signal")) == 2)
    assert [note["signal"] for note in notes(stages, "signal")] == [signal.SIGTERM] * 2
    assert {note["stage"] for note in notes(stages, "begin")} == {"03_distill"}


def test_a_child_whose_parent_ended_before_it_began_ends() -> None:
    child = os.fork()
    if not child:
        processes.mortal(parent=-1)()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)
