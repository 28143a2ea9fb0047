"""A student trains from what was given to it: without data of its own, from a bucket, from less."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from common.cache.reader import CacheReader
from common.cache.subset import GROUPS, parse_arrays
from common.cache.transfer import transfer
from common.cache.writer import CacheWriter
from common.data.open import open_source
from common.errors import MismatchError
from common.images import image_bytes
from student_train.cli import main
from student_train.train import train
from tests.student_train.conftest import STUDENT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def self_contained(cache, shapes, tmp_path_factory):
    """The cache with its image files, and no word about where its data was."""
    source, out = open_source(str(shapes)), str(tmp_path_factory.mktemp("given") / "l1")
    samples = {sample.sample_id: sample for sample in source}
    with CacheReader(str(cache)) as whole:
        changes = {"with_images": True, "data_source": None}
        writer = CacheWriter.open(out, whole.manifest.model_copy(update=changes), block_rows=300)
        records = [whole.read_record(index) for index in range(whole.num_samples)]
        for part, seal in whole.seals.items():
            mine = records[seal.first_sample : seal.first_sample + seal.num_samples]
            given = [_with_files(record, samples[record.sample_id], source.image_root) for record in mine]
            writer.write_part(part, given, first_sample=seal.first_sample, num_samples=seal.num_samples)
        writer.finalize()
    return out


def _with_files(record, sample, root):
    encoded = {
        hashlib.sha256(data).hexdigest(): data for data in (image_bytes(i, root) for i in sample.images)
    }
    visual = tuple(dataclasses.replace(v, encoded=encoded[v.image_sha256]) for v in record.visual)
    return dataclasses.replace(record, visual=visual)


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("raw/") or k == "loss"} for line in lines]


def test_a_cache_with_images_trains_as_with_the_data(config, self_contained, shapes, tmp_path):
    train(config.model_copy(update={"cache": (self_contained,), "data": str(shapes)}))
    train(config.model_copy(update={"cache": (self_contained,), "out": str(tmp_path / "other")}))
    assert losses(config.out) == losses(tmp_path / "other")


def test_without_its_text_a_cache_trains_as_with_it(config, self_contained, shapes, tmp_path, capsys):
    bare = str(tmp_path / "bare" / "l1")
    transfer([self_contained], bare, keep=set(GROUPS) - {"text", "images"})
    train(config.model_copy(update={"cache": (self_contained,)}))
    changes = {"cache": (bare,), "data": str(shapes), "out": str(tmp_path / "other")}
    train(config.model_copy(update=changes))
    assert losses(config.out) == losses(tmp_path / "other")
    other = tmp_path / "other.json"
    other.write_text(shapes.read_text().replace("what", "which"))
    assert other.read_text() != shapes.read_text()
    changes |= {"data": str(other), "image_root": str(shapes.parent), "out": str(tmp_path / "wrong")}
    with pytest.raises(MismatchError, match="not what the teacher read"):
        train(config.model_copy(update=changes))
    assert main(["--cache", bare, "--student", STUDENT, "--dry-run"]) == 2
    assert "name it with --data" in capsys.readouterr().err


def test_less_of_a_cache_trains(self_contained, tmp_path):
    part = str(tmp_path / "part" / "l1")
    transfer([self_contained], part, num_samples=10, keep=parse_arrays("topk,images"))
    assert len(list(Path(part, "seals").glob("*/zarr.json"))) == 1
    flags = ["--max-steps", "2", "--no-tensorboard", "--log-steps", "1"]
    assert main(["--cache", part, "--student", STUDENT, "--out", str(tmp_path / "run"), *flags]) == 0
    assert all("raw/visual_kl" not in line for line in losses(tmp_path / "run"))


def test_a_cache_in_a_bucket_trains_like_one_on_disk(config, self_contained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    from scripts.loopback_s3 import serve_bucket_apart, use

    copy = {"CASCACHE_COPY": str(tmp_path / "copy"), "CASCACHE_COPY_BYTES": "300000"}
    with serve_bucket_apart() as environment, use(environment | copy):
        transfer([self_contained], "s3://caches/team/l1")
        flags = ["--recipe", config.recipe, "--log-steps", "1", "--no-tensorboard"]
        common = ["--student", STUDENT, *flags]
        assert main(["--cache", "s3://caches/team/l1", "--out", str(tmp_path / "remote"), *common]) == 0
    assert main(["--cache", self_contained, "--out", str(tmp_path / "local"), *common]) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert 0 < sum(p.stat().st_size for p in (tmp_path / "copy").glob("??/*")) <= 300_000 * 1.1
