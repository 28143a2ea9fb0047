"""Broken caches end in an error of ours; what once did not stands here, described by what was changed."""

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cache import layout, seals
from scripts import fuzz_cache
from scripts.fuzz_mutations import DEEP, DOUBLE, Mutation, draw, mutate

CODEC = ("codecs", 0, "configuration", "codecs", 0)
ARRAYS = ("attributes", "arrays")
TOKENS = "{part}/sample_tokens/zarr.json"

ONCE_ACCEPTED = {
    "a probability above one": Mutation("values", "{part}/visual_scalar_steps", (0, "set", 3), 65535, True),
    "a kept id of no probability": Mutation(
        "values", "{part}/response_scalar_steps", (0, "set", 0), -(2**31), True
    ),
    "a tail above one": Mutation("values", "{part}/response_scalar_steps", (0, "fill", 0), 499, True),
    "an endless step": Mutation("json", "zarr.json", ("attributes", "encoding", "logit_step"), 1e308, True),
    "a step of nothing": Mutation(
        "json", "zarr.json", ("attributes", "encoding", "logit_step"), 1e-320, True
    ),
    "other ids in the index": Mutation("values", "{index}/text", (0, "add", 5), 1, True),
    "other lengths in the index": Mutation("values", "{index}/samples", (0, "add", 17), 1, True),
    "numbers backwards": Mutation(
        "json", "{index}/blocks/zarr.json", (*CODEC, "configuration"), {"endian": "big"}, True
    ),
    "a key twice": Mutation("json", TOKENS, ("data_type",), DOUBLE, True),
    "an endless scale": Mutation("values", "{part}/image_factor_scale", (0, "set", 0), 1e38, True),
    "a part beyond the plan": Mutation("json", "zarr.json", ("attributes", "part_samples"), 2**31, True),
}

ONCE_ACCEPTED_WITH_DICTIONARIES = {
    "a negative place": Mutation("values", "{part}/response_dictionary", (0, "set", 0), -1, True),
    "hidden states without end": Mutation("values", "{part}/image_hidden_scale", (0, "set", 0), 1e38, True),
    "a dictionary too long": Mutation("values", "{part}/response_dictionary_sizes", (0, "add", 0), 1, True),
    "half an image's entry": Mutation(
        "json", "{part}/zarr.json", (*ARRAYS, "image_keys", "lengths"), [7], True
    ),
    "a file of another hash": Mutation("values", "{part}/image_files", (0, "add", 3), 1, True),
    "codes outside it": Mutation("values", "{part}/response_codes", (0, "fill", 0), 499, True),
    "a sum without end": Mutation("values", "{part}/response_scalars", (0, "fill", 0), float("inf"), True),
}

ONCE_CRASHED = {
    "a codec named by a list": Mutation("json", TOKENS, (*CODEC, "name"), [[]], True),
    "a plan beyond all memory": Mutation(
        "json", "zarr.json", ("attributes", "samples", "num_samples"), 10**12, True
    ),
    "lists in lists": Mutation("json", TOKENS, ("data_type",), DEEP, True),
    "a chunk that says it is longer": Mutation(
        "chunk", "{part}/sample_text/c.0.0", (0, 12, 3), 2**31 - 1, True
    ),
    "a pipe": Mutation("file", "{part}/zarr.json", (), "pipe", False),
    "a linked part": Mutation("file", "{part}/sample_tokens/c.0.0", (), "parent link", False),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "l1"
    return path, fuzz_cache.make_cache(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "l2"
    return path, fuzz_cache.make_cache(path, 1)


def outcome(pristine, root, mutation):
    path, truth = pristine
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(path, root)
    mutate(root, mutation)
    return fuzz_cache.judge(root, truth, resealed=mutation.sealed)


@pytest.mark.parametrize("name", [*ONCE_ACCEPTED, *ONCE_CRASHED])
def test_what_once_failed_is_refused(pristine, tmp_path, name):
    assert outcome(pristine, tmp_path / "l1", (ONCE_ACCEPTED | ONCE_CRASHED)[name]) == "refused"


@pytest.mark.parametrize("name", ONCE_ACCEPTED_WITH_DICTIONARIES)
def test_what_once_failed_in_another_encoding_is_refused(other, tmp_path, name):
    assert outcome(other, tmp_path / "l1", ONCE_ACCEPTED_WITH_DICTIONARIES[name]) == "refused"


def test_an_unused_image_index_is_refused(pristine, tmp_path):
    path, _ = pristine
    root = tmp_path / "l1"
    shutil.copytree(path, root)
    for name in ("image_columns", "image_keys", "image_errors", "image_tiles", "image_factor"):
        mutate(root, Mutation("json", "{part}/zarr.json", ("attributes", "arrays", name), "remove!", True))
    assert fuzz_cache.judge(root, {}, resealed=True) == "refused"


def test_the_judge_tells_right_from_wrong(pristine, tmp_path):
    same = Mutation("json", "index/zarr.json", ("attributes", "num_blocks"), None, False)
    path, truth = pristine
    shutil.copytree(path, tmp_path / "l1")
    assert fuzz_cache.judge(tmp_path / "l1", truth, resealed=False) == "accepted"
    other = {name: truth[next(iter(truth))] for name in truth}
    assert fuzz_cache.judge(tmp_path / "l1", other, resealed=False) == "wrong"
    assert fuzz_cache.judge(tmp_path / "l1", other, resealed=True) == "accepted"
    assert outcome(pristine, tmp_path / "l2", same) == "refused"


def test_a_chunk_that_was_not_sealed_is_refused(pristine, tmp_path):
    """Whole, with a checksum that fits, under the seal of another: the values of a swap between parts."""
    changed = Mutation("values", "{part}/sample_tokens", (0, "add", 0), 1, False)
    assert outcome(pristine, tmp_path / "l1", changed) == "refused"


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_mutations_are_refused_or_harmless(pristine, other, tmp_path_factory, seed):
    path, truth = (pristine, other)[seed % 2]
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    mutation = draw(np.random.default_rng(seed), path)
    for stale in (root, root.with_name("fuzzed-aside")):
        if stale.is_symlink():
            stale.unlink()
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(path, root)
    found = fuzz_cache.try_one(root, truth, mutation)
    assert found.split(":")[0] in ("refused", "accepted", "void"), f"{mutation}: {found}"


def test_mutations_are_a_function_of_the_seed(pristine):
    path, _ = pristine
    first, second = ([draw(np.random.default_rng([7, i]), path) for i in range(20)] for _ in range(2))
    assert [repr(m) for m in first] == [repr(m) for m in second]


def test_a_short_run_counts(tmp_path):
    found = fuzz_cache.run(2.0, seed=3)
    assert found["mutations"] > 0
    assert found["crashes"] == found["accepted_wrong"] == found["accepted_insane"] == 0
    assert 0 < found["max_rss_mb"] < 2048


def test_names_of_parts_have_one_spelling():
    assert [layout.is_seal_name(n) for n in ("00012", "123456", "12", "000012", "0001٣", "-0001")] == [
        *(True, True, False, False, False, False)
    ]
    assert seals.MAX_MANIFEST_BYTES < seals.MAX_SEAL_BYTES
