"""A quantization that is cut off behind any block, and begun again, ends as one that nothing disturbed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import STAGES

from llmkd import checkpoint, interrupt, run
from llmkd.digests import file_entry
from llmkd.errors import Stopped
from llmkd.gptq_blocks import packed, replaced, unpacked
from llmkd.quantize import quantize_gptq

BLOCKS, LAYERS = 3, 7
ROWS = [[1 + (7 * i + j * j) % 60 for j in range(4 + i % 14)] for i in range(40)]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ordered": {"bits": 4, "desc_act": True},
    "one scale": {"bits": 4, "group_size": -1, "symmetric": False},
}


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs but what ends with the process."""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks, of which the second sees all of a row and the others a window."""
    path = tmp_path_factory.mktemp("merged")
    tiny.classifier("gemma2", num_hidden_layers=BLOCKS, sliding_window=8).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def quantized(merged: Path, out: Path, kept: Path | None = None, **settings: Any) -> dict[str, str]:
    """sha256 of every file of the quantized model, by name."""
    quantize_gptq(merged, out, ROWS, **{"group_size": 32, "checkpoints": kept, **settings})
    return {path.name: file_entry(path)["sha256"] for path in sorted(out.iterdir())}


@contextmanager
def calls(before: Any = lambda count: None) -> Iterator[list[int]]:
    """How often GPTQ is asked for a layer, and what is done before each time."""
    from gptqmodel.quantization import GPTQ

    asked, quantize = [0], GPTQ.quantize

    def counting(self: Any, **settings: Any) -> Any:
        asked[0] += 1
        before(asked[0])
        return quantize(self, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPTQ, "quantize", counting)
        yield asked


def kill(block: int, *given: Any, **settings: Any) -> None:
    """A quantization that dies as soon as this block is saved."""
    write = checkpoint.write

    def dying(at: Path, step: int, *rest: Any) -> None:
        write(at, step, *rest)
        if step == block:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", dying)
        with pytest.raises(Killed):
            quantized(*given, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_quantization_ends_bit_equal_and_does_no_block_again(
    way: str, merged: Path, tmp_path: Path
) -> None:
    """Killed behind its first block, then, begun again, behind its second, then behind its last.

    A block takes a byte a weight: none was kept in float for want of codes that give it back.
    """
    whole = quantized(merged, tmp_path / "whole", **WAYS[way])
    for block in range(1, BLOCKS + 1):
        with calls() as asked:
            kill(block, merged, tmp_path / "half", tmp_path / "kept", **WAYS[way])
        assert asked == [LAYERS]
        tensors, _ = checkpoint.read(tmp_path / "kept" / f"block{block}") or ({}, {})
        kinds = sorted(name.rpartition("/")[2] for name in tensors)
        assert kinds == sorted(["codes", "g_idx", "scale", "zero"] * LAYERS)
    with calls() as asked:
        assert quantized(merged, tmp_path / "out", tmp_path / "kept", **WAYS[way]) == whole
    assert asked == [0]


def test_a_weight_that_codes_do_not_give_back_is_kept_as_it_is() -> None:
    import torch

    weight = torch.tensor([[1.0, 2.0], [0.3, -1.0]])
    scale, zero, g_idx = torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)
    for row, kind in ((slice(0, 1), "codes"), (slice(1, 2), "weight")):
        found = packed(weight[row], scale[row], zero[row], g_idx)
        assert kind in found
        assert torch.equal(unpacked(found), weight[row])


def test_a_layer_is_packed_where_its_parts_lie_on_several_devices() -> None:
    """gptqmodel leaves scales on the CPU where a GPU's memory runs out."""
    import torch

    class Elsewhere(torch.Tensor):
        """On a device that meets no other: nothing but a copy to the CPU is to be had of it."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.Tensor.cpu:
                raise RuntimeError("Expected all tensors to be on the same device")
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].cpu().as_subclass(torch.Tensor)

    weight = torch.tensor([[1.0, 2.0]])
    parts = torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(2, dtype=torch.int32)
    found = packed(weight.as_subclass(Elsewhere), *parts)
    assert torch.equal(unpacked(found), weight)
    found = packed(weight, *(one.as_subclass(Elsewhere) for one in parts))
    assert torch.equal(unpacked(found), weight)


@pytest.mark.parametrize("own", [False, True])
def test_a_block_s_forward_is_its_own_again(own: bool) -> None:
    """Also where it lay in the block itself, as accelerate's hooks lay it."""
    from torch import nn

    block = nn.Linear(2, 2)
    if own:
        block.forward = str  # type: ignore[method-assign,assignment]
    before = dict(vars(block))
    with ExitStack() as stack:
        replaced(stack, block, "forward", int)
        assert block.forward is int
    assert vars(block) == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "half-written", "gone"])
