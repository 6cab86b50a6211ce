"""A finished artifact for others: as ONNX, or as a directory to upload to the hub."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkd import description, features, run
from llmkd.errors import ModelError, RunError
from llmkd.inputs import EVALUATE, MERGE, QUANTIZE
from llmkd.models.artifact import read_json

if TYPE_CHECKING:
    from torch import nn

FILE = "model.onnx"
NEEDED = ("onnx", "onnxruntime", "onnxscript")
INPUTS = ("input_ids", "attention_mask")
TOLERANCE = 1e-3  # of a logit
ONE_FILE = 1 << 30  # bytes of weights up to which they stand in the graph's own file
CHECKED = (
    (1, 1),
    (1, 5),
    (2, 8),
    (4, 16),
    (3, 33),
    (2, 64),
)  # batches by lengths, as far as it has positions


def export_onnx(artifact: Path, output: Path) -> dict[str, Any]:
    """A text classifier as `output`/model.onnx in float32, beside its tokenizer, config and llmkd.json.

    Inputs input_ids and attention_mask (B, L) int64, padded on the right, any B and L; output logits (B, C),
    pooled as the artifact pools. Packed weights are unpacked once. What onnxruntime computes is held against
    torch on rows of several lengths and batch sizes. Returns output, bytes, max_difference and checked, the
    (B, L) that were compared. Raises ModelError for what cannot be exported, or differs by over 1e-3.
    """
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        raise ModelError(f"export to ONNX needs {absent[0]}: pip install llmkd[export]")
    description.read(artifact)  # refuses what is no classifier
    if (artifact / features.FILE).is_file():
        raise ModelError(f"{artifact} reads features, no tokens: use llmkd.predicting.predict_file")
    import torch

    from llmkd.models.artifact import load_artifact

    model, tokenizer = load_artifact(artifact, dtype=torch.float32)
    assert not isinstance(tokenizer, dict)
    with _folder(output) as directory:
        _write(_pooled(model), directory / FILE, artifact)
        checked, worst = _compare(_pooled(model), directory / FILE, model.config.get_text_config())
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if (artifact / description.FILE).is_file():
            shutil.copy(artifact / description.FILE, directory)
        size = sum(file.stat().st_size for file in directory.glob(f"{FILE}*"))
    return {"output": str(output), "bytes": size, "max_difference": worst, "checked": checked}


def export_hub(directory: Path, output: Path) -> dict[str, Any]:
    """The artifact of a finished run in a folder to upload: its card tells its scores on the test rows, its
    llmkd.json how it was judged (budget and orders).

    Raises RunError where stage 06 has not judged it, or it changed since. Returns output and files.
    """
    judged = run.manifest(directory / EVALUATE, "run stage 06 with this run's config")
    stage = QUANTIZE if QUANTIZE in judged["inputs"] else MERGE
    if run.digest(directory / stage) != judged["inputs"][stage]:
        raise RunError(f"{directory / stage}: changed since it was judged; run stage 06 anew")
    how = judged["settings"]["evaluate"]
    with _folder(output) as folder:
        shutil.copytree(directory / stage / "model", folder, dirs_exist_ok=True)
        if (directory / EVALUATE / "README.md").is_file():
            shutil.copy(directory / EVALUATE / "README.md", folder)
        said = read_json(folder / description.FILE)
        budget = how["max_tokens"] or said["max_tokens"]
        run.write_json(folder / description.FILE, {**said, "tta": how["tta"], "max_tokens": budget})
        names = sorted(file.name for file in folder.iterdir())
    return {"output": str(output), "files": names}


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A folder to fill, called `output` only when the block ends without an error."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: there is something already; name a new folder")
    output = Path(os.path.abspath(output))  # "." has no name of its own
    beside = output.with_name(output.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.replace(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _pooled(model: Any) -> nn.Module:
    """input_ids, attention_mask (B, L) -> logits (B, C), as `pooling.class_logits` gives them."""
    import torch
    from torch import Tensor, nn

    from llmkd.models.pooling import class_logits, head_logits, is_decoder, last_real_token

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            if not is_decoder(self.model):
                return class_logits(self.model, **inputs)
            # not pooling's own way there, whose attention by blocks would fix the sizes in the graph
            body = getattr(self.model, self.model.base_model_prefix)
            hidden = body(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
            rows = torch.arange(hidden.shape[0])  # len() would fix it too
            return head_logits(self.model.score, hidden[rows, last_real_token(attention_mask)])

    return Pooled().eval()


def _write(module: nn.Module, file: Path, artifact: Path) -> None:
    import torch

    ids = torch.ones((3, 7), dtype=torch.int64)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which is not needed
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                module,
                (ids, torch.ones_like(ids)),
                input_names=INPUTS,
                output_names=["logits"],
                dynamo=True,
                dynamic_shapes=dict.fromkeys(INPUTS, shape),
                verbose=False,
            )
            assert program is not None
            for node in program.model.graph.all_nodes():  # stack traces, with this machine's paths
                node.metadata_props.clear()
            program.save(file, external_data=sum(p.nbytes for p in module.parameters()) > ONE_FILE)
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{artifact} cannot be exported to ONNX ({reason}); use it in torch") from error


def _compare(module: nn.Module, file: Path, config: Any) -> tuple[list[tuple[int, int]], float]:
    """The shapes compared, and by how much onnxruntime's logits differ from torch's at most."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    fixed = [size for one in session.get_inputs() for size in one.shape if not isinstance(size, str)]
    if fixed:
        raise ModelError(f"{file}: a batch or length is fixed to {fixed[0]}; use the artifact in torch")
    random, worst = np.random.default_rng(0), 0.0
    most = getattr(config, "max_position_embeddings", None) or max(length for _, length in CHECKED)
    shapes = [(rows, length) for rows, length in CHECKED if length <= most]
    for rows, length in shapes:
        ids = random.integers(0, config.vocab_size, (rows, length))
        mask = (np.arange(length) < random.integers(1, length + 1, (rows, 1))).astype(np.int64)  # (B, L)
        with torch.no_grad():
            expected = module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        found = session.run(["logits"], dict(zip(INPUTS, (ids, mask), strict=True)))[0]
        worst = max(worst, float(np.abs(found - expected).max()))
    if not worst <= TOLERANCE:
        raise ModelError(f"{file}: its logits differ from torch's by {worst:.3g}; use the artifact in torch")
    return shapes, worst
