"""models/hashed: fixed hashes, padding that changes nothing, and every way a model goes in a run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from llmkd.errors import ModelError
from llmkd.merge import merge_folds
from llmkd.methods.cached import Cached
from llmkd.models.artifact import load_artifact
from llmkd.models.hashed import FACTORS, HashedConfig, HashedForSequenceClassification, hashed
from llmkd.models.hub import register_nets
from llmkd.models.load import init_model, load_classifier, load_tokenizer
from llmkd.models.lora import head_modules, save_trained, trainable_state
from llmkd.objective import HARD
from llmkd.train import fit, predict

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "buckets": 32,
    "embedding_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
IDS = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(0))
ALL = np.arange(24)


def model(seed: int = 0, **more: Any) -> HashedForSequenceClassification:
    torch.manual_seed(seed)
    return HashedForSequenceClassification(HashedConfig(**{**SIZES, "num_labels": 3, **more})).eval()


@torch.no_grad()
def logits(net: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    found: Tensor = net(ids, mask).logits
    return found


def test_hashes_are_those_of_a_plain_formula() -> None:
    ids = [0, 1, 7, 30521, 250_000]
    found = hashed(torch.tensor([ids]), 3, 1000)
    expected = [[(((i + 1) * factor) % 2**32) * 1000 // 2**32 for factor in FACTORS[:3]] for i in ids]
    assert found.tolist() == [expected]


def test_hashes_spread_a_vocabulary_evenly_and_tell_its_tokens_apart() -> None:
    rows = hashed(torch.arange(30522)[None], 2, 8192)[0]  # (V, 2)
    assert len({tuple(pair) for pair in rows.tolist()}) == 30522
    filled = torch.bincount(rows.flatten(), minlength=8192)
    assert (int(filled.min()) > 0, int(filled.max()) < 30) == (True, True)


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_padding_on_either_side_changes_no_logits(kernel_size: int) -> None:
    net = model(kernel_size=kernel_size)
    expected = logits(net, IDS)
    mask = torch.ones_like(IDS)
    for filler in (0, 33):
        beside = torch.full((4, 3), filler)
        right = logits(net, torch.cat([IDS, beside], 1), torch.cat([mask, beside * 0], 1))
        left = logits(net, torch.cat([beside, IDS], 1), torch.cat([beside * 0, mask], 1))
        torch.testing.assert_close(right, expected)
        torch.testing.assert_close(left, expected)


def test_every_token_and_its_place_count() -> None:
    net = model()
    changed, swapped = IDS.clone(), IDS.clone()
    changed[:, 4] = IDS[:, 4] % 60 + 2
    swapped[:, [2, 6]] = IDS[:, [6, 2]]
    for other in (changed, swapped):
        assert ((logits(net, other) - logits(net, IDS)).abs().amax(1) > 1e-4).all()


def test_a_token_is_the_sum_of_its_rows() -> None:
    embedding = model().encoder.embedding
    first, second = hashed(torch.tensor([[11]]), 2, 32)[0, 0].tolist()
    summed = embedding.table.weight[first] + embedding.table.weight[second]
    torch.testing.assert_close(embedding(torch.tensor([[11]]))[0, 0], embedding.project(summed))


def test_the_default_is_within_a_quarter_of_a_million() -> None:
    net = HashedForSequenceClassification(HashedConfig(num_labels=2))
    assert net.num_parameters() <= 250_000
    assert {len(parameter) for parameter in net.classifier.parameters()} == {2}


def made(directory: Path, **more: Any) -> Path:
    settings = {name: value for name, value in SIZES.items() if name != "vocab_size"} | more
    register_nets()
    init_model(
        "llmkd-hashed", settings, tiny.tokenizer(), directory, labels=tiny.LABELS, causal=False, seed=3
    )
    return directory


def load(source: Path) -> Any:
    return load_classifier(str(source), tiny.LABELS, load_in="fp32", pad_id=0)


def test_from_tiny_config_to_merged_artifact(tmp_path: Path) -> None:
    source, examples = made(tmp_path / "init"), tiny.examples(seed=1)
    assert load_tokenizer(str(source)).pad_token_id == 0
    assert head_modules(load(source)) == ["classifier"]
    folds, found = [tmp_path / "one", tmp_path / "two"], []
    for seed, fold in enumerate(folds):
        net = load(source)
        before = predict(net, examples, ALL, 256)
        training = tiny.training(tmp_path, epochs=8, learning_rate=1e-2, seed=seed)
        history = fit(Cached(net, HARD), examples, ALL, training, batch_rows=8, batch_tokens=64)
        assert history["loss"][-1]["loss"] < history["loss"][0]["loss"]
        save_trained(net, trainable_state(net), fold)
        found.append(predict(net, examples, ALL, 256))
        assert np.abs(found[-1] - before).max() > 0.1
        np.testing.assert_array_equal(predict(load(fold), examples, ALL, 256), found[-1])
    merged = merge_folds(load(source), folds)
    states = [load(fold).state_dict() for fold in folds]
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, (states[0][name] + states[1][name]) / 2, msg=name)
    merged.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    artifact, tokenizer = load_artifact(tmp_path / "merged")
    np.testing.assert_array_equal(predict(artifact, examples, ALL, 256), predict(merged, examples, ALL, 256))
    assert artifact.config.id2label == {0: "a", 1: "b", 2: "tie"}
    assert tokenizer("some words")["input_ids"][0] == 1


def test_an_artifact_has_its_logits_in_a_process_that_registered_nothing(tmp_path: Path) -> None:
    """The hashes, too, are the same there: nothing of them is stored."""
    code = f"""
import torch
from llmkd.models.artifact import load_artifact
model, _ = load_artifact({str(made(tmp_path))!r})
print(*model(torch.arange(12).view(1, 12)).logits.flatten().tolist())"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [float(value) for value in other.stdout.split()]
    expected = logits(load(tmp_path).eval(), torch.arange(12).view(1, 12)).flatten()
    torch.testing.assert_close(torch.tensor(found), expected)


@pytest.mark.parametrize("settings", [{"bucket": 9}, {"hashes": 9}, {"kernel_size": 4}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\Ainit: llmkd-hashed [^\n]+\Z"):
        made(tmp_path, **settings)


def test_it_is_no_causal_language_model(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="llmkd-hashed is an encoder; pretrain it with objective: supervised"
    ):
        init_model("llmkd-hashed", {}, tiny.tokenizer(), tmp_path, labels=tiny.LABELS, causal=True, seed=0)
