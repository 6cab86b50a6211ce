"""Texts and chats of a sequence run: which rows they become, and which of them are learnt."""

import json
from pathlib import Path

import pandas as pd
import pytest
import tiny
from conftest import STAGES
from tiny_lm import go, metrics, rows

from llmkd import lm_rows, run
from llmkd.config import load
from llmkd.errors import DataError
from llmkd.inputs import prepared
from llmkd.tasks.arena import texts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_rows_are_texts_less_those_of_the_test_part(finished_lm: Path) -> None:
    manifest = run.manifest(finished_lm / "run/00_prepare")
    assert manifest["rows"] == {"train": 40, "test": 10}
    assert manifest["metrics"]["report"]["leaks"]["dropped"] == 1


def test_blocks_over_all_texts(copy_lm: Path) -> None:
    assert go(copy_lm, "task.pack=true", stages=STAGES[2:]) == 0
    found = run.manifest(copy_lm / "run/02_teachers/big/fold0")["rows"]
    everything = sum(rows(copy_lm, "train")[0].lengths)
    assert found["rows"] > everything // 48, "texts were cut before"
    assert run.manifest(copy_lm / "run/03_distill/small/fold0")["rows"]["train"] == found["rows"]
    assert metrics(copy_lm)["rows"]["cut"] > 0, "by a block's end"


def test_chats_are_learnt_where_the_assistant_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = texts(24, 1)
    chats = [
        [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:40]}]
        for text in said
    ]
    chats[3] = chats[3][:1]  # nobody answers
    written = [json.dumps(chat) for chat in chats]
    pd.DataFrame({"talk": written[:20]}).to_parquet(tmp_path / "train.parquet")
    pd.DataFrame({"talk": written[20:]}).to_parquet(tmp_path / "test.parquet")
    tokenizer = tiny.tokenizer(said, 300)
    for name, seed, template in (("big", 0, "{{ messages }}"), ("small", 1, TEMPLATE)):
        tiny.causal_lm(seed=seed, vocab_size=320).save_pretrained(tmp_path / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    path = tmp_path / "chats.yaml"
    path.write_text(
        f"run: {tmp_path}/run\nprecision: fp32\nquantize: null\nfolds: {{count: 1}}\nmerge: {{dtype: fp32}}\n"
        f"task: {{kind: causal_lm, train: {tmp_path}/train.parquet, test: {tmp_path}/test.parquet, "
        "columns: {messages: talk}, max_tokens: 64}\n"
        f"teachers: [{{name: big, model: {tmp_path}/big}}]\n"
        f"student: {{name: small, model: {tmp_path}/small, lora: {{r: 2, alpha: 4}}}}\n"
        "distill: {method: sequence, epochs: 1, batch_rows: 8}\nevaluate: {continuations: 1, new_tokens: 3}\n"
    )
    for name in STAGES:
        assert tiny.stage(name, config=path) == 0, name
    manifest = run.manifest(tmp_path / "run/02_teachers/big/fold0")
    assert manifest["rows"] == {"rows": 19, "cut": 0, "without_targets": 1}
    printed = capsys.readouterr().out
    assert "'without_targets': 1" in printed
    assert "big: has another chat template than the student" in printed
    assert run.manifest(tmp_path / "run/03_distill/small/fold0")["metrics"]["without_targets"] == 1
    answers = [tokenizer(chat[1]["content"])["input_ids"] for chat in chats[:20] if len(chat) > 1]
    assert manifest["metrics"]["tokens"] == sum(map(len, answers)), "eos in place of bos"
    found = json.loads((tmp_path / "run/06_evaluate/metrics.json").read_text())
    assert found["student"]["nll"] == pytest.approx(found["merged"]["nll"], rel=1e-5)
    first = chats[20][0]["content"]
    assert " ".join(found["continuations"][0]["prompt"].split()).startswith("<user>" + first.split()[0])


def test_a_column_without_chats_is_named() -> None:
    import pyarrow as pa

    with pytest.raises(DataError, match="train: no column 'talk'"):
        lm_rows.chats_as_text(pa.table({"text": ["a"]}), "talk", "train")
    with pytest.raises(DataError, match="train: row 1 of 'talk' is no list of role and content"):
        lm_rows.chats_as_text(pa.table({"talk": ["[]", "hello"]}), "talk", "train")


def test_pretraining_never_reads_a_test_text(finished_lm: Path) -> None:
    table = prepared(load(finished_lm / "lm.yaml"))[0]
    held = lm_rows.plain_texts(table, False, "test")
    assert lm_rows.without_test_texts(["new", f"  {held[0].upper()} "], table, False) == ["new"]
    with pytest.raises(DataError, match="every text is a test row's"):
        lm_rows.without_test_texts(held, table, False)
