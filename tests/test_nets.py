"""The small nets: sizes from the spec, exact arithmetic, and every step a transformers model goes through."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmkd import features
from llmkd.errors import ModelError
from llmkd.merge import merge_folds
from llmkd.models import layers, nets

FEATURES: dict[str, Any] = {
    "numeric": ["x", "y"],
    "categorical": ["job", "town"],
    "steps": {"bill": ["b1", "b2", "b3"], "paid": ["p1", "p2", "p3"]},
}
SMALL: dict[str, dict[str, Any]] = {
    "llmkd-mlp": {"hidden_sizes": [32, 32], "dropout": 0.5, "input_dropout": 0.2},
    "llmkd-tabular": {"hidden_sizes": [16], "embedding": 4, "heads": 2, "frequencies": 3},
    "llmkd-tabular-transformer": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8},
}
LABELS = ["no", "yes"]


def table(count: int = 40) -> pa.Table:
    random = np.random.default_rng(0)
    names = ["x", "y", "b1", "b2", "b3", "p1", "p2", "p3"]
    return pa.table(
        {
            **{name: random.normal(size=count) for name in names},
            "job": random.choice(["", "clerk", "baker"], count),
            "town": random.choice(["bath", "york", "hull"], count),
            "image": [random.integers(0, 256, 12, dtype=np.uint8).tobytes() for _ in range(count)],
        }
    )


def spec_of(architecture: str) -> features.Spec:
    if architecture == "llmkd-mlp":
        return features.fit(table(), image={"column": "image", "shape": [4, 3]})
    return features.fit(table(), FEATURES)


def examples(architecture: str) -> Any:
    rows = table()
    labels = (rows["x"].to_numpy() > 0).astype(np.int64)
    return features.examples(rows, spec_of(architecture), [f"row{i}" for i in range(40)], labels)


def net(architecture: str, directory: Path, seed: int = 1, **more: Any) -> Any:
    settings = {**SMALL[architecture], **more}
    nets.register()
    nets.init_net(architecture, settings, spec_of(architecture), directory, LABELS, seed)
    return AutoModelForSequenceClassification.from_pretrained(directory).eval()


def logits(model: Any, architecture: str) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**examples(architecture).inputs(np.arange(40))).logits)


@pytest.mark.parametrize("architecture", SMALL)
def test_a_net_is_made_from_its_spec_and_comes_back(architecture: str, tmp_path: Path) -> None:
    model = net(architecture, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "config.json",
        "features.json",
        "model.safetensors",
    ]
    assert features.load(tmp_path / "a") == spec_of(architecture)
    assert model.config.id2label == dict(enumerate(LABELS))
    found = logits(model, architecture)
    assert found.shape == (40, 2)
    assert float(found.std(0).min()) > 0.01  # rows differ
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(logits(again, architecture), found)
    assert torch.equal(logits(net(architecture, tmp_path / "c"), architecture), found)
    assert not torch.equal(logits(net(architecture, tmp_path / "d", seed=2), architecture), found)


@pytest.mark.parametrize("architecture", SMALL)
def test_every_input_moves_the_logits(architecture: str, tmp_path: Path) -> None:
    model = net(architecture, tmp_path)
    inputs = examples(architecture).inputs(np.arange(40))
    with torch.no_grad():
        before = model(**inputs).logits
        for name, values in inputs.items():
            for at in np.ndindex(*values.shape[1:]):
                changed = values.clone()
                changed[(slice(None), *at)] = 1 - changed[(slice(None), *at)].clamp(0, 1)
                assert not torch.equal(model(**{**inputs, name: changed}).logits, before), (name, at)


@pytest.mark.parametrize("architecture", SMALL)
def test_the_mean_of_folds_is_that_of_their_weights(architecture: str, tmp_path: Path) -> None:
    one, two = (net(architecture, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    merged = merge_folds(net(architecture, tmp_path / "3", seed=3), [tmp_path / "1", tmp_path / "2"])
    for name, value in merged.state_dict().items():
        expected = (one.state_dict()[name] + two.state_dict()[name]) / 2
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("architecture", SMALL)
def test_a_net_learns_through_the_one_training_step(architecture: str, tmp_path: Path) -> None:
    from llmkd.methods.cached import Cached
    from llmkd.objective import HARD
    from llmkd.train import dev_log_loss, fit

    still = {"input_dropout": 0} if architecture == "llmkd-mlp" else {}
    model = net(architecture, tmp_path / "a", dropout=0, **still)
    some, rows = examples(architecture), np.arange(40)
    before = dev_log_loss(model, some, rows, 64, "fp32")
    training = tiny.training(tmp_path / "t", epochs=30, learning_rate=1e-2)
    fit(Cached(model, HARD), some, rows, training, batch_rows=40, batch_tokens=64)
    assert dev_log_loss(model, some, rows, 64, "fp32") < before / 2


def test_an_mlp_is_what_its_formula_says(tmp_path: Path) -> None:
    model = net("llmkd-mlp", tmp_path)
    pixels = examples("llmkd-mlp").inputs(np.arange(5))["pixels"]
    weights = list(model.state_dict().values())
    hidden = pixels.reshape(5, 12)
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        hidden = (hidden @ weight.T + bias).clamp_min(0)
    torch.testing.assert_close(model(pixels=pixels).logits, hidden @ weights[-2].T + weights[-1])


def test_two_heads_and_which_of_them_speaks(tmp_path: Path) -> None:
    inputs = examples("llmkd-tabular").inputs(np.arange(40))
    found = {}
    for take in ("hard", "soft", "mean"):
        model = net("llmkd-tabular", tmp_path / take, take=take)
        heads = model.head_logits(**inputs)
        assert list(heads) == ["hard", "soft"]
        found[take] = model(**inputs).logits
    assert torch.equal(found["hard"], heads["hard"])
    assert torch.equal(found["soft"], heads["soft"])
    assert not torch.equal(heads["hard"], heads["soft"])
    mean = (heads["hard"].softmax(-1) + heads["soft"].softmax(-1)) / 2
    torch.testing.assert_close(found["mean"], mean.log())
    assert net("llmkd-tabular", tmp_path / "two").config.take == "mean"
    one = net("llmkd-tabular", tmp_path / "one", heads=1)
    assert one.config.take == "hard"
    assert list(one.head_logits(**inputs)) == ["hard"]


def test_categories_of_equal_number_have_vectors_of_their_own() -> None:
    row = layers.Row(0, [2, 3], embedding=4)
    first = row(None, torch.tensor([[1, 1]]))[0]
    assert row.embedding is not None
    assert torch.equal(first, torch.cat([row.embedding.weight[1], row.embedding.weight[3]]))


def test_waves_are_sines_and_cosines_of_learnt_frequencies() -> None:
    waves = layers.Waves(2, 500, spread=3.0)
    torch.manual_seed(0)
    layers.begin(waves)
    numbers = torch.tensor([[0.3, -1.2]])
    angles = 2 * np.pi * numbers[0, :, None] * waves.frequencies  # (2, 500)
    expected = torch.cat([torch.sin(angles), torch.cos(angles)], 1).flatten()
    torch.testing.assert_close(waves(numbers)[0], expected)
    assert 2.7 < float(waves.frequencies.detach().std()) < 3.3


def test_the_order_of_the_steps_matters(tmp_path: Path) -> None:
    model = net("llmkd-tabular-transformer", tmp_path)
    inputs = examples("llmkd-tabular-transformer").inputs(np.arange(40))
    turned = {**inputs, "steps": inputs["steps"].flip(1)}
    assert not torch.allclose(model(**inputs).logits, model(**turned).logits, atol=1e-3)


def test_first_activations_keep_the_size_of_their_inputs() -> None:
    torch.manual_seed(0)
    body = layers.stack(500, [500, 500], 0.0, norm=False)
    body.apply(layers.begin)
    found = body(torch.randn(200, 500))
    assert 0.8 < float(found.detach().square().mean()) < 1.2  # He et al.: the second moment is kept


def test_registering_twice_changes_nothing() -> None:
    nets.register()
    nets.register()
    for name, (config, _) in nets.NETS.items():
        assert isinstance(AutoConfig.for_model(name), config)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        (
            "llmkd-cnn",
            {},
            "no net 'llmkd-cnn'; there are llmkd-mlp, llmkd-tabular, llmkd-tabular-transformer",
        ),
        ("llmkd-mlp", {"layers": 2}, "has no setting 'layers'; it has hidden_sizes, dropout, input_dropout"),
        ("llmkd-mlp", {"pixels": 2}, "has no setting 'pixels'"),
        ("llmkd-mlp", {"hidden_sizes": "big"}, "hidden_sizes"),
        ("llmkd-tabular", {"heads": 3}, "heads 3, take 'hard': set heads to 1 or 2"),
        ("llmkd-tabular", {"take": "soft"}, "heads 1, take 'soft'"),
        ("llmkd-tabular-transformer", {"hidden_size": 10}, "hidden_size 10 does not divide into 4 heads"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    architecture: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        nets.init_net(architecture, settings, spec_of(architecture), tmp_path, LABELS, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nets_refuse_rows_of_another_kind(tmp_path: Path) -> None:
    for architecture, other in (("llmkd-mlp", "llmkd-tabular"), ("llmkd-tabular", "llmkd-mlp")):
        with pytest.raises(ModelError, match=f"{architecture} does not read"):
            nets.init_net(architecture, {}, spec_of(other), tmp_path, LABELS, 1)
    numbers = features.fit(table(), {"numeric": ["x"]})
    with pytest.raises(ModelError, match=r"reads time steps; name some in task.features.steps"):
        nets.init_net("llmkd-tabular-transformer", {}, numbers, tmp_path, LABELS, 1)
    nets.register()
    nets.init_net("llmkd-tabular", {}, numbers, tmp_path, LABELS, 1)
    assert json.loads((tmp_path / "config.json").read_text())["numbers"] == 1
