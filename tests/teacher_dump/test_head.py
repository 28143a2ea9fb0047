"""A head's dtype and quantisation, before and after loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.cache.layout import identity_fields, identity_sha256
from common.errors import ConfigError
from common.relation import head_gram
from schemas.manifest import Manifest
from teacher_dump.config import DumpConfig
from teacher_dump.head import check_quantised_head, head_overrides, quantised_head
from tests.common.cache.records import make_manifest


def test_the_gram_of_a_bfloat16_head_is_accumulated_in_float32():
    """V = 151,936 terms a sum: bfloat16 would stop counting after 256 of them."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(151_936, 32, generator=draw).bfloat16()
    gram = head_gram(weight)
    exact = weight.double().T @ weight.double()
    assert gram.dtype == torch.float32
    assert float((gram - exact).norm() / exact.norm()) < 1e-5
    coarse = exact.bfloat16().double()
    assert float((coarse - exact).norm() / exact.norm()) > 1e-4


def test_caches_from_before_the_field_are_the_same_caches():
    """None is what a dump of the teacher's own dtype writes, and what an older manifest lacks."""
    manifest = make_manifest(num_samples=1)
    document = manifest.model_dump(mode="json")
    del document["teacher"]["head_dtype"]
    old = Manifest.model_validate(document)
    assert "head_dtype" not in identity_fields(manifest)["teacher"]  # type: ignore[operator]
    assert identity_sha256(old) == identity_sha256(manifest)
    teacher = manifest.teacher.model_copy(update={"head_dtype": "float32"})
    assert identity_sha256(manifest.model_copy(update={"teacher": teacher})) != identity_sha256(manifest)


@pytest.mark.parametrize("asked", ["float32", "auto", "bfloat16", "float16"])
def test_the_dtype_is_a_flag_that_workers_get(asked: str):
    config = DumpConfig.model_validate({"head_dtype": asked})
    assert DumpConfig.model_validate_json(config.model_dump_json(by_alias=True)).head_dtype == asked
    assert DumpConfig().head_dtype == "float32"


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_overrides_reach_every_configuration_down_to_the_text_model_s(family: str, tiny_family: Any):
    from transformers import AutoConfig

    path = tiny_family(family)
    given = {"text_config": {"rope_theta": 5}, "other": 1}
    found = head_overrides(str(path), "float32", given)
    assert found["head_dtype"] == found["text_config"]["head_dtype"] == "float32"
    assert (found["text_config"]["rope_theta"], found["other"]) == (5, 1)
    assert "vision_config" not in found
    assert hasattr(AutoConfig.from_pretrained(path), "text_config")


def write_checkpoint(path: Path, tensors: dict[str, torch.Tensor], quantisation: Any = None) -> Path:
    path.mkdir()
    config = {"model_type": "llava"} | ({"quantization_config": quantisation} if quantisation else {})
    (path / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, path / "model.safetensors")
    return path


PLAIN = torch.zeros(4, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"language_model.lm_head.weight": PLAIN}, None),
        ({"model.embed_tokens.weight": PLAIN}, None),
        ({"lm_head.weight": PLAIN.to(torch.float8_e4m3fn)}, "F8_E4M3"),
        ({"lm_head.weight": PLAIN.to(torch.int8)}, "I8"),
        ({"lm_head.qweight": PLAIN.to(torch.int32)}, "qweight"),
        ({"lm_head.weight_packed": PLAIN.to(torch.uint8)}, "weight_packed"),
        ({"model.layers.0.mlp.weight_scale": PLAIN.clone(), "lm_head.weight": PLAIN}, None),
    ],
)
def test_tensors_tell_a_quantised_head(tensors: Any, found: str | None, tmp_path: Path):
    said = quantised_head(write_checkpoint(tmp_path / "model", tensors))
    assert (said is None) == (found is None), said
    assert found is None or found in str(said)


LLMC = "compressed-tensors"


@pytest.mark.parametrize(
    ("quantisation", "quantised"),
    [
        (None, False),
        ({"quant_method": LLMC, "ignore": ["lm_head"]}, False),
        ({"quant_method": LLMC, "ignore": ["re:.*lm_head", "re:vision_tower.*"]}, False),
        ({"quant_method": LLMC, "ignore": ["re:vision_tower.*"]}, True),
        ({"quant_method": LLMC}, True),
        ({"quant_method": "modelopt", "exclude_modules": ["*lm_head*"]}, False),
        ({"quant_method": "modelopt", "exclude_modules": []}, True),
        ({"quant_method": "modelopt", "quantized_layers": {"lm_head": {"quant_algo": "FP8"}}}, True),
        ({"quant_method": "modelopt", "quantized_layers": {"model.x": {"quant_algo": "FP8"}}}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, True),
        ({"quant_method": "awq", "bits": 4}, False),
        ({"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 4}}}, True),
        ({"quant_method": "auto-round"}, False),
        ({"quant_method": "fp8"}, False),
    ],
)
def test_a_configuration_tells_a_quantised_head_before_weights_are_there(
    quantisation: Any, quantised: bool, tmp_path: Path
):
    assert (quantised_head(write_checkpoint(tmp_path / "model", {}, quantisation)) is not None) == quantised


@pytest.mark.parametrize(
    "quantisation",
    [
        "fp8",
        [1],
        {"quant_method": LLMC, "ignore": ["re:(lm_head"]},
        {"quant_method": LLMC, "ignore": [1]},
        {"quant_method": LLMC, "ignore": 1},
        {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": "few"}}},
        {"quant_method": "auto-round", "extra_config": [1]},
    ],
)
def test_a_configuration_of_other_types_is_refused_by_name(quantisation: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as a model's configuration"):
        quantised_head(write_checkpoint(tmp_path / "model", {}, quantisation))


@pytest.mark.parametrize("held", [b"", b"x" * 99])
def test_a_file_that_safetensors_cannot_read_is_named(held: bytes, tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", {})
    (path / "model.safetensors").write_bytes(held)
    with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
        quantised_head(path)


def test_a_quantised_head_is_refused_with_every_flag_to_change(tmp_path: Path):
    path = write_checkpoint(tmp_path / "model", {"lm_head.weight": PLAIN.to(torch.float8_e4m3fn)})
    with pytest.raises(ConfigError, match=r"weight is F8_E4M3.*--head-dtype auto --relation-of hidden"):
        check_quantised_head(path, computes_in="float32", relates_logits=True)
    with pytest.raises(ConfigError, match="use --relation-of hidden"):
        check_quantised_head(path, computes_in=None, relates_logits=True)
    check_quantised_head(path, computes_in=None, relates_logits=False)
