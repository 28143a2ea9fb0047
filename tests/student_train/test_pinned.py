"""A pinned cache is the only one that a student trains from, and the answer comes before any model loads."""

import shutil
import sys

import pytest

from common.cache.trust import root_hash
from common.errors import ConfigError, MismatchError, PartCorrupt
from student_train.cli import main
from student_train.plan import make_plan


def test_the_pinned_cache_is_taken(config, cache):
    root = root_hash(str(cache))
    assert make_plan(config.model_copy(update={"expect": (root,)})).levels[0].path == str(cache)


def test_another_cache_is_refused_before_a_model_loads(config, cache, capsys):
    wanted = "sha256:" + "0" * 64
    before = "student_train.step" in sys.modules
    assert main(["--cache", str(cache), "--expect", wanted, "--student", "no-such-model"]) == 2
    said = capsys.readouterr().err
    assert f"found root {root_hash(str(cache))}, wanted {wanted}" in said
    assert before or "student_train.step" not in sys.modules
    with pytest.raises(MismatchError, match="pinned"):
        make_plan(config.model_copy(update={"expect": (wanted,)}))


def test_one_root_for_each_cache(config, cache):
    root = root_hash(str(cache))
    both = config.model_copy(update={"cache": (str(cache), str(cache)), "expect": (root,)})
    with pytest.raises(ConfigError, match="1 --expect for 2 --cache"):
        make_plan(both)


def test_what_is_no_root_is_refused_at_once(cache, capsys):
    assert main(["--cache", str(cache), "--expect", "sha256:abc"]) == 2
    assert "expect" in capsys.readouterr().err


def test_bytes_behind_intact_seals_are_proven_too(config, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    pinned = {"cache": (str(copy),), "expect": (root_hash(str(cache)),)}
    victim = next(copy.glob("parts/*/sample_tokens/zarr.json"))
    victim.write_bytes(victim.read_bytes() + b" ")
    level = make_plan(config.model_copy(update=pinned)).levels[0]
    with pytest.raises(PartCorrupt, match="bytes"):
        [level.cache.read_block(block) for block in range(level.cache.num_blocks)]
