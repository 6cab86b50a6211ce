"""What a sequence run refuses, in one line, and what a second start leaves as it is."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import STAGES
from tiny_lm import CONFIG, LEARN, SIZES, TIED, go, rows

from llmkd import capture, lm, lm_rows
from llmkd.config import load, parse
from llmkd.errors import CacheError, ConfigError, RunError
from llmkd.inputs import prepared
from llmkd.settings import text_settings


def test_a_second_start_writes_no_shard_again(copy_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy_lm / "run/02_teachers")
    written: list[int] = []

    def fail(*arguments: Any) -> None:
        raise RunError("the machine went away")

    def count(directory: Path, index: int, *more: Any) -> None:
        written.append(index)
        write(directory, index, *more)

    write, finish = capture.write_shard, capture.finish
    monkeypatch.setattr(capture, "write_shard", count)
    monkeypatch.setattr(capture, "finish", fail)
    assert go(copy_lm, stages=("02_teachers",)) == 2
    assert written == [0]
    monkeypatch.setattr(capture, "finish", finish)
    assert go(copy_lm, stages=LEARN) == 0
    assert written == [0]


def test_what_a_cache_was_not_made_from_is_refused(copy_lm: Path) -> None:
    config, (train, tokenizer) = load(copy_lm / "lm.yaml"), rows(copy_lm, "train")
    more, vocab = (config, config.distill, ["big"]), lm.vocabulary(config, tokenizer)
    assert set(lm.open_caches(*more, tokenizer, vocab, train)) == {"big"}
    table = prepared(config)[0]
    settings = text_settings(config, config.student)
    shorter, _ = lm_rows.examples(table, tokenizer, "train", **{**settings, "max_tokens": 40})
    with pytest.raises(CacheError, match="was cached with other tokens"):
        lm.open_caches(*more, tokenizer, vocab, shorter)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(CacheError, match="another template"):
        lm.open_caches(*more, tokenizer, vocab, train)


@pytest.mark.parametrize(
    ("stages", "overrides", "told"),
    [
        (STAGES[1:], ["student.init.tokenizer.vocab_size=310"], "teacher big: another vocabulary (320 words"),
        (LEARN, ["distill.cache.k=400"], "k = 400 of a vocabulary of 320"),
        (("03_distill",), ["distill.cache.k=10"], "made from another config"),
        (("03_distill",), ["task.max_tokens=40"], "made from another config"),
    ],
)
def test_what_does_not_fit_is_one_line(
    copy_lm: Path,
    stages: tuple[str, ...],
    overrides: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert go(copy_lm, *overrides, stages=stages) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize("cut", [False, True])
def test_a_changed_byte_or_a_lost_end_of_a_shard_is_named(
    cut: bool, copy_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_lm / "run/02_teachers/big/fold0/cache/shard-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5] if cut else content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert go(copy_lm, "distill.epochs=2", stages=("03_distill",)) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("distill.view=oof", "distill.view = 'oof'"),
        ("task.columns={messages: m} task.pack=true", "task.pack = True: a chat"),
        ("distill.cache=null distill.on_policy=0.5 task.pack=true", "task.pack = True: distill.on_policy"),
        ("distill.method=cached", "distill.method = 'cached'"),
        ("distill.terms.reverse_kl=1", "distill.terms.reverse_kl"),
        ("distill.on_policy=0.5", "distill.on_policy = 0.5"),
        ("distill.weighting=entropy", "distill.weighting = 'entropy'"),
        ("distill.phases=[{epochs: 1}]", "distill.phases"),
        ("task.labels=[a, b]", "task.labels"),
        ("task.template='{text}'", "task.template"),
        ("task.columns={text: t, messages: m}", "task.columns"),
        ("teachers=[{kind: lightgbm, name: trees}]", "trees is no language model"),
        ("teachers.big.epochs=2", "teachers.big.epochs"),
        ("pretrain=[{data: x.parquet}]", "pretrain.0.objective = 'supervised'"),
    ],
)
def test_a_config_that_cannot_be(line: str, told: str) -> None:
    text = CONFIG.format(root="x", sizes=SIZES, tied=TIED)
    if line.startswith("teachers"):
        text = text.replace("models: [big], ", "")
    with pytest.raises(ConfigError) as caught:
        parse(text, re.split(r" (?=\w+\.\w+=)", line))
    assert [one for one in str(caught.value).split("\n") if told in one]


def test_next_tokens_need_the_task() -> None:
    with pytest.raises(ConfigError, match=r"task\.kind: causal_lm, not preference"):
        parse(tiny.CONFIG.read_text(), ["distill.method=sequence"])


def test_terms_of_next_tokens_are_ce_and_kl() -> None:
    config = parse(CONFIG.format(root="x", sizes=SIZES, tied=TIED), ["distill.terms={kl: 3}"])
    assert config.distill.terms == {"ce": 1, "kl": 3}
