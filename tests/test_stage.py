"""What all stages' scripts share: their command line under any launcher, and how `make` calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import STAGES

from llmkd import stage
from llmkd.config import parse

HEAVY = {"torch", "transformers", "peft", "deepspeed", "bitsandbytes", "gptqmodel", "datasets", "pandas"}
DEEPSPEED = sorted((tiny.ROOT / "configs" / "deepspeed").glob("*.json"))


def test_no_stage_s_help_imports_anything_heavy() -> None:
    said = f"""
import runpy, sys
for name in {STAGES}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"{tiny.ROOT}/stages/{{name}}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name
print(*sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", said], check=True, capture_output=True, text=True).stdout
    assert found.count("usage:") == len(STAGES)
    assert "llmkd.stage" in found.split()
    assert not HEAVY & set(found.split())


def test_the_deepspeed_launcher_puts_its_own_word_first() -> None:
    words = ["--local_rank=1", "--config", str(tiny.CONFIG), "--fold", "1", "seed=5", "--fold=0"]
    config, arguments = stage.parse("a stage", ["fold", "only"], words)
    assert (config.seed, arguments.fold, arguments.only) == (5, ["1", "0"], [])


def test_a_stage_ends_without_its_process_group() -> None:
    """A ZeRO-3 process that leaves with it may abort after its work is done."""
    from torch import distributed

    with stage.telling():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert not distributed.is_initialized()


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_an_adapter_is_drawn_from_the_seed_alone(kind: str, tmp_path: Path) -> None:
    """Ranks and stages, which have drawn other numbers before, must start alike."""
    from llmkd.loading import load_model
    from llmkd.models.lora import trainable_state

    tokenizer = tiny.tokenizer()
    tiny.causal_lm(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = f"""
run: {tmp_path}/run
task: {{kind: {kind}, train: rows.jsonl, max_tokens: 32}}
teachers: [{{name: teacher, model: {tmp_path}}}]
student: {{name: student, model: {tmp_path}, lora: {{r: 2}}}}
quantize: null
"""
    more = {"classification": ["task.labels=[a, b]"], "causal_lm": ["distill.method=sequence"]}[kind]

    def start(before: int, *overrides: str) -> dict[str, torch.Tensor]:
        config = parse(said, [*more, *overrides])
        torch.manual_seed(before)
        return trainable_state(load_model(config, config.student, str(tmp_path), ["a", "b"], "fp32")[0])

    one, same, other = start(1), start(2), start(1, "seed=9")
    drawn = [name for name in one if "lora_A" in name]
    assert drawn
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def planned(tmp_path: Path, *words: str) -> list[str]:
    """The stages that `make` would start, each with its own flags, in order."""
    (tmp_path / "installed").touch()
    python = Path(sys.executable)
    own = [
        f"BIN={python.parent}",
        f"INSTALLED={tmp_path}/installed",
        "LAUNCH=launch",
        f"CONFIG={tiny.CONFIG}",
    ]
    argv = ["make", "-n", *own, *words]
    made = subprocess.run(argv, cwd=tiny.ROOT, check=True, capture_output=True, text=True)
    ours = f" --config {tiny.CONFIG} seed=2"
    lines = [line for line in made.stdout.splitlines() if line.startswith("launch stages/")]
    assert all(ours in line for line in lines)
    return [line.removeprefix("launch stages/").replace(".py", "").replace(ours, "") for line in lines]


def test_make_starts_the_stages_in_order(tmp_path: Path) -> None:
    assert planned(tmp_path, "evaluate", "ARGS=seed=2") == list(STAGES)


def test_make_j_starts_models_teachers_and_folds_before_their_stage(tmp_path: Path) -> None:
    """Also those that no file stands for: a bare `.SECONDARY:` in the Makefile would have them left out."""
    found = planned(tmp_path, "-j2", "distill", "ARGS=seed=2")
    expected = {
        "00_prepare": set[str](),
        "01_pretrain": {"--model llama", "--model qwen", "--model gemma"},
        "02_teachers": {f"--teacher {name} --fold {fold}" for name in ("llama", "qwen") for fold in (0, 1)},
        "03_distill": {"--fold 0", "--fold 1"},
    }
    assert [line for line in found if "--" not in line] == list(expected)
    for name, parts in expected.items():
        whole = found.index(name)
        assert set(found[whole - len(parts) : whole]) == {f"{name} {part}" for part in parts}


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_a_shipped_deepspeed_config_compiles_no_optimizer(path: Path) -> None:
    """DeepSpeed's own Adams are compiled at first use, for 40 seconds; torch's is there already."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert "optimizer" not in settings
    assert settings["torch_adam"] is True
    assert settings["zero_allow_untested_optimizer"] is True
