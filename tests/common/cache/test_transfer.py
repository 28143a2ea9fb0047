"""Giving and taking caches: what is interrupted goes on, less of a cache is a cache, all is proven."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from common.cache import landing, layout
from common.cache.cli import main
from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.store import LocalStore
from common.cache.subset import covering_parts, held_groups, parse_arrays, parse_samples, subset_manifest
from common.cache.transfer import transfer
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.errors import ConfigError, MismatchError, PartCorrupt
from tests.common.cache.records import assert_same_record, make_manifest, make_records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

STEP = 1 / 16


@pytest.fixture(scope="module", autouse=True)
def _no_power_cuts():
    """Forcing thousands of small files to the disk is most of the time, and not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: None)
        yield


def full_records(part, count=3):
    """Records with everything that a cache can hold."""
    rng = np.random.default_rng(part)
    records = []
    hidden = {}
    for record in make_records(rng, count, first=count * part):
        visual = []
        for image in record.visual:
            states = hidden.setdefault(image.key, rng.normal(size=(9, 12)).astype(np.float32))
            visual.append(dataclasses.replace(image, hidden=states))
        records.append(dataclasses.replace(record, visual=tuple(visual)))
    return records


def full_manifest(**changes):
    return make_manifest(num_samples=12, store="both", **changes)


def write(path, parts=range(4), **changes):
    cache = CacheWriter.open(str(path), full_manifest(**changes), block_rows=30)
    for part in parts:
        cache.write_part(part, full_records(part), first_sample=3 * part, num_samples=3)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("given") / "l1")


def without(record, lost):
    """The slow twin of leaving arrays out: on the record itself."""
    none = {"visual": "topk", "relation": "factor", "hidden": "hidden"}
    fields = {none[group]: None for group in lost}
    return dataclasses.replace(record, visual=tuple(dataclasses.replace(v, **fields) for v in record.visual))


def check(path, lost=(), parts=range(4)):
    with CacheReader(path) as cache:
        assert cache.num_samples == 3 * len(parts)
        for part in parts:
            for record in full_records(part):
                assert_same_record(cache.read_record(record.sample_id), without(record, lost), step=STEP)
    assert not verify(path).problems


def test_the_first_samples_are_whole_parts_with_their_seals(source, tmp_path):
    target = str(tmp_path / "some")
    done = transfer([source], target, num_samples=4)
    assert (done.copied, done.missing, done.num_parts) == ((0, 1), (), 4)
    check(target, parts=range(2))
    for part in range(2):
        key = layout.seal_key(part)
        assert LocalStore(Path(target)).read(key) == LocalStore(Path(source)).read(key)
    assert transfer([source], target).copied == (2, 3)
    check(target)


@pytest.mark.parametrize(
    ("asked", "lost"),
    [
        ("topk", ("visual", "relation", "hidden")),
        ("topk,visual", ("relation", "hidden")),
        ("topk,relation", ("visual", "hidden")),
        ("topk,hidden,visual", ("relation",)),
        ("topk,visual,relation,hidden,images", ()),
    ],
)
@pytest.mark.parametrize("profile", ["pcodec", "portable"])
def test_a_cache_without_some_arrays_is_what_a_dump_without_them_is(tmp_path, asked, lost, profile):
    source, target = write(tmp_path / "l1", range(2), profile=profile), str(tmp_path / "less")
    transfer([source], target, keep=parse_arrays(asked))
    check(target, lost, range(2))
    with CacheReader(target) as cache, CacheReader(source) as whole:
        assert held_groups(cache.manifest) == tuple(g for g in held_groups(whole.manifest) if g not in lost)
        for part, seal in cache.seals.items():
            old = whole.seals[part]
            document = whole.store.read(layout.seal_key(part))
            assert seal.derived_from == (hashlib.sha256(document).hexdigest() if lost else None)
            anew = {"zarr.json", "image_columns/c.0.0", "image_columns/zarr.json"} if lost else set()
            assert all(old.files[name] == seal.files[name] for name in seal.files.keys() - anew)


