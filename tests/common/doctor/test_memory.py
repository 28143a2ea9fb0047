"""A model's need is read from its files, and held against the memory that there is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.devices import Device
from common.doctor.gpus import check_devices
from common.doctor.memory import check_memory
from common.errors import ConfigError
from common.model_memory import Need, find_dtype, model_need, weight_bytes
from common.models import TINY

GIB = 2**30
SEVEN = Need(weights=15 * GIB, kv=GIB, logits=GIB // 2)


def gpu(total: int | None = 80, free: int | None = None, name: str = "NVIDIA H100", index: int = 0) -> Device:
    free = total if free is None else free
    sizes = [None if each is None else each * GIB for each in (total, free)]
    return Device(index, name, sizes[0], sizes[1], "580.1", "13.0")


@pytest.mark.parametrize("item", [2, 4])
def test_weights_are_counted_from_the_header(item):
    file = TINY / "tiny-l1" / "model.safetensors"
    assert weight_bytes(file, item) == sum(each.numel() * item for each in load_file(file).values())


def test_stored_dtype_does_not_matter_but_integers_stay(tmp_path):
    weights = load_file(TINY / "tiny-student" / "model.safetensors")
    count = sum(each.numel() for each in weights.values())
    save_file({name: each.bfloat16() for name, each in weights.items()}, tmp_path / "half.safetensors")
    assert weight_bytes(tmp_path / "half.safetensors", 4) == 4 * count
    save_file({name: each.char() for name, each in weights.items()}, tmp_path / "int8.safetensors")
    assert weight_bytes(tmp_path / "int8.safetensors", 2) == count


def test_keys_and_values_follow_from_the_configuration():
    need = model_need(TINY / "tiny-l2", dtype="auto", positions=1000)
    assert need.kv == 2 * 4 * 4 * 32 * 4 * 1000  # both, layers, heads, width, bytes, positions
    half = model_need(TINY / "tiny-l2", dtype="bfloat16", positions=1000)
    assert (half.kv, half.weights) == (need.kv // 2, need.weights // 2)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {"torch_dtype": "torch.float16"}}, "float16"),
        ({"dtype": None}, "float32"),
        ({"dtype": "fp8"}, "float32"),
    ],
)
def test_dtype_of_a_configuration(config, dtype):
    assert find_dtype(config) == dtype


def test_a_torn_file_is_named(tmp_path):
    model = shutil.copytree(TINY / "tiny-l1", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
        model_need(model, dtype="auto", positions=1)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="bin weights"):
        model_need(model, dtype="auto", positions=1)
    assert model_need(model, dtype="auto", positions=1, weights=7).weights == 7


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_files_that_an_index_does_not_name_do_not_count(kind, tmp_path):
    model = shutil.copytree(TINY / "tiny-l1", tmp_path / "model")
    (model / "model.safetensors").rename(model / kind)
    need = model_need(model, dtype="auto", positions=1)
    (model / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"a": kind}}))
    for other in ("consolidated", "adapter_model"):
        shutil.copy(model / kind, (model / other).with_suffix(Path(kind).suffix))
    assert model_need(model, dtype="auto", positions=1) == need


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"text_config": [1]}, "text_config that is no JSON object"),
        ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads = 0, wanted"),
        ({"text_config": {"num_hidden_layers": "many"}}, "num_hidden_layers = many"),
        ({"text_config": {"hidden_size": [8]}}, "hidden_size"),
        ({"text_config": {"vocab_size": float("inf")}}, "vocab_size = inf"),
    ],
)
def test_a_configuration_of_other_types_is_refused_by_name(wrong, words, tmp_path):
    model = shutil.copytree(TINY / "tiny-l1", tmp_path / "model")
    (model / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match=words):
        model_need(model, dtype="auto", positions=1)


def test_pickled_weights_count_by_size(tmp_path):
    model = shutil.copytree(TINY / "tiny-l1", tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    size = (model / "pytorch_model.bin").stat().st_size
    assert model_need(model, dtype="auto", positions=1).weights == size


@pytest.mark.parametrize(
    ("devices", "parallel", "status", "cure"),
    [
        ([gpu()], 1, "pass", ""),
        ([gpu(16)], 1, "fail", "--tensor-parallel 2"),
        ([gpu(16), gpu(16)], 2, "pass", ""),
        ([gpu(80, free=4)], 1, "fail", "free the GPU"),
        ([gpu(2)], 1, "fail", "a smaller teacher"),
        ([gpu(21, free=20)], 1, "warn", "--tensor-parallel"),
        ([gpu(80, free=40)], 1, "fail", "--engine-arg gpu_memory_utilization=0.48, or free the GPU"),
        ([gpu(80, free=18)], 1, "fail", "free the GPU"),
        ([gpu(80), gpu(80, free=1)], 1, "pass", ""),
        ([gpu(None)], 1, "skip", ""),
    ],
)
def test_a_model_against_gpus(devices, parallel, status, cure):
    found = check_memory("seven", SEVEN, devices, free_ram=0, parallel=parallel)
    assert found.status == status, found
    assert cure in found.cure


def test_a_total_that_is_unknown_is_skipped_not_taken_for_zero():
    unknown = replace(gpu(free=70), total_bytes=None)
    assert check_memory("seven", SEVEN, [unknown], free_ram=0, parallel=1).status == "skip"


@pytest.mark.parametrize(("free", "status"), [(10 * GIB, "fail"), (64 * GIB, "pass")])
def test_a_model_against_main_memory(free, status):
    assert check_memory("seven", SEVEN, [], free_ram=free, parallel=1).status == status


@pytest.mark.parametrize(
    ("devices", "parallel", "torch", "vllm", "status"),
    [
        ([], 1, "2.13.0+cpu", None, "pass"),
        ([], 2, "2.13.0+cpu", None, "warn"),
        ([], 1, "2.13.0", "0.32.0", "fail"),
        ([], 1, "2.13.0+cpu", "0.32.0+cpu", "pass"),
        ([gpu()], 1, "2.13.0", "0.32.0", "pass"),
        ([gpu()], 1, "2.13.0+cu130", "0.32.0", "pass"),
        ([gpu()], 1, "2.13.0+cpu", None, "fail"),
        ([gpu()], 2, "2.13.0", "0.32.0", "fail"),
        ([gpu(), gpu(name="NVIDIA L4", index=1)], 2, "2.13.0", "0.32.0", "warn"),
    ],
)
def test_gpus_against_the_builds_and_the_number_asked_for(devices, parallel, torch, vllm, status):
    assert check_devices(devices, parallel=parallel, torch=torch, cuda_vllm=vllm).status == status
