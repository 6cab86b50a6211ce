"""The text methods under DeepSpeed: two ranks reach what one process reaches, with LoRA."""

import json
from pathlib import Path

import pytest
import tiny
from test_ranks import begun, command, same, sharded, start, wait

TWO_LAYERS = ["student.init.config.num_hidden_layers=2", "student.init.config.layer_types=null"]
PAIR = "{teacher: llama, teacher_layer: 1, student_layer: 1}"
PEER = (
    "peers=[{name: peer, init: {architecture: llama, config: {hidden_size: 16, intermediate_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 128}, "
    "tokenizer: {vocab_size: 330}}, lora: {r: 2, alpha: 4, dropout: 0}}]"
)
WAYS = {
    "online": (3, ["distill.method=online"], []),
    "feature": (
        2,
        ["distill.method=feature", f"distill.features=[{PAIR}]", "distill.feature_at=pooled"],
        [],
    ),
    "self_distillation": (2, ["distill.method=self_distillation"], TWO_LAYERS),
    "mutual": (3, ["distill.method=mutual", PEER], []),
}


@pytest.mark.parametrize(
    "way", ["online", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "online")]
)
def test_two_ranks_reach_one_process(way: str, finished: Path, tmp_path: Path) -> None:
    zero, options, models = WAYS[way]
    one = begun(finished, tmp_path / "one", "00_prepare", "01_pretrain", "02_teachers")
    if models or way == "mutual":
        assert tiny.stage("01_pretrain", f"run={one}", *options, *models) == 0
    two = begun(one, tmp_path / "two", "00_prepare", "01_pretrain", "02_teachers")
    told = [*options, *models, "distill.epochs=1", "distill.baseline=false", "distill.batch_tokens=500"]
    assert tiny.stage("03_distill", f"run={one}", *told, "--fold", "0") == 0
    engine = f"distill.deepspeed={sharded(tmp_path, zero)}"
    wait(start(command("deepspeed", "03_distill", f"run={two}", *told, engine, "--fold", "0")))
    same("03_distill/gemma/fold0", one, two)


def test_models_are_sharded_when_loaded_and_an_online_teacher_is_frozen(
    finished: Path, tmp_path: Path
) -> None:
    """Under ZeRO-3 each of two ranks holds half of it, and none of it whole but while it computes."""
    run = begun(finished, tmp_path / "run", "00_prepare", "01_pretrain", "02_teachers")
    told = [f"run={run}", "distill.method=online", "distill.epochs=1", "distill.baseline=false", "--fold=0"]
    argv = command("torchrun", "03_distill", *told, f"distill.deepspeed={sharded(tmp_path, 3)}")
    script = next(i for i, word in enumerate(argv) if word.endswith(".py"))
    watcher = str(tiny.ROOT / "tests" / "watched_teacher.py")
    wait(start([*argv[:script], watcher, str(tmp_path), *argv[script:]]))
    for rank in (0, 1):
        loaded = json.loads((tmp_path / f"loaded{rank}.json").read_text())
        assert loaded == {"gemma": True, "llama": True, "qwen": True}
        looks = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(looks) > 4
        for look in looks:
            assert look["sharded"]
            assert "AVAILABLE" not in look["states"]  # NOT_, or INFLIGHT: asked for ahead of the forward
            assert look["whole"] == 0
            assert look["numbers"] / 2 <= look["shards"] <= look["numbers"] / 2 + look["count"]
            assert (look["learn"], look["modes"]) == (0, [False])
