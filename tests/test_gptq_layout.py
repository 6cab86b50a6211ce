"""The artifact's bytes by the documented GPTQ layout, unpacked here without the package's own unpacking.

Version 1 of the format (`checkpoint_format: gptq`), as AutoGPTQ wrote it, and transformers and vLLM read it:

    qweight  int32    [inputs * bits / 32, outputs]   lowest bits first, along the inputs
    qzeros   int32    [groups, outputs * bits / 32]   lowest bits first, along the outputs; each less one
    scales   float16  [groups, outputs]
    g_idx    int32    [inputs]                        the group of each input

    weight[output, input] = scales[g, output] * (q[input, output] - (z[g, output] + 1)),  g = g_idx[input]

See https://garden.danieldk.eu/GPTQ-Checkpoint-Format for the one that is taken off. The kernels of vLLM 0.33
for symmetric weights read neither zero points nor g_idx: they take 2^(bits - 1) for each zero point and
input // group_size for each group. A convention off by one would be silent here, and wrong there.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_quantize import CALIBRATION, CONFIGS, save_model

from llmkd.models.artifact import load_artifact
from llmkd.quantize import quantize_gptq

PARTS = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}
SETTINGS: list[dict[str, Any]] = [
    {"bits": 8, "group_size": 32},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": -1},
]


def values(words: torch.Tensor, bits: int, along: int) -> torch.Tensor:
    """The unsigned values packed in int32 words, lowest bits first, along a dimension."""
    words = words.long() % 2**32  # not negative: plain division takes the words apart
    split = torch.stack([words // 2 ** (bits * i) % 2**bits for i in range(32 // bits)], dim=along + 1)
    return split.flatten(along, along + 1)


def dequantized(layer: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """weight [outputs, inputs] in float32 by the formula above."""
    groups = layer["g_idx"].long()
    zeros = (values(layer["qzeros"], bits, 1) + 1)[groups]  # (inputs, outputs)
    return ((values(layer["qweight"], bits, 0) - zeros).float() * layer["scales"].float()[groups]).T


def packed_layers(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    tensors = load_file(directory / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {name: {part: tensors[f"{name}.{part}"] for part in PARTS} for name in names}


@pytest.fixture(
    scope="module", params=SETTINGS, ids=lambda one: f"{one['bits']}-bit, group {one['group_size']}"
)
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, int]:
    """An artifact of a Qwen2 classifier, which has biases; its bits and its group size."""
    home, settings = tmp_path_factory.mktemp("layout"), request.param
    source = save_model(home / "float", CONFIGS["qwen2"])
    quantize_gptq(source, home / "packed", CALIBRATION[:16], **settings)
    return home / "packed", settings["bits"], settings["group_size"]


def test_names_shapes_and_dtypes(artifact: tuple[Path, int, int]) -> None:
    """What a GPTQ linear layer of vLLM allocates for these widths."""
    directory, bits, size = artifact
    config = json.loads((directory / "config.json").read_text())
    layers, float_model = packed_layers(directory), load_artifact(directory)[0]
    assert len(layers) == 7 * config["num_hidden_layers"]
    for name, layer in layers.items():
        height, width = float_model.get_parameter(f"{name}.weight").shape
        groups = width // size if size > 0 else 1
        shapes = {
            "qweight": (width * bits // 32, height),
            "qzeros": (groups, height * bits // 32),
            "scales": (groups, height),
            "g_idx": (width,),
        }
        assert {part: tuple(tensor.shape) for part, tensor in layer.items()} == shapes
        assert {part: tensor.dtype for part, tensor in layer.items()} == PARTS
    rest = load_file(directory / "model.safetensors")
    rest = {name: tensor for name, tensor in rest.items() if name.rpartition(".")[0] not in layers}
    assert all(tensor.is_floating_point() for tensor in rest.values())  # by which vLLM knows what is packed
    assert "score.weight" in rest


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_documented_arithmetic_gives_the_loaded_weights(
    desc_act: bool, artifact: tuple[Path, int, int], tmp_path: Path
) -> None:
    directory, bits, size = artifact
    if desc_act:
        source = save_model(tmp_path / "float", CONFIGS["qwen2"])
        directory = tmp_path / "packed"
        quantize_gptq(source, directory, CALIBRATION[:16], bits=bits, group_size=size, desc_act=True)
    loaded = load_artifact(directory)[0]
    for name, layer in packed_layers(directory).items():
        assert torch.equal(dequantized(layer, bits), loaded.get_parameter(f"{name}.weight"))


def test_zero_points_and_groups_are_those_that_symmetric_kernels_assume(
    artifact: tuple[Path, int, int],
) -> None:
    directory, bits, size = artifact
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq")
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (
        bits,
        size,
        True,
        False,
    )
    for layer in packed_layers(directory).values():
        assert values(layer["qzeros"], bits, 1).unique().tolist() == [2 ** (bits - 1) - 1]
        inputs = torch.arange(len(layer["g_idx"]), dtype=torch.int32)
        assert torch.equal(layer["g_idx"], inputs // size if size > 0 else inputs * 0)


def test_every_setting_is_one_that_the_quantizer_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It swallows any keyword, so that a misspelt one would do nothing, and say nothing."""
    from optimum.gptq import GPTQQuantizer

    class AskedError(Exception):
        pass

    def asked(model: Any, stack: str, batches: Any, settings: dict[str, Any], *rest: Any) -> None:
        raise AskedError(*settings)

    monkeypatch.setattr("llmkd.quantize.run_gptq", asked)
    with pytest.raises(AskedError) as found:
        quantize_gptq(
            save_model(tmp_path / "m", CONFIGS["llama"]), tmp_path / "out", CALIBRATION, group_size=32
        )
    known = inspect.signature(GPTQQuantizer.__init__).parameters
    assert (
        {"bits", "group_size", "sym", "desc_act"} <= set(found.value.args) <= set(known) - {"args", "kwargs"}
    )
