"""A directory that looks like a checkout, and in it what a reader of the pages would have.

Real: the stages, the package, the benchmarks, all configs but the demo's, and the commands, word for word.
In place of what no test has:
 - files: a few dozen made-up rows where a config, or a reader, has thousands; tiny models of random weights
   in directories named as the hub's; fewer rows in configs/demo.yaml; two hosts of one slot in a hostfile
 - programs (stand_in_programs.py): SLURM's, ssh and pdsh run their words on this machine; torchrun and
   deepspeed take 2 processes for 8, and 2 agents for 4 nodes; benchmarks take toy sizes; packages of W&B and
   MLflow note their calls
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import stand_in_programs
import tiny

WORDS = (
    *["bread", "dough", "flour", "oven", "guitar", "music", "chord", "song", "garden", "bike"],
    *["wheel", "seed", "tree", "rain", "path", "slow", "bright"],
)


def checkout(place: Path) -> dict[str, str]:
    """Lay the directory; returns the environment of its commands."""
    for name in ("stages", "benchmarks", "tests", "llmkd", "Makefile", "pyproject.toml", "constraints.txt"):
        (place / name).symlink_to(tiny.ROOT / name)
    shutil.copytree(tiny.ROOT / "docs", place / "docs")  # python -m llmkd.reference writes there
    shutil.copytree(tiny.ROOT / "configs", place / "configs")
    demo = place / "configs" / "demo.yaml"
    demo.write_text(re.sub(r"rows=\d+", "rows=96", demo.read_text()))
    stand_in_programs.lay(place / ".venv" / "bin")
    stand_in_programs.packages(place / "packages")
    (place / ".venv" / "installed").touch()  # make install has been run
    files(place)
    models(place)
    return environment(place)


def environment(place: Path) -> dict[str, str]:
    path = [str(place / ".venv" / "bin"), str(stand_in_programs.REAL), os.environ["PATH"]]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join([str(place), str(place / "packages")]),
        "HOME": str(place),
        "SLURM_JOB_NODELIST": "node[1-4]",
        "SLURM_ARRAY_TASK_ID": "3",
    }


def text(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


def texts(count: int, seed: int) -> pd.DataFrame:
    """Texts of which one word tells the label of two."""
    random = np.random.default_rng(seed)
    rows = [{"sentence": text(random, 8), "label": i % 2} for i in range(count)]
    return pd.DataFrame([{**row, "sentence": f"{WORDS[row['label']]} {row['sentence']}"} for row in rows])


def pairs(count: int, seed: int) -> pd.DataFrame:
    """Pairs of answers, of which the longer wins more often than not: 0 = a, 1 = b, 2 = tie."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 20, (count, 2))
    label = np.where(random.random(count) < 0.2, 2, (lengths[:, 1] > lengths[:, 0]).astype(int))
    return pd.DataFrame(
        {
            "id": [f"{seed}-{i}" for i in range(count)],
            "prompt": [f"{text(random, 4)} {seed}-{i}" for i in range(count)],
            "context": "",
            "response_a": [text(random, words) for words in lengths[:, 0]],
            "response_b": [text(random, words) for words in lengths[:, 1]],
            "label": label,
        }
    )


def competition(rows: pd.DataFrame) -> pd.DataFrame:
    """As the competition's file: turns as JSON lists, the winner in three columns."""
    turns = {
        name: rows[name].map(lambda said: json.dumps([said]))
        for name in rows
        if "res" in name or name == "prompt"
    }
    won = {
        f"winner_{name}": (rows.label == i).astype(int)
        for i, name in enumerate(("model_a", "model_b", "tie"))
    }
    return pd.DataFrame({"id": rows.id, **turns, **won})


def files(place: Path) -> None:
    """Those that configs name, and a reader's own."""
    for folder in (
        "data/lmsys",
        "stanfordnlp/sst2",
        "rows/sst2",
        "rows/prefs",
        "rows/causal_lm",
        ".config/fish/completions",
    ):
        (place / folder).mkdir(parents=True)
    sets: dict[str, pd.DataFrame] = {
        "stanfordnlp/sst2/train.parquet": texts(90, 1),
        "stanfordnlp/sst2/validation.parquet": texts(30, 2),
        "rows/sst2/train.parquet": texts(90, 3),
        "rows/sst2/test.parquet": texts(30, 4),
        "rows/prefs/train.parquet": pairs(90, 5),
        "rows/prefs/test.parquet": pairs(30, 6),
        "rows/prefs/data.parquet": pairs(60, 7).drop(columns="context"),
        "data/ultrafeedback_pairs.parquet": pairs(40, 13).drop(columns="context"),
        "rows/causal_lm/train.parquet": texts(60, 8).rename(columns={"sentence": "text"}),
        "rows/causal_lm/test.parquet": texts(20, 9).rename(columns={"sentence": "text"}),
        "rows/causal_lm/data.parquet": texts(60, 8).rename(columns={"sentence": "text"}),
    }
    (place / "data" / "prefs").mkdir()
    sets |= {
        f"data/prefs/{name}.parquet": pairs(90, 10 + i) for i, name in enumerate(("train", "validation"))
    }
    sets["data/machine_judged.parquet"] = pairs(60, 12).drop(columns="context")
    for name, rows in sets.items():
        rows.to_parquet(place / name)
    competition(pairs(60, 14)).to_csv(place / "data/lmsys/train.csv", index=False)
    competition(pairs(20, 15)).to_csv(place / "data/lmsys/holdout.csv", index=False)
    texts(160, 16).rename(columns={"sentence": "review"}).to_csv(place / "reviews.csv", index=False)
    texts(20, 17).rename(columns={"sentence": "review"}).to_csv(place / "new.csv", index=False)
    pairs(60, 19).to_parquet(place / "prefs.parquet")
    for name in ("train", "validation", "imdb"):
        texts(120, 20).rename(columns={"sentence": "text"}).to_parquet(place / f"{name}.parquet")
    pairs(20, 18).drop(columns="label").to_csv(place / "rows.csv", index=False)
    (place / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (place / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")


def models(place: Path) -> None:
    """Tiny ones, in the directories that a hub id would name from here."""
    from transformers import AutoConfig, AutoModel

    wide = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 320, "max_position_embeddings": 2048}
    words = tiny.tokenizer(WORDS, 300)
    words.add_tokens(["<|reserved_special_token_0|>"], special_tokens=True)
    saved = {
        "meta-llama/Meta-Llama-3-70B-Instruct": tiny.causal_lm("llama", **wide),
        "smollm2": tiny.causal_lm("llama", **wide),
        "Qwen/Qwen2-72B-Instruct": tiny.causal_lm("qwen2", **wide),
        "google/gemma-2-9b-it": tiny.causal_lm("gemma2", **wide, head_dim=64),
        "sentence-transformers/all-MiniLM-L6-v2": AutoModel.from_config(
            AutoConfig.for_model("bert", **{**tiny.SIZES, **wide, "num_hidden_layers": 6})
        ),
    }
    for name, model in saved.items():
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
