"""Several processes for one training: every launcher reaches the loss that one process reaches.

Each test starts real processes on the loopback interface, over gloo.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from safetensors.numpy import load_file

from llmkd import ranks, run

BIN = Path(sys.executable).parent
LIMIT = 240  # seconds; an idle machine needs 20


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(launcher: str, stage: str, *arguments: str) -> list[str]:
    script = [str(tiny.ROOT / "stages" / f"{stage}.py"), "--config", str(tiny.CONFIG), *arguments]
    two = {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
    }
    return [*two[launcher], *script]


def start(argv: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.Popen(
        argv,
        cwd=tiny.ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait(*processes: "subprocess.Popen[str]") -> str:
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    output = "\n".join(outputs)
    assert [process.returncode for process in processes] == [0] * len(processes), output[-5000:]
    return output


def sharded(directory: Path, stage: int) -> Path:
    """The shipped DeepSpeed config; under ZeRO-3 also tensors as small as these are cut up."""
    shipped = tiny.ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    config = json.loads(shipped.read_text())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = directory / shipped.name
    path.write_text(json.dumps(config))
    return path


def begun(finished: Path, directory: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(finished / stage, directory / stage)
    return directory


def cached(path: Path) -> dict[tuple[str, str], Any]:
    table = pq.read_table(path)
    found = [*zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True)]
    assert len(set(found)) == len(found), "a row was counted twice"
    return dict(zip(found, table["logits"].to_pylist(), strict=True))


def same(
    unit: str, one: Path, many: Path, world: int = 2, tolerance: float = 1e-3, strays: float = 0.0
) -> None:
    """Both units hold the same losses, weights and logits. strays: the share of a tensor's numbers that may
    be elsewhere: of a gradient near 0 bf16 leaves either sign, and AdamW takes a whole step for it."""
    mine, theirs = (run.manifest(root / unit) for root in (one, many))
    assert (mine["ranks"], theirs["ranks"]) == (1, world)
    assert mine["fingerprint"] == theirs["fingerprint"]
    assert mine["rows"] == theirs["rows"]
    for history in ("loss", "dev"):
        key = {"loss": "loss", "dev": "dev_log_loss"}[history]
        found = [[entry[key] for entry in manifest["metrics"][history]] for manifest in (mine, theirs)]
        assert found[0] == pytest.approx(found[1], abs=tolerance), history
    logits = [cached(root / unit / "logits.parquet") for root in (one, many)]
    assert logits[0].keys() == logits[1].keys()
    for key, value in logits[0].items():
        np.testing.assert_allclose(logits[1][key], value, atol=20 * tolerance)
    weights = [load_file(root / unit / "adapter" / "adapter_model.safetensors") for root in (one, many)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        far = ~np.isclose(weights[1][name], tensor, rtol=1e-7, atol=tolerance)
        assert far.mean() <= strays, name
    assert any("score" in name for name in weights[0])


@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_reaches_the_one_process_loss_fold_after_fold(
    zero: int, finished: Path, tmp_path: Path
) -> None:
    """Two ranks, several micro-batches a step, two folds and a baseline over one model."""
    directory = begun(finished, tmp_path, "00_prepare", "01_pretrain", "02_teachers")
    options = [f"run={directory}", f"distill.deepspeed={sharded(tmp_path, zero)}", "distill.batch_tokens=500"]
    wait(start(command("deepspeed", "03_distill", *options, "--only", "student")))
    for fold in (0, 1):
        same(f"03_distill/gemma/fold{fold}", finished, directory)
    assert tiny.stage("03_distill", f"run={directory}") == 0  # the baseline, by one process
    assert tiny.stage("04_merge", f"run={directory}") == 0


def test_zero_1_as_torchrun_starts_it(finished: Path, tmp_path: Path) -> None:
    directory = begun(finished, tmp_path, "00_prepare", "01_pretrain")
    options = [f"run={directory}", f"teachers.llama.deepspeed={sharded(tmp_path, 1)}", "--fold", "1"]
    wait(start(command("torchrun", "02_teachers", *options)))  # the second teacher is plain DDP
    for name in ("llama", "qwen"):
        same(f"02_teachers/{name}/fold1", finished, directory)


@pytest.mark.slow
def test_zero_3_in_one_process_over_a_bf16_base(finished: Path, tmp_path: Path) -> None:
    """Plain python has no launcher's variables, and what is loaded in bf16 stays so when it is cut up."""
    roots = []
    for name, more in (("plain", []), ("zero3", [f"distill.deepspeed={sharded(tmp_path, 3)}"])):
        directory = begun(finished, tmp_path / name, "00_prepare")
        for stage in ("01_pretrain", "02_teachers"):  # in bf16 too: an input of another precision is refused
            if more:
                shutil.copytree(roots[0] / stage, directory / stage)
            else:
                assert tiny.stage(stage, f"run={directory}", "precision=bf16") == 0
        options = [f"run={directory}", "precision=bf16", "--fold", "0", "--only", "student", *more]
        if more:
            wait(start(command("python", "03_distill", *options)))
        else:
            assert tiny.stage("03_distill", *options) == 0
        roots.append(directory)
    same("03_distill/gemma/fold0", *roots, world=1, tolerance=2e-3, strays=0.01)


