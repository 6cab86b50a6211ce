"""Programs on the path of a documented command: each in front of the real one, or in its place."""

import sys
from pathlib import Path

from test_tracking import MLFLOW, WANDB

REAL = Path(sys.executable).parent

# `python benchmarks/...` as it is written, and then the sizes of a toy; the last of a flag counts
PYTHON = """\
case "$1" in
  benchmarks/soak.py) set -- "$@" --config tests/tiny.yaml --kills 2 --longest 2 ;;
  benchmarks/seeds.py) set -- "$@" --seeds 2 ;;
  benchmarks/plan_memory.py) set -- "$@" "llama LoRA nf4" ;;
  benchmarks/baselines.py) ;;
  benchmarks | benchmarks/*) set -- "$@" --quick ;;
esac
exec {real}/python "$@"
"""
# 8 processes are 2; 4 nodes are two agents of one process each, which meet at a free port
TORCHRUN = """\
port=$(({port} + $$ % 10000)) before= nodes=
for word; do
  shift
  case "$before $word" in
    "--nnodes 4") nodes=2 word=2 ;;
    "--nproc_per_node 8") word=$((2 / ${{nodes:-1}})) ;;
    *" node1:29500") word=127.0.0.1:$port ;;
  esac
  before=$word
  set -- "$@" "$word"
done
[ "$nodes" ] || exec {real}/torchrun --standalone "$@"
{real}/torchrun --node-rank 0 "$@" & first=$!
{real}/torchrun --node-rank 1 "$@" && wait $first
"""
DEEPSPEED = """\
before=
for word; do
  shift
  [ "$before $word" = "--num_gpus 8" ] && word=2
  before=$word
  set -- "$@" "$word"
done
exec {real}/deepspeed --master_port $(({port} + $$ % 10000)) "$@"
"""
# pdsh -S -f N -w HOST,HOST WORDS: %n is the host's number
PDSH = """\
hosts=$(echo "$5" | tr , ' ') n=0 started= failed=0
shift 5
for host in $hosts; do
  sh -c "$(echo "$*" | sed "s/%n/$n/g")" & started="$started $!" n=$((n + 1))
done
for one in $started; do wait $one || failed=$?; done
exit $failed
"""
TENSORBOARD = """\
{real}/tensorboard "$@" --port 0 >said.txt 2>&1 & server=$!
for second in $(seq 120); do grep -q http:// said.txt && break; sleep 1; done
kill $server
grep -q http:// said.txt
"""
PROGRAMS = {
    "python": PYTHON,
    "llmkd": 'exec {real}/python -m llmkd.cli "$@"',
    "torchrun": TORCHRUN,
    "deepspeed": DEEPSPEED,
    "pdsh": PDSH,
    "ssh": 'case "$*" in *"hostname -I") echo 127.0.0.1 ;; esac',
    "srun": 'exec "$@"',
    "scontrol": '[ "$1 $2" = "show hostnames" ] && printf "node1\\nnode2\\nnode3\\nnode4\\n"',
    "tensorboard": TENSORBOARD,
}


def lay(place: Path) -> None:
    place.mkdir(parents=True)
    for name, body in PROGRAMS.items():
        (place / name).write_text(f"#!/bin/sh\n{body.format(real=REAL, port=30000)}\n")
        (place / name).chmod(0o755)


def packages(place: Path) -> None:
    for name, source in (("wandb", WANDB), ("mlflow", MLFLOW)):
        below = place / name / "sdk" / "lib"
        below.mkdir(parents=True)
        for part in (below.parent, below):
            (part / "__init__.py").touch()
        (below / "config_util.py").write_text("class ConfigError(Exception): ...")
        (place / name / "__init__.py").write_text(source)
        (place / f"{name}-1.0.dist-info").mkdir()
        (place / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
