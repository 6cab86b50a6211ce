"""The command `llmkd`: words, flags, exit codes, and what each command hands on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from llmkd import parser
from llmkd.cli import COMMANDS, main
from llmkd.errors import ModelError

DEMO = str(tiny.ROOT / "configs" / "demo.yaml")
HEAVY = ("numpy", "pyarrow", "pydantic", "yaml", "torch", "transformers", "pandas", "tqdm")


def code(*words: str) -> int:
    """The exit code of one command line."""
    try:
        main(words)
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert code(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_help_imports_nothing_heavy() -> None:
    said = "import sys; from llmkd.cli import tree; tree()[0].format_help(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", said], check=True, capture_output=True, text=True)
    assert not set(HEAVY) & set(found.stdout.split())


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("--help") == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out or f"\n    {name}\n" in out for name in COMMANDS)
    assert code() == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(name, "--help") == 0
    assert f"usage: llmkd {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["statu"], "no command 'statu'; did you mean status?; see llmkd --help"),
        (["xyz"], "no command 'xyz'; there are init, plan, run"),
        (["run"], "the following arguments are required: --config/-c; see llmkd run --help"),
        (["run", "-c", "x", "--jbs", "2"], "unrecognized arguments: --jbs; did you mean --jobs?"),
        (["export", "x", "-o", "y", "--format", "pdf"], "argument --format: invalid choice: 'pdf'"),
        (["run", "--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["status", "--config", DEMO, "folds.count=0"], "folds.count = 0: Input should be"),
        (["run", "--config", DEMO, "distil"], "no stage 'distil'; did you mean distill?"),
        (["verify", "nowhere"], "nowhere: no finished unit here; name a run directory"),
        (
            ["predict", "a", "b", "-o", "c", "--column", "text"],
            "--column 'text': write --column FIELD=COLUMN",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_2(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert error in err
    assert err.count("\n") == 1


def test_every_fault_of_a_config_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("status", "--config", DEMO, "folds.count=0", "seed=-1") == 2
    assert [line.startswith("error: ") for line in capsys.readouterr().err.splitlines()] == [True, True]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for the modules that the commands hand on to; each call with its arguments."""
    found: list[Any] = []

    def stand_in(name: str, answer: Any) -> Any:
        def called(*words: Any, **settings: Any) -> Any:
            print("a library's own words")
            found.append((name, words, settings))
            return answer

        return called

    modules = {
        "predicting": {
            "predict_file": {"rows": 3, "latency": {"p50": 0.123456}},
            "evaluate_file": {"ece": 0.5},
        },
        "planning": {"plan": {"memory": 5}, "table": "memory  5"},
        "reporting": {"write_report": Path("runs/x/report.html")},
        "export": {"export_onnx": {"bytes": 7}, "export_hub": {"files": ["a"]}},
    }
    for module, functions in modules.items():
        stand = SimpleNamespace(**{name: stand_in(name, answer) for name, answer in functions.items()})
        monkeypatch.setattr(f"llmkd.{module}", stand, raising=False)
        monkeypatch.setitem(sys.modules, f"llmkd.{module}", stand)
    return found


DEFAULTS = {
    "tta": None,
    "calibrated": True,
    "batch_tokens": 16384,
    "precision": "fp32",
    "columns": {},
    "max_tokens": None,
    "trust_remote_code": False,
}


def test_predict_hands_on_its_flags(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert code("predict", "model", "rows.csv", "-o", "out.parquet") == 0
    assert "rows: 3\nlatency:\n  p50: 0.1235\n" in capsys.readouterr().out
    flags = ["--tta", "swap", "--no-calibration", "--batch-tokens", "64", "--precision", "bf16"]
    columns = ["--column", "text=Review = body", "--column", "id=Nr."]
    assert code("predict", "model", *flags, "rows.csv", "-o", "out.parquet", *columns) == 0
    files = (Path("model"), "rows.csv", Path("out.parquet"))
    changed = {"tta": "swap", "calibrated": False, "batch_tokens": 64, "precision": "bf16"}
    changed["columns"] = {"text": "Review = body", "id": "Nr."}
    assert calls == [
        ("predict_file", files, DEFAULTS),
        ("predict_file", files, {**DEFAULTS, **changed}),
    ]


def test_evaluate_hands_on_its_flags(calls: list[Any]) -> None:
    assert code("evaluate", "model", "--data", "x.csv", "--label", "who won?") == 0
    assert calls == [("evaluate_file", (Path("model"), "x.csv"), {"label": "who won?", **DEFAULTS})]


def test_json_is_one_document_and_words_go_to_stderr(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code("evaluate", "model", "--data", "x.csv", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ece": 0.5}
    assert err == "a library's own words\n"


def test_report_export_and_plan(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "report", "runs/x") == {"report": "runs/x/report.html"}
    assert document(capsys, "export", "model", "-o", "out") == {"bytes": 7}
    assert document(capsys, "export", "runs/x", "-o", "out", "--format", "hub") == {"files": ["a"]}
    words = ["plan", "--config", DEMO, "--devices", "2", "seed=7", "--memory-gb", "24"]
    assert document(capsys, *words) == {"memory": 5}
    assert [name for name, *_ in calls[:3]] == ["write_report", "export_onnx", "export_hub"]
    assert calls[0][1] == (Path("runs/x"), None)
    name, (config,), settings = calls[3]
    assert (name, config.seed) == ("plan", 7)
    assert settings == {"devices": 2, "memory_gb": 24.0, "tflops": 312, "efficiency": 0.4, "rows": {}}


def test_a_library_error_is_told_as_one(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*words: Any, **settings: Any) -> None:
        raise ModelError("model: not a classifier; name another directory")

    monkeypatch.setattr(sys.modules["llmkd.predicting"], "evaluate_file", refuse)
    assert code("evaluate", "model", "--data", "x.csv") == 2
    assert capsys.readouterr().err == "error: model: not a classifier; name another directory\n"


def test_schema_is_a_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"run", "task", "teachers"} <= set(schema["properties"])
    assert document(capsys, "schema") == schema


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "llmkd.cli", "schema"],
        ["-m", "llmkd.cli", "run", "--config", str(tiny.CONFIG), "prepare"],
        ["stages/00_prepare.py", "--config", str(tiny.CONFIG)],
    ],
)
def test_a_reader_that_has_enough_ends_it_without_a_word(words: list[str], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    own = [f"run={tmp_path}"] if "--config" in words else []
    command = [sys.executable, *words, *own]
    found = subprocess.run(command, cwd=tiny.ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, "")


def test_another_broken_pipe_is_no_reader_that_has_enough(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError, match="a worker's"), parser.while_read():
        raise BrokenPipeError("a worker's")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_flags_and_stages(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*COMMANDS, "distill", "jobs"))
    assert document(capsys, "completion", shell)["script"] + "\n" == script


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["st"], {"status"}),
        (["run", "dis"], {"distill"}),
        (["run", "--j"], {"--jobs", "--json"}),
        (["predict", "--tta", ""], {"swap", "none"}),
        (["completion", "f"], {"fish"}),
        (["predict", "--output", "x"], set()),
    ],
)
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes(line: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code("completion", "bash") == 0
    script = capsys.readouterr().out
    words = " ".join(f"'{word}'" for word in ["llmkd", *line])
    ask = f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(line)}; _llmkd; echo ${{COMPREPLY[@]}}"
    found = subprocess.run(["bash", "-c", ask], check=True, capture_output=True, text=True)
    assert set(found.stdout.split()) == expected