def test_a_damaged_block_is_done_again(
    damage: str, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It alone: what the later ones were made from is the same."""
    whole = quantized(merged, tmp_path / "whole")
    kill(2, merged, tmp_path / "half", tmp_path / "kept")
    (path,) = (tmp_path / "kept" / "block1").iterdir()
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    if damage in ("flipped", "cut"):
        path.write_bytes(bytes(data[: -100 if damage == "cut" else None]))
    else:
        path.rename(path.with_name("next.tmp"))
    if damage == "gone":
        shutil.rmtree(path.parent)
    with calls() as asked:
        assert quantized(merged, tmp_path / "out", tmp_path / "kept") == whole
    assert asked == [2 * LAYERS]
    said = f"{path}: damaged (sha256), left aside" in capsys.readouterr().out
    assert said == (damage in ("flipped", "cut"))


@pytest.mark.parametrize("changed", ["rows", "settings", "model", "versions", "device"])
def test_blocks_of_another_quantization_are_done_anew(
    changed: str,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is said, and not one is taken, also behind such as are this quantization's own by then."""
    with monkeypatch.context() as patch:
        if changed == "versions":
            patch.setattr("llmkd.quantize.version", lambda name: "0" + version(name))
        if changed == "device":
            patch.setattr("llmkd.quantize._device", lambda: "another")
        kill(2, merged, tmp_path / "half", tmp_path / "kept")
    if changed == "rows":
        monkeypatch.setattr(sys.modules[__name__], "ROWS", ROWS[:-1])
    if changed == "model":
        merged = Path(shutil.copytree(merged, tmp_path / "other"))
        tiny.classifier("gemma2", 1, num_hidden_layers=BLOCKS, sliding_window=8).save_pretrained(merged)
    damp = 0.2 if changed == "settings" else 0.1
    whole = quantized(merged, tmp_path / "whole", damp=damp)
    capsys.readouterr()
    kill(1, merged, tmp_path / "half", tmp_path / "kept", damp=damp)
    with calls() as asked:
        assert quantized(merged, tmp_path / "out", tmp_path / "kept", damp=damp) == whole
    assert asked == [2 * LAYERS]
    said = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if "left aside" in line]
    assert said == [str(tmp_path / "kept" / f"block{block}") for block in (1, 2)]


@pytest.mark.parametrize(("number", "block"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGTERM, 3)])
def test_a_signal_finishes_the_block_and_saves(
    number: signal.Signals, block: int, merged: Path, tmp_path: Path
) -> None:
    whole = quantized(merged, tmp_path / "whole")

    def signalled(count: int) -> None:
        if count == LAYERS * block - 2:
            os.kill(os.getpid(), number)

    with interrupt.heard(), calls(signalled) as asked, pytest.raises(Stopped) as stopped:
        quantized(merged, tmp_path / "half", tmp_path / "kept")
    assert stopped.value.signal == number
    assert str(stopped.value) == f"block {block} of {BLOCKS} is saved"
    assert asked == [LAYERS * block]
    with calls() as asked:
        assert quantized(merged, tmp_path / "out", tmp_path / "kept") == whole
    assert asked == [LAYERS * (BLOCKS - block)]


def test_a_signal_behind_the_last_block_ends_it_at_once(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing is not gone on with, so it is not waited for."""

    def signalled(*given: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr("optimum.gptq.GPTQQuantizer.pack_model", signalled)
    with interrupt.heard(), pytest.raises(Stopped, match="finished work is kept"):
        quantized(merged, tmp_path / "half", tmp_path / "kept")


@pytest.mark.slow
def test_a_stage_that_is_stopped_or_killed_goes_on_behind_its_last_block(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SIGTERM in its first block, by kill -9, a real process, behind the others; then by nothing."""
    words = ["student.init.config.num_hidden_layers=3", "distill.epochs=1", "distill.baseline=false"]
    for stage in STAGES[:3]:  # the teachers are the same
        shutil.copytree(finished / stage, tmp_path / "run" / stage)
    for stage in STAGES[:5]:
        assert tiny.stage(stage, f"run={tmp_path / 'run'}", *words) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    with calls(lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 3 else None):
        assert tiny.stage("05_quantize", f"run={tmp_path / 'run'}", *words) == 143
    said = "stopped by SIGTERM: block 1 of 3 is saved; the same command goes on from there"
    assert capsys.readouterr().err.splitlines()[-1] == said
    for block in (2, 3):
        killed = [sys.executable, str(Path(__file__).with_name("killed_stage.py")), str(block)]
        script = [str(tiny.ROOT / "stages" / "05_quantize.py"), "--config", str(tiny.CONFIG)]
        done = subprocess.run([*killed, *script, f"run={tmp_path / 'run'}", *words], check=False)
        assert done.returncode == -signal.SIGKILL
        kept = tmp_path / "run" / "05_quantize.partial" / "checkpoint" / "gptq"
        assert len(list(kept.rglob("step*"))) == block
    for name, count in (("run", 0), ("undisturbed", BLOCKS * LAYERS)):
        with calls() as asked:
            assert tiny.stage("05_quantize", f"run={tmp_path / name}", *words) == 0
        assert asked == [count]
    units = [tmp_path / name / "05_quantize" for name in ("run", "undisturbed")]
    assert run.told(run.manifest(units[0])) == run.told(run.manifest(units[1])), "byte by byte"
    assert not list(tmp_path.rglob("checkpoint"))
