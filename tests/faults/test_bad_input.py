"""The list of record: what can be wrong with what a user gives, and what is said of it.

Each ends in one line a fault, with place and remedy, exit code 2, and a run directory as it was.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bad_files as bad
import pytest
import tiny
from bad_files import Make


@dataclass(frozen=True)
class Case:
    """A stage's command, in which {file} stands for what `make` wrote; what each line must tell."""

    stage: str
    words: tuple[str, ...]
    tells: tuple[str, ...]
    make: Make | None = None
    damage: Callable[[Path], None] | None = None
    more: tuple[tuple[str, ...], ...] = field(default=())  # of further lines, where one fault brings others


def word(override: str, *tells: str, more: tuple[tuple[str, ...], ...] = ()) -> Case:
    return Case("00_prepare", (override,), tells, more=more)


def flag(stage: str, words: str, *tells: str) -> Case:
    return Case(stage, tuple(words.split()), tells)


def config(data: str | bytes, *tells: str, more: tuple[tuple[str, ...], ...] = ()) -> Case:
    return Case("00_prepare", (), ("bad.yaml", *tells), bad.raw("bad.yaml", data), more=more)


def rows(make: Make | None, *tells: str, words: str = "") -> Case:
    source = ("task.train={file}", "task.test=null") if make else ()
    return Case("00_prepare", (*source, *words.split()), tells, make)


def tabular(columns: bad.Columns, features: str, *tells: str) -> Case:
    words = "task.kind=tabular task.swap=false evaluate.tta=none task.template=null folds.group=null"
    nets = (
        "student={name: net, init: {architecture: llmkd-mlp}}",
        "teachers=[{kind: lightgbm, name: trees}]",
    )
    asked = (*words.split(), *nets, "pretrain=[]", "quantize=null", "task.labels=[a,b,tie]")
    asked = (*asked, f"task.features={features}")
    return Case("00_prepare", ("task.train={file}", "task.test=null", *asked), tells, bad.parquet(columns))


def said(how: str, *tells: str, make: Make | None = None) -> Case:
    teacher = f"teachers=[{{kind: file, name: judge, path: {{file}}, {how}}}]"
    return Case("02_teachers", (teacher, "pretrain=[]"), tells, make or bad.said())


def trees(how: str, *tells: str) -> Case:
    return Case("02_teachers", (f"teachers=[{{kind: lightgbm, name: trees, {how}}}]", "pretrain=[]"), tells)


def model(change: Callable[[Path], object], *tells: str, words: str = "") -> Case:
    return named(bad.model(change), *tells, words=words)


def named(make: Make, *tells: str, words: str = "") -> Case:
    """A teacher that is to start from this checkpoint."""
    source = ("teachers.llama.init=null", "teachers.llama.model={file}")
    return Case("02_teachers", (*source, "--teacher=llama", "--fold=0", *words.split()), tells, make)


def made(override: str, *tells: str, make: Make | None = None, which: str = "llama") -> Case:
    return Case("01_pretrain", (override, f"--model={which}"), tells, make)


def cache(damage: Callable[[bad.Table], bad.Table], *tells: str) -> Case:
    told = (f"{bad.CACHED}/logits.parquet", *tells, "run stage 02 anew")
    return Case("03_distill", ("--fold=0", "--only=student"), told, damage=bad.cached(damage))


GOOD = bad.csv_text(bad.table())
TINY = tiny.CONFIG.read_text()
PYTHON = "run: !!python/object/apply:os.system ['touch ran']"
SHARES = "probabilities: [pa, pb, pt]"
LOGITS = "logits: [pa, pb, pt]"

