"""Nothing wrong with a cache stays unseen, and nothing damaged is ever returned as data."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.cache import layout
from common.cache.cli import main
from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.verify import repair, verify
from common.cache.writer import CacheWriter
from common.errors import CacheError, CascacheError, MismatchError, PartCorrupt, PartMissing
from schemas.manifest import FileSeal
from tests.common.cache.records import assert_same_record, make_manifest, make_records


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("pristine") / "l1"
    fill(path)
    return path


def fill(path, **changes):
    manifest = make_manifest(**changes)
    with CacheWriter.open(str(path), manifest, block_rows=30) as cache:
        for part in range(2):
            records = make_records(np.random.default_rng(part), 3, first=3 * part)
            cache.write_part(part, records, first_sample=3 * part, num_samples=3)
        cache.finalize()


@pytest.fixture
def cache(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "l1"))


def truth():
    return {
        r.sample_id: r
        for part in range(2)
        for r in make_records(np.random.default_rng(part), 3, first=3 * part)
    }


def read_all(path):
    """Every record, or the error: what a training run would meet."""
    try:
        with CacheReader(str(path)) as cache:
            return {name: cache.read_record(name) for name in cache.sample_ids}
    except CascacheError as error:
        return error


def harmless(path):
    """Whether what can be read is right: an error, or a subset of the truth."""
    found = read_all(path)
    if isinstance(found, CascacheError):
        return True
    wanted = truth()
    for name, record in found.items():
        assert_same_record(record, wanted[name], step=1 / 16)
    return True


def test_a_healthy_cache_has_no_problems(cache):
    report = verify(str(cache))
    assert report.ok
    assert not report.problems
    assert report.num_records == 6
    assert not verify(str(cache), deep=False).problems


def test_every_flipped_bit_is_found(cache):
    rng = np.random.default_rng(0)
    files = sorted(p for p in cache.rglob("*") if p.is_file())
    for path in files:
        data = bytearray(path.read_bytes())
        if not data:
            continue
        at, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        assert not verify(str(cache)).ok, f"{path} byte {at} bit {bit}"
        assert harmless(cache)
        data[at] ^= 1 << bit
        path.write_bytes(data)
    assert not verify(str(cache)).problems


def test_truncation_missing_and_extra_files_are_found(cache):
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert not verify(str(cache), deep=False).ok, path
        assert harmless(cache)
        path.unlink()
        report = verify(str(cache), deep=False)
        assert not report.ok or path.parts[-3] == "seals" or "index" in path.parts, path
        assert harmless(cache)
        path.write_bytes(data)
        stray = path.with_name("stray")
        stray.write_bytes(b"")
        assert verify(str(cache), deep=False).problems, stray
        stray.unlink()
    assert not verify(str(cache)).problems


def test_swapped_parts_are_found(cache):
    directories = [cache / "parts" / read_seal(cache, part).directory for part in range(2)]
    directories[0].rename(cache / "aside")
    directories[1].rename(directories[0])
    (cache / "aside").rename(directories[1])
    report = verify(str(cache))
    assert report.bad_parts == [0, 1]
    assert verify(str(cache), deep=False).bad_parts


def test_a_reader_refuses_what_changed_places_between_parts(cache):
    """Without hashing files: a chunk is held to its part by the checksum that the part's attributes name."""
    seals = [read_seal(cache, part) for part in range(2)]
    first, second = (cache / "parts" / seal.directory for seal in seals)
    names = sorted(seals[0].files.keys() & seals[1].files.keys())
    swapped = [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()]
    assert sum(name.endswith("c.0.0") for name in swapped) > 5
    for name in swapped:
        a, b = (first / name).read_bytes(), (second / name).read_bytes()
        (first / name).write_bytes(b)
        (second / name).write_bytes(a)
        assert isinstance(read_all(cache), PartCorrupt), name
        (first / name).write_bytes(a)
        (second / name).write_bytes(b)
    first.rename(cache / "aside")
    second.rename(first)
    (cache / "aside").rename(second)
    assert isinstance(read_all(cache), PartCorrupt)


def test_swapped_files_of_equal_size_are_found(cache):
    seal = read_seal(cache, 0)
    base = cache / "parts" / seal.directory
    by_size: dict[int, list[str]] = {}
    for name, file in seal.files.items():
        by_size.setdefault(file.size_bytes, []).append(name)
    pairs = [
        names[:2]
        for names in by_size.values()
        if len(names) > 1 and seal.files[names[0]] != seal.files[names[1]]
    ]
    assert pairs
    for a, b in pairs:
        first, second = (base / a).read_bytes(), (base / b).read_bytes()
        (base / a).write_bytes(second)
        (base / b).write_bytes(first)
        assert verify(str(cache)).bad_parts == [0]
        (base / a).write_bytes(first)
        (base / b).write_bytes(second)


def test_a_part_of_another_cache_is_refused(cache, tmp_path):
    fill(tmp_path / "other", vocab_size=200)
    shutil.copytree(tmp_path / "other" / "parts", cache / "parts", dirs_exist_ok=True)
    shutil.rmtree(cache / "seals" / "00001")
    shutil.copytree(tmp_path / "other" / "seals" / "00001", cache / "seals" / "00001")
    shutil.rmtree(cache / "index")
    assert verify(str(cache)).bad_parts == [1]
    with pytest.raises(MismatchError, match="another cache"):
        CacheReader(str(cache))


def test_repair_and_dump_again(cache):
    seal = read_seal(cache, 1)
    victim = cache / "parts" / seal.directory / "response_codes" / "c.0.0"
    victim.write_bytes(victim.read_bytes()[:-7])
    report = verify(str(cache))
    assert report.bad_parts == [1]
    assert repair(report) == [1]
    writer = CacheWriter.open(str(cache), make_manifest())
    assert writer.sealed == {0}
    records = make_records(np.random.default_rng(1), 3, first=3)
    writer.write_part(1, records, first_sample=3, num_samples=3)
    writer.finalize()
    assert not verify(str(cache)).problems
    assert harmless(cache)
    assert len(read_all(cache)) == 6