def test_pretraining_under_zero_3_leaves_whole_models(finished: Path, tmp_path: Path) -> None:
    """The first rank alone merges an adapter and makes the next model, while the other waits."""
    zero = sharded(tmp_path, 3)
    lora = ["pretrain.1.lora.r=4", "pretrain.1.lora.dropout=0"]
    options = [f"pretrain.{phase}.deepspeed={zero}" for phase in (0, 1)] + lora
    roots = [begun(finished, tmp_path / name, "00_prepare") for name in ("one", "two")]
    assert tiny.stage("01_pretrain", f"run={roots[0]}", *lora) == 0
    wait(start(command("deepspeed", "01_pretrain", f"run={roots[1]}", *options)))
    for name in ("llama", "qwen", "gemma"):
        one, two = (load_file(root / "01_pretrain" / name / "model" / "model.safetensors") for root in roots)
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            np.testing.assert_allclose(two[key], tensor, atol=1e-3, err_msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("zero", "at", "again"),
    [
        pytest.param(0, "2", "python", marks=pytest.mark.slow),
        (3, "2", "torchrun"),
        pytest.param(3, "whole", "torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_training_of_two_ranks_goes_on_after_a_kill(
    zero: int, at: str, again: str, finished: Path, tmp_path: Path
) -> None:
    """By as many ranks, or by one; under ZeRO-3 its optimizer's state is saved whole, and no pickle."""
    directory = begun(finished, tmp_path, "00_prepare", "01_pretrain")
    options = [f"run={directory}", "teachers.qwen.checkpoint_minutes=0", "--teacher=qwen", "--fold=1"]
    options += [f"teachers.qwen.deepspeed={sharded(tmp_path, zero)}"] if zero else []
    argv = command("torchrun", "02_teachers", *options)
    script = next(i for i, word in enumerate(argv) if word.endswith(".py"))
    killer = str(tiny.ROOT / "tests" / "faults" / "killed_stage.py")
    process = start([*argv[:script], killer, at, *argv[script:]])
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    (saved,) = (directory / "02_teachers/qwen/fold1.partial/checkpoint/fit0").glob("step*")
    assert int(saved.name[4:13]) == (2 if at == "2" else 3)
    wait(start(command(again, "02_teachers", *options)))
    same("02_teachers/qwen/fold1", finished, directory, world=1 if again == "python" else 2)


def test_two_agents_stand_for_two_nodes(finished: Path, tmp_path: Path) -> None:
    directory = begun(finished, tmp_path, "00_prepare", "01_pretrain", "02_teachers")
    script = command("python", "03_distill", f"run={directory}", "--only", "student")[1:]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agents = [
        [str(BIN / "torchrun"), "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *meeting]
        for node in range(2)
    ]
    wait(*(start([*agent, *script]) for agent in agents))
    for fold in (0, 1):
        same(f"03_distill/gemma/fold{fold}", finished, directory)


def test_evaluation_on_two_ranks_counts_every_row_once(finished: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(directory / "06_evaluate")
    output = wait(start(command("torchrun", "06_evaluate", f"run={directory}")))
    assert len(re.findall("^quantized_tta ", output, re.MULTILINE)) == 1, "one rank alone speaks"
    one, two = (json.loads((root / "06_evaluate/metrics.json").read_text()) for root in (finished, directory))
    for name in ("student", "merged", "quantized", "quantized_tta"):
        assert two[name]["rows"] == 40
        assert two[name]["log_loss"] == pytest.approx(one[name]["log_loss"], abs=1e-5)
    tables = [pq.read_table(root / "06_evaluate" / "predictions.parquet") for root in (finished, directory)]
    assert tables[0]["id"].equals(tables[1]["id"])


def test_an_error_ends_every_rank(tmp_path: Path) -> None:
    argv = command("torchrun", "03_distill", f"run={tmp_path}")
    process = start(argv)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert "run: python stages/00_prepare.py" in output
    assert '03_distill.py", line' not in output, "no traceback of ours"


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world(), ranks.is_main()) == (0, 1, True)
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    ranks.start()
    ranks.barrier()
    ranks.stop()


def test_a_rank_is_told_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (ranks.rank(), ranks.world(), ranks.is_main()) == (3, 8, False)


def test_plain_python_gets_the_five_variables_that_deepspeed_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    ranks._single_rank_environment()
    assert [os.environ[name] for name in names[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert 0 < int(os.environ["MASTER_PORT"]) < 65536
    monkeypatch.setenv("RANK", "1")
    ranks._single_rank_environment()
    assert os.environ["RANK"] == "1"