@pytest.mark.parametrize("profile", ["pcodec", "portable"])
def test_without_text_hashes_stay(tmp_path, profile, capsys):
    source, target = write(tmp_path / "l1", range(2), profile=profile), str(tmp_path / "less")
    assert main(["pull", source, target, "--strip-text", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == [2, 3]
    with CacheReader(target) as cache:
        assert cache.manifest.without_text
        for number in range(cache.num_blocks):
            block = cache.read_block(number)
            for index, sample_id in enumerate(block.sample_ids):
                record = next(r for p in range(2) for r in full_records(p) if r.sample_id == sample_id)
                shown, held = np.zeros_like(record.token_ids), block.record(index)
                for span in record.spans:
                    if span.kind == "image":
                        shown[span.start : span.stop] = record.token_ids[span.start : span.stop]
                assert np.array_equal(held.token_ids, shown)
                told = hashlib.sha256(record.token_ids.astype("<i4").tobytes()).digest()
                assert block.token_hash(index) == told
                blanked = dataclasses.replace(record, token_ids=shown)
                assert_same_record(held, blanked, step=STEP)
    assert not verify(target).problems
    again = str(tmp_path / "again")
    transfer([target], again, keep=parse_arrays("topk"))
    assert not verify(again).problems
    assert CacheReader(again).read_block(0).token_hash(0) == CacheReader(target).read_block(0).token_hash(0)


def test_the_teachers_own_words_cannot_be_told_again():
    manifest = full_manifest(capture={"responses": "teacher"})
    with pytest.raises(ConfigError, match="teacher's own"):
        subset_manifest(manifest, parse_arrays("topk") - {"text"})


def test_what_was_left_out_of_a_subset_is_remembered():
    once = subset_manifest(full_manifest(), parse_arrays("topk,visual"))
    twice = subset_manifest(once, parse_arrays("topk"))
    assert once.derived_from.left_out == ("relation", "hidden")
    assert twice.derived_from.left_out == ("visual", "relation", "hidden")
    assert twice.derived_from.identity_sha256 == layout.identity_sha256(full_manifest())


def test_a_cache_holds_one_subset_of_arrays(source, tmp_path):
    transfer([source], str(tmp_path / "less"), keep=parse_arrays("topk"))
    with pytest.raises(MismatchError, match=r"capture\.positions: found 'response'"):
        transfer([source], str(tmp_path / "less"))


@pytest.mark.parametrize("keep", ["topk,visual,relation,hidden,images", "topk"])
def test_an_interrupted_copy_goes_on(source, tmp_path, monkeypatch, keep):
    target, real, seen = str(tmp_path / "again"), LocalStore.pieces, []

    def pieces(self, key):
        seen.append(key)
        if len(seen) > 60:
            raise KeyboardInterrupt
        return real(self, key)

    monkeypatch.setattr(LocalStore, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        transfer([source], target, keep=parse_arrays(keep), jobs=1)
    monkeypatch.setattr(LocalStore, "pieces", real)
    done = transfer([source], target, keep=parse_arrays(keep), jobs=4)
    assert done.reused_bytes > 0
    assert done.kept
    check(target, () if "visual" in keep else ("visual", "relation", "hidden"))


def test_what_an_interrupted_copy_left_is_proven_again(source, tmp_path):
    target = tmp_path / "tampered"
    CacheWriter.open(str(target), full_manifest())
    seal = read_seal(Path(source), 0)
    for place in ("parts", ".writing"):
        directory = target / place / seal.directory / "sample_text"
        directory.mkdir(parents=True)
        size = seal.files["sample_text/c.0.0"].size_bytes
        (directory / "c.0.0").write_bytes(bytes(size))
        (directory / "c.0.0.123-abc").write_bytes(b"torn")
    assert transfer([source], str(target)).reused_bytes == 0
    assert not [p for p in verify(str(target)).problems if p.kind != "unsealed"]


def test_a_damaged_source_is_refused_and_nothing_is_sealed(tmp_path):
    source = write(tmp_path / "l1", range(1))
    seal = read_seal(Path(source), 0)
    for name in ("response_codes/c.0.0", "image_columns/c.0.0"):
        victim = Path(source) / "parts" / seal.directory / name
        data = victim.read_bytes()
        for damage in (data[:-1] + bytes([data[-1] ^ 1]), data + b"?", data[:-1]):
            victim.write_bytes(damage)
            for keep in ("topk,visual,relation,hidden", "topk"):
                target = tmp_path / name.replace("/", "-") / str(len(damage)) / str(damage[-1]) / keep
                with pytest.raises(PartCorrupt, match="not what was sealed"):
                    transfer([source], str(target), keep=parse_arrays(keep))
                assert not [p for p in (target / "seals").iterdir() if p.is_dir()]
        victim.write_bytes(data)


def test_the_unsealed_tail_is_missing_not_wrong(tmp_path):
    source, target = write(tmp_path / "l1", (0, 2)), str(tmp_path / "copy")
    assert transfer([source], target).missing == (1, 3)
    with CacheReader(target) as cache:
        assert not cache.complete
        assert cache.num_samples == 6
    write(source, (1,))
    done = transfer([source], target)
    assert (done.copied, done.kept, done.missing) == ((1,), (0, 2), (3,))
    check(target, parts=(0, 1, 2))


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_samples, "10"),
        (parse_samples, "first:0"),
        (parse_samples, "last:3"),
        (parse_arrays, "visual"),
        (parse_arrays, "topk,pictures"),
    ],
)
def test_what_is_not_understood_is_refused(parse, text):
    with pytest.raises(ConfigError, match="give"):
        parse(text)


