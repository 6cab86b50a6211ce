"""Every command in README.md and docs/ is held against what would run it: its script, flags, config,
overrides and targets must be there. test_docs_run.py executes them. Links and messages are checked too.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import tiny

from llmkd import cli
from llmkd.cli.run import chosen
from llmkd.config import load
from llmkd.errors import ConfigError
from llmkd.stage import parse
from llmkd.tracking import Track, record

PAGES = [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
QUOTED = re.compile(r"\*\*`(.+?)`\*\*", re.DOTALL)  # a message
PROGRAMS = ("make", "python", "llmkd", "torchrun", "deepspeed")
BEGINS = rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)}) "  # a command of ours
OTHERS = {  # programs that are not ours, and how they are called
    "pip": r"install (wandb|mlflow|tensorboard)",
    "wandb": r"login|sync .*",
    "mlflow": r"ui --backend-store-uri sqlite:///.*",
    "tensorboard": r"--logdir \S+",
    "scontrol": r"show hostnames .*",
    "ls": r"runs/demo",
    "head": r"-n 1\)",
    "cat": r"\S+",
    "source": r"(completion bash\))?",  # <(...)
    "complete": r"-p llmkd",
    "echo": r".*",
    "printf": r".*",
    "python": r"-?",
}
STAND_INS = ("messages.yaml", "reviews.yaml", "answers.yaml", "CONFIG", "my.yaml")  # a reader's own
ASSIGNED = re.compile(r"[A-Z][A-Z0-9_]*=")


def scripts(text: str) -> list[str]:
    """What a page has a shell run, in its order: its shell blocks, its `$` lines, its inline code; but for
    what is shown to fail."""
    found = [
        (block.start(), script) for block in BLOCK.finditer(text) for script in of_block(*block.groups())
    ]
    for other in (BLOCK, QUOTED):
        text = other.sub(lambda match: " " * len(match[0]), text)
    for line in re.finditer(rf"`({BEGINS}[^`]+)`", text):
        found.append((line.start(), " ".join(line[1].split())))
    return [script for _, script in sorted(found, key=lambda one: one[0])]


def of_block(language: str, block: str) -> list[str]:
    if language in ("bash", "sh"):
        return [block]
    if language not in ("console", ""):
        return []
    lines = re.findall(r"^\$ (.*)$(?!\nerror: )", block, re.MULTILINE)
    return (
        lines
        if language
        else lines + re.findall(rf"^({BEGINS}.*)$", block.replace("\\\n", " "), re.MULTILINE)
    )


def failing(text: str) -> list[tuple[str, str]]:
    """The commands that a page shows to fail, and what they are shown to say."""
    return re.findall(r"^\$ (.*)\n((?:error: .*\n)+)", text, re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page, as words."""
    for script in scripts(text):
        yield from parted(script)


def parted(block: str) -> Iterator[list[str]]:
    block = re.sub(r"<<'?(\w+)'?.*?\n\1$", "", block, flags=re.DOTALL | re.MULTILINE)  # here-documents
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) & set("<>") and set(word) <= set("<>&"):
                next(lexer)  # a file
            elif set(word) <= set(";|&"):
                yield from [words] if words else []
                words = []
            else:
                words.append(word)
        yield from [words] if words else []


ALL = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", ALL)
def test_a_command_would_be_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.ROOT)  # paths in a config are relative to where a stage is started
    understood(words)


def understood(words: list[str]) -> None:
    while ASSIGNED.match(words[0]):
        words = words[1:]
    words[0] = re.sub(r"^\w+=\$\(", "", words[0])
    words = [str(tiny.CONFIG) if word in STAND_INS else word for word in words]
    program = words[0].removeprefix(".venv/bin/")
    scripts = [i for i, word in enumerate(words) if word.startswith("stages/")]
    if scripts:
        stage_parses(words[scripts[0]], words[scripts[0] + 1 :])
    elif program == "make":
        make_knows(words[1:])
    elif program == "llmkd":
        llmkd_parses(words[1:])
    elif program in ("torchrun", "deepspeed"):  # named without a script
        assert all(word.startswith("--") or word.isdigit() for word in words[1:]), words
    elif program == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words
    elif program == "python" and words[1:2] == ["-c"]:
        ast.parse(words[2])
    elif program == "python" and len(words) > 1 and words[1] != "-":
        script_knows(words[1], words[2:])
    else:
        assert re.fullmatch(OTHERS.get(program, "(?!)"), " ".join(words[1:]), re.DOTALL), words


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("llmkd run --confg messages.yaml", SystemExit),
        ("llmkd run --config messages.yaml polish", ConfigError),
        ("llmkd train --config messages.yaml", KeyError),
        ("llmkd status --config messages.yaml distill.epocs=3", ConfigError),
        ("python stages/02_teachers.py --config configs/demo.yaml --folds 1", SystemExit),
        ("python stages/03_distil.py --config configs/demo.yaml", FileNotFoundError),
        ("torchrun stages/03_distill.py --config configs/none.yaml", ConfigError),
        ("python -m llmkd.verfy runs/demo", AssertionError),
        ("python benchmarks/soak.py --deaths 3", AssertionError),
        ("make demonstration", AssertionError),
        ("make evaluate ARGS='seed=x'", ConfigError),
        ("pip install everything", AssertionError),
    ],
)
def test_a_wrong_command_is_found(
    line: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.ROOT)
    (words,) = parted(line)
    with pytest.raises(error):
        understood(words)


def filled(words: list[str]) -> list[str]:
    """`task.train=...` stands for a file."""
    return [re.sub(r"=\.\.\.$", "=rows.parquet", word) for word in words if word != "..."]