def test_a_damaged_manifest_cannot_be_repaired(cache):
    (cache / "zarr.json").write_bytes((cache / "zarr.json").read_bytes().replace(b"llava", b"llavb"))
    report = verify(str(cache))
    assert [p.kind for p in report.problems] == ["manifest"]
    with pytest.raises(CacheError, match="damaged"):
        repair(report)


def rewrite(path, change):
    """Change a document and its checksum with it: what a hostile author would do."""
    attributes = json.loads(path.read_bytes())["attributes"]
    attributes.pop(layout.GUARD, None)
    change(attributes)
    path.write_bytes(layout.guarded_json(attributes))


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../b/zarr.json", "c.0.0"])
def test_no_path_leaves_the_cache(cache, name):
    rewrite(
        cache / "seals" / "00000" / "zarr.json",
        lambda seal: seal["files"].update({name: seal["files"]["zarr.json"]}),
    )
    assert verify(str(cache)).bad_parts == [0]
    with pytest.raises(CacheError):
        read_seal(cache, 0)


@pytest.mark.parametrize("directory", ["../parts/00000-aaaaaa", "00001-aaaaaaaaaaaa", "00000-", "/tmp"])
def test_no_seal_names_a_directory_elsewhere(cache, directory):
    rewrite(cache / "seals" / "00000" / "zarr.json", lambda seal: seal.update(directory=directory))
    with pytest.raises(CacheError, match="repair"):
        read_seal(cache, 0)


def arrays_of(cache):
    seal = read_seal(cache, 0)
    return cache / "parts" / seal.directory


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shape", lambda d: d.update(shape=[2**40, 2**40])),
        ("huge chunk", lambda d: huge(d, 2**31)),
        ("object type", lambda d: d.update(data_type="object")),
        (
            "another codec",
            lambda d: d["codecs"][0]["configuration"]["codecs"].__setitem__(0, {"name": "pickle"}),
        ),
        ("not JSON", None),
        ("negative", lambda d: d.update(shape=[-1, 5])),
    ],
)
def test_hostile_metadata_is_refused_before_memory_is_taken(cache, name, change):
    path = arrays_of(cache) / "sample_tokens" / "zarr.json"
    document = json.loads(path.read_bytes())
    if change is None:
        path.write_bytes(b"{")
    else:
        change(document)
        path.write_text(json.dumps(document))
    shutil.rmtree(cache / "index")
    with pytest.raises(CacheError):
        CacheReader(str(cache))


def huge(document, capacity):
    shape = [document["shape"][0], capacity]
    document["shape"] = document["chunk_grid"]["configuration"]["chunk_shape"] = shape
    document["codecs"][0]["configuration"]["chunk_shape"] = [1, capacity]


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays["sample_tokens"]["lengths"].__setitem__(0, -1),
        lambda arrays: arrays["sample_tokens"]["lengths"].__setitem__(0, 10**12),
        lambda arrays: arrays["sample_spans"].pop("ranks"),
        lambda arrays: arrays["sample_spans"].update(ranks=0),
        lambda arrays: arrays["sample_tokens"].update(ranks=2),
        lambda arrays: arrays["sample_tokens"].update(dtype="float32"),
        lambda arrays: arrays.update(surprise=arrays["sample_tokens"]),
        lambda arrays: arrays.pop("sample_tokens"),
        lambda arrays: arrays.pop("response_codes"),
    ],
)
def test_hostile_part_attributes_are_refused(cache, change):
    rewrite(arrays_of(cache) / "zarr.json", lambda attributes: change(attributes["arrays"]))
    with pytest.raises(CacheError):
        CacheReader(str(cache)).read_block(0).record(0)


def test_damage_met_while_reading_is_an_error(cache):
    reader = CacheReader(str(cache))
    path = arrays_of(cache) / "response_codes" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(CacheError, match="verify"):
        reader.read_block(0)


def test_a_symbolic_link_is_not_a_sealed_file(cache, tmp_path):
    path = arrays_of(cache) / "zarr.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert verify(str(cache), deep=False).bad_parts == [0]


def test_repair_leaves_what_was_sealed_as_it_is_unless_told(cache, capsys):
    """Attributes that another version wrote: every hash fits, and only this reader cannot read them."""
    seal = read_seal(cache, 0)
    document = cache / "parts" / seal.directory / "zarr.json"
    attributes = layout.read_guarded_json(document.read_bytes())
    for used in attributes["arrays"].values():
        del used["chunks"]
    document.write_bytes(layout.guarded_json(attributes))
    files = dict(seal.files)
    size, sha256 = document.stat().st_size, hashlib.sha256(document.read_bytes()).hexdigest()
    files["zarr.json"] = FileSeal(size_bytes=size, sha256=sha256)
    changed = seal.model_copy(update={"files": files})
    (cache / layout.seal_key(0)).write_bytes(layout.guarded_json(changed.model_dump(mode="json")))
    report = verify(str(cache))
    assert report.odd_parts == [0]
    assert any("another version of cascache wrote it" in problem.message for problem in report.problems)
    assert main(["repair", str(cache)]) == 1
    assert "--odd-too" in capsys.readouterr().out
    assert read_seal(cache, 0) == changed
    assert main(["repair", str(cache), "--odd-too"]) == 0
    with pytest.raises(PartMissing):
        read_seal(cache, 0)


def test_verify_of_no_cache_is_an_error_not_a_finding(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a cache" in capsys.readouterr().err