CASES: dict[str, Case] = {
    # the config's file
    "config: empty": config("", "expected keys and values at the top, found NoneType"),
    "config: a list": config("- 1", "expected keys and values at the top, found list"),
    "config: a number": config("5", "expected keys and values at the top, found int"),
    "config: a broken list": config("a: [", "not YAML", "line 1"),
    "config: a tab": config("run:\n\t- x", "not YAML", "line 2"),
    "config: a NUL": config("a: \0", "not YAML", "#x0000"),
    "config: a Python object": config(PYTHON, "not YAML", "python/object"),
    "config: latin-1": config(TINY.replace("tiny", "ü").encode("latin-1"), "UTF-8"),
    "config: UTF-16": config(TINY.encode("utf-16"), "UTF-8"),
    "config: a hundred thousand brackets": config("[" * 100_000, "not YAML"),
    "config: a number as a key": config(f"{TINY}\n5: 6\n", "5 = 5: Keys should be strings"),
    "config: next to nothing": config("{run: x}", "task: Field required", more=(("student: Field",),)),
    "config: not there": Case(
        "00_prepare", (), ("no such config file", "configs/"), lambda path, _: path / "bad.yaml"
    ),
    "config: a directory": Case("00_prepare", (), ("no such config file",), bad.directory("bad.yaml")),
    # overrides
    "override: an unknown section": word("nope=1", "nope = 1: Extra inputs are not permitted"),
    "override: an unknown key": word("task.nope=1", "task.nope = 1: Extra inputs"),
    "override: an unknown key of an item": word("teachers.0.nope=1", "teachers.0.nope = 1: Extra inputs"),
    "override: a key in a number": word("seed.x=1", "'seed.x=1': seed holds 3, which has no keys"),
    "override: no key": word("=3", "'=3': write key.subkey=value"),
    "override: no value": word("epochs", "'epochs': write key.subkey=value"),
    "override: an empty value": word("distill.epochs=", "distill.epochs = None: Input should be a valid"),
    "override: an empty number": word("seed=", "seed = None: Input should be a valid integer"),
    "override: an empty run": word("run=", "run = None: Input should be a valid string"),
    "override: a name nobody has": word("teachers.nobody.epochs=1", "no item 'nobody' among 2"),
    "override: an item out of range": word("teachers.9.name=x", "no item '9' among 2"),
    "override: an item below 0": word("pretrain.-1.rows=3", "no item '-1' among 2"),
    "override: a word for a number": word("folds.count=two", "folds.count = 'two'", "valid integer"),
    "override: a part of a fold": word("folds.count=1.5", "folds.count = 1.5", "valid integer"),
    "override: no fold": word("folds.count=0", "folds.count = 0", "greater than or equal to 1"),
    "override: a seed below 0": word("seed=-1", "seed = -1", "greater than or equal to 0"),
    "override: a seed of 33 bits": word("seed=4294967296", "seed = 4294967296", "less than"),
    "override: endless epochs": word("distill.epochs=.inf", "distill.epochs = inf", "finite"),
    "override: a rate that is none": word("distill.learning_rate=.nan", "= nan", "finite"),
    "override: a rate below 0": word("distill.learning_rate=-1", "greater than 0"),
    "override: a list for a mapping": word("distill.terms=[]", "distill.terms = []", "dictionary"),
    "override: a number for an adapter": word("student.lora=5", "student.lora = 5", "dictionary"),
    "override: an adapter of rank 0": word("student.lora.r=0", "student.lora.r = 0", "greater than"),
    "override: an unknown term": word("distill.terms.nope=1", "terms: unknown ['nope']; known are"),
    "override: an unknown parameter": word("distill.params={kl: {x: 1}}", "kl.x: unknown"),
    "override: an unknown method": word("distill.method=magic", "'magic'", "'mutual' or 'sequence'"),
    "override: an unknown view": word("distill.view=other", "'other'", "'in_sample' or 'oof'"),
    "override: an unknown precision": word("precision=fp8", "'fp8'", "'auto', 'bf16' or 'fp32'"),
    "override: an unknown task": word("task.kind=video", "'video'", "'causal_lm'"),
    "override: a width of 5 bits": word("quantize.bits=5", "quantize.bits = 5", "4 or 8"),
    "override: groups of 48": word("quantize.group_size=48", "quantize.group_size = 48", "32, 64"),
    "override: three tokens": word("task.max_tokens=3", "task.max_tokens = 3", "or equal to 8"),
    "override: a weight for nobody": word("distill.teacher_weights={nobody: 1}", "no teacher of that name"),
    "override: a degree for nobody": word("distill.temperature={nobody: 2}", "no teacher of that name"),
    "override: to learn from nobody": word("student.teachers=[nobody]", "'nobody'; there are ['llama'"),
    "override: a phase for nobody": word("pretrain.0.models=[nobody]", "no model named 'nobody'"),
    "override: a part nobody knows": word("distill.phases=[{rows: [x]}]", "phases.0.rows.0 = 'x'"),
    "override: a field nobody knows": word("task.template='{nope}'", "unknown field {nope}: the fields are"),
    "override: a lone brace": word("task.template='{prompt'", "write a lone brace as {{ or }}"),
    "override: a template without a field": word("task.template='{prompt}'", "lacks the field {response_a}"),
    "override: layers of a tiny config": word("student.layers=[0]", "layers: are kept of a checkpoint"),
    "override: a DeepSpeed file that is not there": word("distill.deepspeed=x.json", "'x.json': no such"),
    "override: a Python object": word("seed=!!python/object/apply:os.system [ls]", "value is not YAML"),
    "override: a broken list": word("seed=[[", "'seed=[[': the value is not YAML"),
    "override: half of a surrogate pair": word("task.test=\ud800", "the value is not YAML"),
    "override: a way out": word("student.name=../x", "student.name = '../x': use letters, digits"),
    "override: a NUL": word('student.name="a\\0b"', "student.name = 'a\\x00b': use letters"),
    # the command line
    "flag: unknown": flag("00_prepare", "--nope", "unrecognized arguments: --nope"),
    "flag: another stage's": flag("00_prepare", "--fold=0", "unrecognized arguments: --fold=0"),
    "flag: without its value": flag("02_teachers", "--fold", "--fold: expected one argument"),
    "flag: fold 99": flag("02_teachers", "--fold 99", "--fold 99: there is no such fold; choose among 0, 1"),
    "flag: fold -1": flag("02_teachers", "--fold=-1", "--fold -1: there is no such fold"),
    "flag: a fold by name": flag("03_distill", "--fold x", "--fold x: there is no such fold"),
    "flag: teacher nobody": flag("02_teachers", "--teacher nobody", "choose among llama, qwen"),
    "flag: student nobody": flag("03_distill", "--student nobody", "choose among gemma"),
    "flag: model nobody": flag("01_pretrain", "--model nobody", "choose among llama, qwen, gemma"),
    "flag: only nothing": flag("03_distill", "--only x", "choose among student, baseline"),
    "flag: no artifact": flag("06_evaluate", "--artifact /nowhere", "/nowhere has no config.json; name a"),
    # where rows come from
    "source: not there": word("task.train=/nowhere/x.csv", "/nowhere/x.csv: no such file: correct the path"),
    "source: a glob of nothing": word("task.train=/nowhere/*.csv", "no such file: correct the path"),
    "source: of another kind": word("task.train=x.xlsx", "suffix '.xlsx' is not read: use .csv, .jsonl"),
    "source: the web": word("task.train=http://x/y.csv", "http://x/y.csv: no such file"),
    "source: a hub without a name": word("task.train='hub:'", "write hub:owner/name"),
    "source: a hub of too many parts": word("task.train='hub:a/b:c:d:e'", "write hub:owner/name"),
    "source: arena without rows": word("task.train=arena:rows=0", "write arena:rows=3000"),
    "source: arena of another kind": word("task.train=arena:rows=9,size=3", "write arena:rows=3000"),
    "source: a directory": rows(bad.directory("x.csv"), "x.csv: a directory, not a file: correct the path"),
    "source: not ours to read": rows(bad.unreadable, "rows.csv", "Permission denied"),
    # what is in the files
    "csv: empty": rows(bad.raw("x.csv", ""), "x.csv: cannot be read as .csv (Empty CSV file): mend"),
    "csv: a header only": rows(bad.raw("x.csv", bad.HEADER), "train: no rows are left: give a source"),
    "csv: a short row": rows(bad.raw("x.csv", GOOD + "1,2\n"), "x.csv", "Row #14: Expected 5 columns, got 2"),
    "csv: a long row": rows(
        bad.raw("x.csv", GOOD + "1,2,3,4,5,6\n"), "x.csv", "#14: Expected 5 columns, got 6"
    ),
    "csv: an open quote": rows(bad.raw("x.csv", GOOD.replace('t 3"', "t 3")), "x.csv", "Row #5", "mend"),
    "csv: latin-1": rows(bad.raw("x.csv", GOOD.replace("t 3", "é").encode("latin-1")), "save it as UTF-8"),
    "csv: UTF-16": rows(bad.raw("x.csv", GOOD.encode("utf-16")), "x.csv: cannot be read as .csv"),
    "csv: a gzip": rows(bad.zipped("x.csv"), "x.csv: cannot be read as .csv", "mend the file"),
    "csv: a gzip by name": rows(bad.zipped("x.csv.gz"), "suffix '.gz' is not read: use .csv"),
    "csv: a column twice": rows(bad.raw("x.csv", GOOD.replace('"id"', '"label"')), "duplicate field names"),
    "jsonl: empty": rows(bad.raw("x.jsonl", ""), "x.jsonl", "Empty JSON file", "mend the file"),
    "jsonl: blank lines": rows(bad.raw("x.jsonl", "\n\n"), "train: no column 'prompt' (correct task.columns"),
    "jsonl: a broken line": rows(bad.broken_lines('{"id": "r4", '), "rows.jsonl", "line 5 is no JSON object"),
    "jsonl: a line of words": rows(bad.broken_lines("hello"), "line 5 is no JSON object", "mend the file"),
    "jsonl: endless brackets": rows(bad.broken_lines("[" * 99_999), "line 5 is no JSON object"),
    "jsonl: latin-1": rows(
        bad.raw("x.jsonl", '{"prompt": "é"}'.encode("latin-1")), "line 1 is no JSON", "save it as UTF-8"
    ),
    "jsonl: an array": rows(bad.raw("x.json", '[{"a": 1},\n{"a": 2}]'), "x.json", "line 1 is no JSON object"),
    "jsonl: half of a surrogate pair": rows(bad.broken_lines('{"id": "\\ud83d"}'), "surrogate", "in row 4"),
    "jsonl: another type": rows(
        bad.broken_lines('{"id": 4}'), "/id", "changed from string to number in row 4"
    ),
    "jsonl: a key twice": rows(bad.broken_lines('{"id": "r", "id": "s"}'), "/id", "twice in row 4"),
    "parquet: none": rows(bad.raw("x.parquet", GOOD), "x.parquet", "Parquet magic bytes not found", "mend"),
    "parquet: empty": rows(bad.raw("x.parquet", ""), "x.parquet", "file size is 0 bytes", "mend the file"),
    "parquet: cut off": rows(
        bad.raw("x.parquet", bad.parquet_bytes(bad.table())[:-40]), "x.parquet", "mend the file"
    ),
    "rows: no prompt": rows(bad.csv(bad.table(prompt=None)), "train: no column 'prompt' (correct task.col"),
    "rows: no label": rows(bad.csv(bad.table(label=None)), "no column 'label' (correct task.label)"),
    "rows: no id": rows(bad.csv(bad.table()), "no column 'nope' (correct task.id)", words="task.id=nope"),
    "rows: no extra": rows(bad.csv(bad.table()), "'nope' (correct task.extra)", words="task.extra=[nope]"),
    "rows: no group": rows(bad.csv(bad.table()), "group 'nope' is no field", words="folds.group=nope"),
    "rows: an extra that is taken": rows(
        bad.csv(bad.table(fold=["1"] * 12)), "'fold' has a name that is taken", words="task.extra=[fold]"
    ),
    "rows: prompts that are lists": rows(bad.parquet(bad.table(prompt=[["a"]] * 12)), "'prompt' is list"),
    "rows: prompts that are bytes": rows(bad.parquet(bad.table(prompt=[b"a"] * 12)), "'prompt' is binary"),
    "rows: a blank prompt": rows(bad.csv(bad.cell("prompt", " \t")), "first row 4 (prompt): fill or drop"),
    "rows: no answer": rows(
        bad.csv(bad.cell("response_a", "", bad.cell("response_b", ""))),
        "first row 4 (response_a and response",
    ),
    "rows: no turns": rows(
        bad.csv(bad.table(response_a=["[]"] * 12, response_b=["[]"] * 12)),
        "12 rows of 'prompt' are no JSON list of turns",
        "first row 0",
        "task.turns",
        words="task.turns=json",
    ),
    "rows: turns in endless brackets": rows(
        bad.csv(bad.table(prompt=["[" * 99_999] * 12)),
        "12 rows of 'prompt' are no JSON list of turns",
        words="task.turns=json",
    ),
    "labels: floats": rows(
        bad.parquet(bad.table(label=[i % 3 + 0.5 for i in range(12)])), "holds floats: write"
    ),
    "labels: floats as text": rows(bad.csv(bad.table(label=["0.5"] * 12)), "first '0.5' in row 0: known are"),
    "labels: NaN": rows(
        bad.parquet(bad.table(label=[float("nan")] * 12)), "'label' holds floats: write whole"
    ),
    "labels: nan as text": rows(bad.csv(bad.cell("label", "nan")), "first 'nan' in row 4: known are -1, 0"),
    "labels: one missing": rows(bad.parquet(bad.cell("label", None)), "first missing in row 4: known are"),
    "labels: one empty": rows(bad.csv(bad.cell("label", "")), "first '' in row 4: known are"),
    "labels: beyond the last": rows(bad.csv(bad.cell("label", 3)), "first '3' in row 4: known are"),
    "labels: true and false": rows(bad.parquet(bad.table(label=[True] * 12)), "first 'true' in row 0"),
    "labels: lists": rows(bad.parquet(bad.table(label=[[1]] * 12)), "'label' is list", "whole numbers"),
    "labels: of one class": rows(bad.csv(bad.table(label=[0] * 12)), "fewer than two classes", "folds.count"),
    "labels: too few columns": rows(
        bad.csv(bad.table()), "2 one-hot columns for 3 labels: give one each", words="task.label=[id,label]"
    ),
    "labels: not one-hot": rows(
        bad.csv(bad.table()), "12 rows are not one-hot", "exactly one", words="task.label=[id,prompt,label]"
    ),
    "labels: values beyond the last": rows(
        bad.csv(bad.table()),
        "'0' maps to 9, outside the 3 labels",
        words='task.label_values={"0":9,"1":1,"2":2}',
    ),
    "labels: values without one": rows(
        bad.csv(bad.table()), "first '2' in row 2: known are 0, 1", words='task.label_values={"0":0,"1":1}'
    ),
    "ids: one twice": rows(bad.csv(bad.cell("id", "r3")), "repeat, first 'r3': make", words="task.id=id"),
    "ids: one missing": rows(
        bad.parquet(bad.cell("id", None)), "1 rows have no id in 'id'", words="task.id=id"
    ),
    "ids: one empty": rows(
        bad.csv(bad.cell("id", "")), "1 rows have no id in 'id': fill", words="task.id=id"
    ),
    "ids: a swapped copy's": rows(bad.csv(bad.cell("id", "r#swapped")), "rename it", words="task.id=id"),
    "ids: lists": rows(bad.parquet(bad.table(id=[[1]] * 12)), "'id' is list", words="task.id=id"),
    "ids: bytes": rows(
        bad.parquet(bad.table(id=[b"%d" % i for i in range(12)])), "'id' is binary", words="task.id=id"
    ),
    "ids: in both parts": rows(
        bad.csv(bad.table()),
        "12 ids stand in more than one part, first",
        "task.id",
        words="task.test={file} task.id=id",
    ),
    "folds: more than groups": rows(bad.csv(bad.table()), "12 groups cannot fill 13", words="folds.count=13"),
    "folds: of one group": rows(bad.csv(bad.table(prompt=["p"] * 12)), "1 groups cannot fill 2 folds: lower"),
    "leaks: refused": rows(bad.csv(bad.table()), "test", words="task.test={file} task.leaks=error"),
    "features: not there": tabular(bad.table(), "{numeric: [x]}", "no column 'x' (correct task.features)"),
    "features: words": tabular(
        bad.table(), "{numeric: [prompt]}", "'prompt' are no numbers, first 'prompt 0'"
    ),
    "features: infinite": tabular(
        bad.table(x=[float("inf")] * 12), "{numeric: [x]}", "12 rows of 'x' are infinite, first row 0: mend"
    ),
    "features: of two kinds": tabular(
        bad.table(x=[1.0] * 12),
        "{numeric: [x], categorical: [x]}",
        "'x' is numeric and categorical: name it once",
    ),
    # what another tool said
    "said: not there": said(SHARES, "/nowhere.csv: no such file", make=lambda *_: Path("/nowhere.csv")),
    "said: no such column": said("verdict: nope", "rows.parquet: no column 'nope': there are id, said"),
    "said: no such id": said(f"{SHARES}, id: nope", "no column 'nope': there are id"),
    "said: of other rows": said(
        SHARES, "no logits for 2 of 192 rows, first", "add", make=bad.said(id="other")
    ),
    "said: an id twice": said(SHARES, "1 ids in 'id' repeat, first", make=bad.said(id="train-0000001")),
    "said: no id": said(SHARES, "row 4 has no id in 'id': fill it", make=bad.said(id=None)),
    "said: below 0": said(SHARES, "below 0: 1 times, first in row 'train-0000004'", make=bad.said(pa=-1.0)),
    "said: not to 1": said(SHARES, "do not sum to 1: 1 times", "mend the file", make=bad.said(pa=0.9)),
    "said: NaN": said(LOGITS, "'pa' holds no finite number", "train-0000004", make=bad.said(pa=float("nan"))),
    "said: beyond 32 bits": said(LOGITS, "'pa' holds no finite number", make=bad.said(pa=1e300)),
    "said: too few columns": said("logits: [pa, pb]", "2 columns for the 3 classes", "name one for each"),
    "said: too short a list": said(
        "logits: [all]", "'all' does not hold 3 numbers", make=bad.said(all=[1.0])
    ),
    "said: lists for a verdict": said("verdict: all", "'all' is list", "name another column"),
    "said: no class": said(
        "verdict: said", "verdict 'z' in 'said' is none of a, b, tie", make=bad.said(said="z")
    ),
    "said: beyond the last": said("verdict: said, verdict_values: {a: 9}", "'a' maps to 9, outside the 3"),
    "said: in two ways": said(f"verdict: said, {SHARES}", "give exactly one of logits:"),
    "said: smoothed away": said("verdict: said, smoothing: 0.9", "smoothing = 0.9", "below 0.666667"),
    "trees: a field nobody knows": trees("fields: [nope]", "nope", "words_a"),
    "trees: a parameter nobody knows": trees("params: {nope: 1}", "LightGBM parameter 'nope' is unknown"),
    "trees: of one leaf": trees("params: {num_leaves: 1}", "num_leaves", "see LightGBM's Parameters"),
    # models
    "model: not there": named(lambda *_: Path("/nowhere/model"), "/nowhere/model: no such directory; name"),
    "model: a file": named(bad.raw("model.bin", "x"), "model.bin: no such directory; name one"),
    "model: an empty directory": named(bad.directory("model"), "/model", "cannot load it"),
    "model: nobody's": named(lambda *_: Path("nobody/nothing"), "nobody/nothing", "cannot load it"),
    "model: no config.json": model(bad.without("config.json"), "AutoConfig cannot load it", "config.json"),
    "model: half a config.json": model(bad.holding("config.json", b"{"), "not a valid JSON file"),
    "model: a list for a config.json": model(bad.holding("config.json", b"[]"), "cannot load it"),
    "model: of a kind nobody knows": model(bad.settings(model_type="nope"), "`nope`"),
    "model: with code of its own": model(
        bad.settings(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
        "AutoConfig cannot load it",
        "code",
    ),
    "model: no weights": model(bad.without("model.safetensors"), "no file named model.safetensors"),
    "model: pickled weights": model(bad.pickled_weights, "no file named model.safetensors"),
    "model: half its weights": model(bad.cut_weights, "cannot load it"),
    "model: weights of no bytes": model(bad.holding("model.safetensors", b""), "cannot load it"),
    "model: pickled weights by another name": model(
        bad.holding("model.safetensors", b"\x80\x04\x95" + b"x" * 500), "cannot load it"
    ),
    "model: a shard that is not there": model(bad.lost_shard, "gone.safetensors"),
    "model: no tokenizer": model(
        bad.without("tokenizer.json", "tokenizer_config.json"), "AutoTokenizer cannot"
    ),
    "model: half a tokenizer": model(bad.holding("tokenizer.json", b"{"), "AutoTokenizer cannot load it"),
    "model: no pad token": model(
        bad.settings("tokenizer_config.json", pad_token=None), "no pad token; set pad_token: to a reserved"
    ),
    "model: a pad token nobody knows": model(
        bad.settings(), "pad_token '<nope>' is not in its vocabulary", words="teachers.llama.pad_token=<nope>"
    ),
    "model: five labels": model(bad.five_labels, "cannot load it", "number of labels", "without its head"),
    "model: other sizes": model(bad.settings(hidden_size=64), "cannot load it"),
    "model: heads that do not fit": model(bad.settings(num_attention_heads=3), "cannot load it", "(3)"),
    "model: words for a size": model(bad.settings(hidden_size="x"), "cannot load it", "hidden_size"),
    "model: fewer embeddings than words": model(bad.settings(vocab_size=100), "cannot load it"),
    "model: more layers than weights": model(
        bad.settings(num_hidden_layers=3), "18 backbone weights are missing"
    ),
    "model: too few positions": model(
        bad.settings(max_position_embeddings=16), "beyond its 16 positions; lower"
    ),
    "model: of another kind": model(bad.settings(model_type="bert"), "backbone weights are missing"),
    "model: attention nobody knows": model(bad.settings(), '"nope"', words="teachers.llama.attention=nope"),
    "model: attention its architecture lacks": Case(
        "03_distill",
        ("student.attention=sdpa", "--fold=0", "--only=student"),
        ("01_pretrain/gemma", "has no such attention; leave attention: out, or take eager"),
    ),
    "init: an architecture nobody knows": made("teachers.llama.init.architecture=nope", "init: nope"),
    "init: a setting nobody knows": made("teachers.llama.init.config.nope=1", "llama has no setting 'nope'"),
    "init: heads that do not fit": made("teachers.llama.init.config.hidden_size=33", "hidden size (33)"),
    "init: a tokenizer that is not there": made("teachers.llama.init.tokenizer=/nowhere", "/nowhere"),
    "pretrain: not there": made("pretrain.0.data=/nowhere.txt", "/nowhere.txt: no such file", which="gemma"),
    "pretrain: an empty text": made(
        "pretrain.0.data={file}", "x.txt", "the file is empty", make=bad.raw("x.txt", ""), which="gemma"
    ),
    "pretrain: latin-1": made(
        "pretrain.0.data={file}",
        "x.txt: not UTF-8 at byte 3",
        make=bad.raw("x.txt", b"abc\xff"),
        which="gemma",
    ),
    "pretrain: no such column": made(
        "pretrain.1.columns={prompt: nope}", "pretrain.1.data", "no column 'nope'", which="qwen"
    ),
    # caches
    "cache: of other rows": cache(bad.last("id", "other"), "no in_sample logits for 1 of 98 rows"),
    "cache: a row more": cache(bad.further, "in_sample has 1 rows that are not this run's"),
    "cache: an id twice": cache(bad.twice, "in_sample has an id twice"),
    "cache: no id": cache(bad.last("id", None), "no in_sample logits for 1 of 98 rows"),
    "cache: NaN": cache(bad.last("logits", [float("nan"), 0, 0]), "has a logit that is not finite"),
    "cache: no logits in a row": cache(bad.last("logits", None), "do not hold 3 logits each"),
    "cache: of no view": cache(lambda table: table.slice(0, 0), "no in_sample logits for 98 of 98 rows"),
    "cache: of other labels": cache(
        bad.in_order("b", "a", "tie"), "labels ['b', 'a', 'tie'], but this run's"
    ),
    "cache: of more labels": cache(
        bad.in_order("a", "b", "tie", "x"), "but this run's are ['a', 'b', 'tie']"
    ),
    "cache: of no labels": cache(lambda table: table.replace_schema_metadata({}), "not a logits cache"),
    "cache: no logits at all": cache(lambda table: table.drop(["logits"]), "not a logits cache"),
    "cache: words for logits": cache(bad.as_text, "not a logits cache"),
}


@pytest.fixture(scope="module")
def base(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that every case works at, and none changes."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("base") / "run"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_a_fault_and_changes_nothing(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    if name == "source: not ours to read" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = case.make(tmp_path, base) if case.make else tmp_path
    words = [word.replace("{file}", str(path)) for word in case.words]
    unit, whole = base / bad.CACHED, tmp_path / "whole"
    if case.damage:
        shutil.copytree(unit, whole)
        case.damage(base)
    before = tiny.snapshot(base)
    try:
        config = path if path.name == "bad.yaml" else tiny.CONFIG
        assert tiny.stage(case.stage, f"run={base}", *words, config=config) == 2
        assert tiny.snapshot(base) == before
    finally:
        if case.damage:
            shutil.rmtree(unit)
            shutil.move(whole, unit)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 + len(case.more), errors
    for error, tells in zip(errors, (case.tells, *case.more), strict=True):
        for told in tells:
            assert told in error
    assert not Path("ran").exists()


def test_the_table_is_long_enough_and_each_case_is_its_own() -> None:
    assert len(CASES) >= 100
    assert len({(case.stage, case.words, case.make, case.damage) for case in CASES.values()}) == len(CASES)