def stage_parses(script: str, words: list[str]) -> None:
    source = (tiny.ROOT / script).read_text(encoding="utf-8")
    flags = re.search(r"^    main\(\w+, __doc__(.*)\)$", source, re.MULTILINE)
    assert flags, script
    parse("", re.findall(r'"(\w+)"', flags[1]), filled(words))


def llmkd_parses(words: list[str]) -> None:
    if len(words) == 1:  # named without what it is to do
        assert words[0] in (*cli.COMMANDS, "--help", "--version")
        return
    arguments = cli.tree()[1][words[0]].parse_intermixed_args(filled(words[1:]))
    if path := getattr(arguments, "config", None):
        given = [*getattr(arguments, "overrides", []), *getattr(arguments, "words", [])]
        config = load(path, [word for word in given if "=" in word])
        if words[0] == "run":
            chosen([word for word in given if "=" not in word], config)


def make_knows(words: list[str]) -> None:
    makefile = (tiny.ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    given = dict(word.split("=", 1) for word in words if ASSIGNED.match(word))
    for word in words:
        assert word in targets or word.startswith("-") or ASSIGNED.match(word), f"make {word}: no such target"
    if "CONFIG" in given or "ARGS" in given:
        config = given.get("CONFIG", "configs/demo.yaml")
        load(str(tiny.CONFIG) if config in STAND_INS else config, filled(given.get("ARGS", "").split()))


def script_knows(script: str, words: list[str]) -> None:
    source = (tiny.ROOT / script).read_text(encoding="utf-8")
    for shared in re.findall(r"^from (\w+) import", source, re.MULTILINE):  # by the benchmarks, flags too
        if (beside := tiny.ROOT / "benchmarks" / f"{shared}.py").exists():
            source += beside.read_text(encoding="utf-8")
    for word in words:
        assert not word.startswith("--") or f'"{word.split("=")[0]}"' in source, f"{script} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    names = re.findall(r"(?<![\w/])((?:configs|stages|benchmarks|tests|docs)/[\w/.-]+\.\w+)", text)
    missing += [name for name in names if not (tiny.ROOT / name).exists()]
    assert not missing


def test_a_message_that_is_explained_is_one_that_is_said() -> None:
    page = (tiny.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = [
        text
        for folder in ("llmkd", "stages")
        for path in (tiny.ROOT / folder).rglob("*.py")
        for text in strings(path)
    ]
    said += [
        "Extra inputs are not permitted",
        "Field required",
        "Input should be a valid string",
    ]  # pydantic's
    said += [os.strerror(28)]
    quoted = [" ".join(message.split()) for message in QUOTED.findall(page)]
    assert len(quoted) > 40
    unsaid = []
    for message in quoted:
        parts = re.split(r"\S*(?:[A-Z]{2}|\b[A-Z]\b|['\d=]|\.\.\.)\S*", message)  # between what is filled in
        words = max((part.strip(" .:;()").split() for part in parts), key=len)
        runs = [" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))]
        if not any(run in text for run in runs for text in said):
            unsaid.append(message)
    assert not unsaid


def strings(path: Path) -> Iterator[str]:
    """Every string of a file, what is filled in left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_the_reference_s_plan_is_what_the_page_s_own_words_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.ROOT)
    text = (tiny.ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert found
    exec(compile(found[1], "docs/plan.md", "exec"), {})
    assert capsys.readouterr().out.strip() == found[2].strip()
    hours = float(found[2].split("in all")[1].split()[3])
    assert f"{hours / 24:.1f} days" in text, "beside the published 15"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_shell_block_is_one_that_bash_reads(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in ("bash", "sh"):
            found = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
            assert (found.returncode, found.stderr) == (0, ""), block


# In SLURM's place: srun runs its words, scontrol names hosts, the others tell how they are called.
SLURM = {
    "srun": 'exec "$@"',
    "scontrol": '[ "$1 $2" = "show hostnames" ] && printf "node7\\nnode8\\n"',
    "torchrun": 'echo torchrun "$@"',
    "python": 'echo python "$@"',
}


def test_the_slurm_scripts_run_on_stand_ins(tmp_path: Path) -> None:
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = (tiny.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    scripts = [block for _, block in BLOCK.findall(text) if "#SBATCH" in block]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]"}
    called = []
    for script in scripts:
        assert script.startswith("#!/bin/bash\n#SBATCH "), "sbatch reads what comes before the first command"
        asked = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
        known = r"--(nodes|ntasks-per-node|gpus-per-node|gpus|array|time|signal)=\S+"
        assert all(re.fullmatch(known, word) for line in asked for word in line.split())
        done = subprocess.run(
            ["bash", "-eu"], input=script, env=environment, capture_output=True, text=True, check=True
        )
        called.append(done.stdout.split())
    assert [words[0] for words in called] == ["torchrun", "python"]
    assert "node7:29500" in called[0]
    assert called[1][-4:] == ["--teacher", "qwen2-72b", "--fold", "3"]


@pytest.mark.slow
def test_tensorboard_shows_what_a_run_left(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "demo"
    record(Track("tensorboard", place, "06_evaluate", {}), {"student": {"log_loss": 0.9}})
    (command,) = [
        words
        for words in commands((tiny.ROOT / "docs" / "tracking.md").read_text(encoding="utf-8"))
        if words[0] == "tensorboard"
    ]
    program = [str(Path(sys.executable).with_name("tensorboard")), *command[1:], "--port", "0"]
    server = subprocess.Popen(
        program, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        until = time.monotonic() + 60
        tags: dict[str, object] = {}
        while not tags and time.monotonic() < until:  # it reads in the background
            with urlopen(f"{address}data/plugin/scalars/tags") as answer:
                tags = json.load(answer)
        assert list(tags["06_evaluate"]) == ["student/log_loss"]  # type: ignore[call-overload]
    finally:
        server.terminate()
        server.wait()