def test_covering_parts_cover():
    manifest = full_manifest()
    assert [len(covering_parts(manifest, n)) for n in (1, 3, 4, 12, 99, None)] == [1, 1, 2, 4, 4, 4]


def run(capsys, *argv):
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_levels_from_place_to_place(tmp_path, capsys):
    for name in ("l1", "l2"):
        write(tmp_path / "zarr" / name)
    place, back = str(tmp_path / "zarr"), str(tmp_path / "back")
    (tmp_path / "zarr" / "notes").mkdir()
    code, answer = run(
        capsys, "pull", place, back, "--level", "l2", "--samples", "first:5", "--arrays", "topk"
    )
    assert (code, answer["l2"]["copied"], answer["l2"]["complete"]) == (0, [0, 1], False)
    code, answer = run(capsys, "ls", back)
    assert code == 1
    (level,) = answer["levels"]
    assert (level["name"], level["parts"], level["samples"], level["arrays"]) == (
        "l2",
        "2 of 4",
        6,
        ["topk", "text"],
    )
    code, answer = run(capsys, "info", f"{back}/l2")
    assert (answer["complete"], answer["left_out"]) == (False, ["visual", "relation", "hidden"])
    assert "holds 6 of 12 planned samples" in answer["partial"]
    code, answer = run(capsys, "ls", place)
    assert (code, [level["name"] for level in answer["levels"]]) == (0, ["l1", "l2"])
    assert main(["ls", f"{place}/l1"]) == 0
    assert "4 of 4" in capsys.readouterr().out
    assert main(["ls", str(tmp_path / "zarr" / "notes")]) == 2


def test_large_files_go_in_pieces(bucket, source, monkeypatch):
    monkeypatch.setattr(landing, "ONE_PUT_BYTES", 100)
    transfer([source], f"{bucket}/pieces", num_samples=3)
    check(f"{bucket}/pieces", parts=range(1))


def test_an_interrupted_push_goes_on(bucket, source, tmp_path, monkeypatch):
    target, real, seen = f"{bucket}/again", LocalStore.pieces, []

    def pieces(self, key):
        seen.append(key)
        if len(seen) > 60:
            raise KeyboardInterrupt
        return real(self, key)

    monkeypatch.setattr(LocalStore, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        transfer([source], target, jobs=1)
    monkeypatch.setattr(LocalStore, "pieces", real)
    done = transfer([source], target)
    assert done.reused_bytes > 0
    assert done.kept
    check(target)
    less = str(tmp_path / "less")
    transfer([target], less, keep=parse_arrays("topk"), num_samples=3)
    check(less, ("visual", "relation", "hidden"), range(1))
