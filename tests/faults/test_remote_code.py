"""Python code that comes with a checkpoint: run by the word `trust_remote_code` of its model, else never."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import STAGES

from llmkd import cli, run
from llmkd.models.artifact import load_artifact
from llmkd.models.hub import say_trusted
from llmkd.models.load import load_causal_lm, load_classifier, load_tokenizer
from llmkd.planning import lookup

MODEL = """
from pathlib import Path
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2Model
from transformers import Gemma2PreTrainedModel

Path({ran!r}).touch()

class OwnConfig(Gemma2Config):
    model_type = "own"

class OwnForSequenceClassification(Gemma2ForSequenceClassification):
    config_class = OwnConfig

    def __init__(self, config):
        Gemma2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Gemma2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

class OwnForCausalLM(Gemma2ForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({ran!r}).touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
WORD = "student.trust_remote_code=true"


def errors(captured: str) -> list[str]:
    return [line for line in captured.splitlines() if line.startswith("error: ")]


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code there before it runs it."""
    directory = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked on a terminal says yes
    say_trusted.cache_clear()


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that is there once a checkpoint's code was run."""
    return tmp_path / "ran"


@pytest.fixture
def own(finished: Path, tmp_path: Path, ran: Path) -> Path:
    """A checkpoint whose config, model and tokenizer are classes of its own."""
    path = Path(shutil.copytree(finished / "01_pretrain" / "gemma" / "model", tmp_path / "own"))
    (path / "modeling_own.py").write_text(MODEL.format(ran=str(ran)))
    (path / "tokenization_own.py").write_text(TOKENIZER.format(ran=str(ran)))
    kinds = ("Config", "ForSequenceClassification", "ForCausalLM")
    autos = ("AutoConfig", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
    names = {auto: f"modeling_own.Own{kind}" for auto, kind in zip(autos, kinds, strict=True)}
    changed(path / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=names)
    tokenizer = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    changed(path / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)
    return path


def test_what_is_not_trusted_is_refused_and_nothing_of_it_is_run(own: Path, ran: Path) -> None:
    loads = {
        "AutoTokenizer": lambda: load_tokenizer(str(own)),
        "AutoConfig": lambda: load_classifier(str(own), tiny.LABELS, load_in="fp32", pad_id=0),
    }
    for kind, load in loads.items():
        with pytest.raises(run.RunError.__base__, match=r"none is run unasked; .*\Z") as refused:
            load()
        assert str(refused.value).startswith(f"{own}: {kind} cannot load it: it needs Python code that comes")
        assert "then set trust_remote_code: true beside its model:" in str(refused.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("loads", "kind"),
    [
        (lambda path: load_tokenizer(path, trust_remote_code=True), "OwnTokenizer"),
        (
            lambda path: load_classifier(path, tiny.LABELS, load_in="fp32", pad_id=0, trust_remote_code=True),
            "OwnForSequenceClassification",
        ),
        (lambda path: load_causal_lm(path, load_in="bf16", trust_remote_code=True), "OwnForCausalLM"),
    ],
)
def test_with_the_word_each_part_is_its_own(
    loads: Any, kind: str, own: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type(loads(str(own))).__name__ == kind
    assert ran.exists()
    said = [line for line in capsys.readouterr().out.splitlines() if "trust_remote_code" in line]
    assert said == [f"{own}: trust_remote_code: true, so Python code that comes with it may be run"]


def test_code_that_fails_is_one_line(own: Path) -> None:
    (own / "modeling_own.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(run.RunError.__base__, match=r"own: AutoConfig cannot load it: .*no_such_module.*\Z"):
        load_causal_lm(str(own), load_in="fp32", trust_remote_code=True)


@pytest.fixture
def packed(finished: Path, tmp_path: Path, ran: Path) -> Path:
    """A quantized artifact of a known architecture, beside which code lies that its config names."""
    path = Path(shutil.copytree(finished / "05_quantize" / "model", tmp_path / "packed"))
    (path / "modeling_own.py").write_text(MODEL.format(ran=str(ran)))
    kind = "AutoModelForSequenceClassification"
    changed(path / "config.json", auto_map={kind: "modeling_own.OwnForSequenceClassification"})
    return path


def test_a_known_packed_model_is_unpacked_without_the_code_beside_it(packed: Path, ran: Path) -> None:
    model, _ = load_artifact(packed)
    assert type(model).__name__ == "Gemma2ForSequenceClassification"
    assert not ran.exists()
    model, _ = load_artifact(packed, trust_remote_code=True)
    assert type(model).__name__ == "OwnForSequenceClassification"
    assert ran.exists()


def test_a_packed_model_s_code_lies_in_its_directory_or_is_refused(packed: Path) -> None:
    kind = "AutoModelForSequenceClassification"
    changed(packed / "config.json", auto_map={kind: "someone/elsewhere--modeling_own.Own"})
    with pytest.raises(run.RunError.__base__, match=r"packed: its auto_map names someone/.*beside it\Z"):
        load_artifact(packed, trust_remote_code=True)
    changed(packed / "config.json", auto_map={kind: "modeling_own.Own"})
    (packed / "modeling_own.py").write_text("raise ArithmeticError('of its own')\n")
    with pytest.raises(run.RunError.__base__, match=r"packed cannot be loaded: ArithmeticError: of its"):
        load_artifact(packed, trust_remote_code=True)


def test_a_plan_runs_no_code(tmp_path: Path, ran: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(MODEL.format(ran=str(ran)))
    names = {"AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae", "auto_map": names}))
    with pytest.raises(run.RunError.__base__, match="cannot be counted"):
        lookup.named(str(tmp_path))
    assert not ran.exists()


def words(directory: Path, own: Path, *more: str) -> list[str]:
    return [f"run={directory}", "student.init=null", f"student.model={own}", *more]


def test_a_run_refuses_by_a_line_that_names_the_remedy(
    own: Path, ran: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another model is trusted: a word is of one model."""
    before = tiny.snapshot(copy)
    for more in ([], ["teachers.llama.trust_remote_code=true"]):
        assert tiny.stage("01_pretrain", *words(copy, own, "--model=gemma", *more)) == 2
        (error,) = errors(capsys.readouterr().err)
        assert str(own) in error
        assert "set trust_remote_code: true beside its model:" in error
        assert tiny.snapshot(copy) == before
    assert not ran.exists()


def test_a_run_with_the_word_from_a_checkpoint_to_predictions(
    own: Path, ran: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretrained, distilled, merged, quantized, judged; the artifact holds the code and its card says so."""
    directory = tmp_path / "run"
    for stage in STAGES[:3]:
        shutil.copytree(finished / stage, directory / stage)
    brief = ["distill.baseline=false", "distill.epochs=1", "pretrain.0.epochs=0.5"]
    asked = words(directory, own, WORD, *brief)
    assert tiny.stage("01_pretrain", *asked, "--model=gemma") == 0
    assert f"{own}: trust_remote_code: true" in capsys.readouterr().out
    assert run.manifest(directory / "01_pretrain" / "gemma")["settings"]["trust_remote_code"] is True
    ran.unlink()
    shutil.rmtree(own)  # a unit of the run is all that is read from here on
    own.mkdir()
    for stage in STAGES[3:]:
        assert tiny.stage(stage, *asked) == 0, stage
    assert ran.exists()
    merged, artifact = (directory / stage / "model" for stage in ("04_merge", "05_quantize"))
    for path in (merged, artifact):
        assert (path / "modeling_own.py").is_file()
        assert (path / "tokenization_own.py").is_file()
        names = json.loads((path / "config.json").read_text())["auto_map"]
        assert names["AutoModelForSequenceClassification"] == "modeling_own.OwnForSequenceClassification"
    for card in (artifact / "README.md", directory / "06_evaluate" / "README.md"):
        text = card.read_text()
        assert "- run with code of their own: gemma (trust_remote_code)\n" in text
        assert text.count("trust_remote_code=True") == 4, "a warning, and each way to load it"
    second = tmp_path / "second"  # what this process has run once it does not run again
    with (artifact / "modeling_own.py").open("a") as code:
        code.write(f"Path({str(second)!r}).touch()\n")
    rows = pq.read_table(directory / "00_prepare" / "rows.parquet").slice(0, 6)
    pq.write_table(rows.select(["id", "prompt", "response_a", "response_b"]), tmp_path / "rows.parquet")
    predict = ["predict", str(artifact), str(tmp_path / "rows.parquet"), "-o", str(tmp_path / "said.parquet")]
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"\A2\Z"):
        cli.main(predict)
    (error,) = errors(capsys.readouterr().err)
    assert error.startswith(
        f"error: {artifact} cannot be loaded: it needs Python code that lies in it, and none"
    )
    assert "--trust-remote-code to llmkd predict" in error
    assert not second.exists()
    cli.main([*predict, "--trust-remote-code"])
    assert second.exists()
    said: pa.Table = pq.read_table(tmp_path / "said.parquet")
    assert len(said) == 6
    total = sum(said[f"p_{name}"].to_numpy() for name in ("a", "b", "tie"))
    np.testing.assert_allclose(total, 1, atol=1e-6)
