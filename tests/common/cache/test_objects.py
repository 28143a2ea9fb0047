"""Caches in an object store: an S3 server of our own, spoken to through obstore."""

import threading

import numpy as np
import pytest

obstore = pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")

from common.cache.local_copy import default_copy  # noqa: E402
from common.cache.objects import LocalCopy, ObjectStore  # noqa: E402
from common.cache.places import open_store  # noqa: E402
from common.cache.reader import CacheReader  # noqa: E402
from common.cache.seals import read_seal  # noqa: E402
from common.cache.transfer import transfer  # noqa: E402
from common.cache.verify import repair, verify  # noqa: E402
from common.cache.writer import CacheWriter  # noqa: E402
from common.errors import CacheError, ConfigError, MismatchError, PartCorrupt  # noqa: E402
from tests.common.cache.records import assert_same_record, make_manifest, make_records  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def bucket():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        import urllib.request

        request = urllib.request.Request(f"http://{host}:{port}/caches", method="PUT")
        request.add_header(
            "Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
        )
        urllib.request.urlopen(request).close()
        yield "s3://caches"
    server.stop()


@pytest.fixture(autouse=True)
def _copy(tmp_path, monkeypatch):
    monkeypatch.setenv("CASCACHE_COPY", str(tmp_path / "copy"))


def records_of(part):
    return make_records(np.random.default_rng(part), 3, first=3 * part)


def write(path, parts=(0, 1), **changes):
    cache = CacheWriter.open(path, make_manifest(**changes), block_rows=30)
    for part in parts:
        cache.write_part(part, records_of(part), first_sample=3 * part, num_samples=3)
    return cache


def check(path):
    with CacheReader(path) as cache:
        for part in range(2):
            for record in records_of(part):
                assert_same_record(cache.read_record(record.sample_id), record, step=1 / 16)


def test_written_to_and_read_from_a_bucket(bucket):
    path = f"{bucket}/direct"
    write(path).finalize()
    check(path)
    assert not verify(path).problems


def test_push_and_pull(bucket, tmp_path):
    write(str(tmp_path / "l1")).finalize()
    done = transfer([str(tmp_path / "l1")], f"{bucket}/pushed")
    assert done.copied == (0, 1)
    assert transfer([str(tmp_path / "l1")], f"{bucket}/pushed").kept == (0, 1)
    assert transfer([f"{bucket}/pushed"], str(tmp_path / "back")).copied == (0, 1)
    check(f"{bucket}/pushed")
    check(str(tmp_path / "back"))
    assert not verify(str(tmp_path / "back")).problems


def test_of_two_writers_one_seals(bucket):
    path = f"{bucket}/contested"
    seals, barrier = [], threading.Barrier(3)

    def work():
        barrier.wait()
        seals.append(write(path, parts=(0,)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seals) == 3
    assert len(ObjectStore(path).names("parts")) == 2
    assert verify(path).ok


def test_damage_in_the_bucket_is_found_and_repaired(bucket):
    path = f"{bucket}/damaged"
    cache = write(path)
    store = ObjectStore(path)
    key = f"parts/{read_seal(store, 1).directory}/response_codes/c.0.0"
    data = bytearray(store.read(key))
    data[3] ^= 1
    obstore.put(store._store, key, bytes(data))
    assert verify(path).bad_parts == [1]
    with pytest.raises(CacheError):
        CacheReader(path).read_record("sample-4")
    assert repair(verify(path)) == [1]
    cache.write_part(1, records_of(1), first_sample=3, num_samples=3)
    assert not verify(path).problems
    check(path)


def test_the_local_copy_saves_requests_and_survives_damage(bucket, tmp_path):
    path = f"{bucket}/copied"
    write(path).finalize()
    check(path)
    copies = [p for p in (tmp_path / "copy").glob("??/*") if p.is_file()]
    assert copies
    for copy in copies:
        copy.write_bytes(b"torn" + copy.read_bytes()[4:-3])
    check(path)
    assert len(list((tmp_path / "copy").glob("??/*"))) == len(copies)


def test_the_local_copy_is_bounded(tmp_path):
    copy = LocalCopy(tmp_path / "bounded", 10_000)
    for i in range(200):
        copy.put(f"name-{i}", bytes(500))
    copy.trim()
    assert sum(p.stat().st_size for p in copy.directory.glob("??/*")) <= 10_000
    assert copy.get("name-199") == bytes(500)
    assert copy.get("name-0") is None


def test_several_processes_share_a_copy(tmp_path):
    copies = [LocalCopy(tmp_path / "shared", 20_000) for _ in range(4)]
    wrong = []

    def work(copy, seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            name = int(rng.integers(30))
            found = copy.get(str(name))
            if found is None:
                copy.put(str(name), bytes([name]) * 900)
            elif found != bytes([name]) * 900:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(copy, i)) for i, copy in enumerate(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_merge_of_parts_dumped_apart(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    write(paths[0], parts=(0,))
    write(paths[1], parts=(1,))
    assert transfer([paths[0]], str(tmp_path / "half")).missing == (1,)
    done = transfer(paths, str(tmp_path / "whole"))
    assert (done.copied, done.missing) == ((0, 1), ())
    check(str(tmp_path / "whole"))
    assert not verify(str(tmp_path / "whole")).problems


def test_merge_refuses_another_identity_and_damage(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    write(paths[0], parts=(0,))
    write(paths[1], parts=(1,), vocab_size=200)
    with pytest.raises(MismatchError, match="vocab_size: found 200, wanted 300"):
        transfer(paths, str(tmp_path / "whole"))
    seal = read_seal(tmp_path / "a", 0)
    victim = tmp_path / "a" / "parts" / seal.directory / "sample_text" / "c.0.0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(PartCorrupt, match="verify"):
        transfer([paths[0]], str(tmp_path / "again"))


def test_verify_proves_the_bucket_and_not_the_local_copy(bucket):
    path = f"{bucket}/behind-a-copy"
    write(path).finalize()
    check(path)
    store = ObjectStore(path)
    key = f"parts/{read_seal(store, 1).directory}/response_codes/c.0.0"
    data = bytearray(store.read(key))
    data[3] ^= 1
    obstore.put(store._store, key, bytes(data))
    assert verify(path).bad_parts == [1]


def test_no_copy_means_none(bucket, tmp_path):
    write(f"{bucket}/uncopied", parts=(0,))
    store = ObjectStore(f"{bucket}/uncopied")
    store.open(f"parts/{read_seal(store, 0).directory}/sample_tokens/c.0.0").read(0, 8)
    assert not list((tmp_path / "copy").glob("??/*"))


def test_a_new_index_is_not_hidden_by_copies_of_the_old_one(bucket):
    path = f"{bucket}/two-indices"
    cache = write(path)
    cache.finalize()
    assert CacheReader(path).num_samples == 6
    store = ObjectStore(path)
    key = f"parts/{read_seal(store, 1).directory}/response_codes/c.0.0"
    obstore.put(store._store, key, b"damaged")
    assert repair(verify(path)) == [1]
    fresh = make_records(np.random.default_rng(7), 3, first=100)
    cache.write_part(1, fresh, first_sample=3, num_samples=3)
    cache.finalize()
    assert sorted(CacheReader(path).sample_ids)[:3] == ["sample-0", "sample-1", "sample-100"]


@pytest.mark.parametrize("name", ["a?b", "a#b", "a//b", "/a", "a/../b"])
def test_a_name_that_leads_elsewhere_is_refused(bucket, name):
    with pytest.raises(ConfigError, match=r"s3://caches/"):
        open_store(f"{bucket}/{name}")


def test_a_password_in_an_address_is_not_printed():
    with pytest.raises(ConfigError, match=r"^https://host/x\?y") as caught:
        open_store("https://user:secret@host/x?y")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "with its scheme"),
        ({"AWS_ENDPOINT": "host"}, "https://host"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS_ALLOW_HTTP=true"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_named(monkeypatch, variables, says):
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=says):
        open_store("s3://caches/l1")


@pytest.mark.parametrize("url", ["nope://bucket/l1", "s3://"])
def test_an_unknown_address_says_which_there_are(url):
    with pytest.raises(ConfigError, match="s3://, gs://"):
        open_store(url)


def test_without_a_place_for_the_local_copy_nothing_is_copied(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CASCACHE_COPY")
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert default_copy() is None
    assert "no local copy" in caplog.text
    monkeypatch.setenv("CASCACHE_COPY", str(blocked / "x"))
    with pytest.raises(ConfigError, match="CASCACHE_COPY"):
        default_copy()
    monkeypatch.setenv("CASCACHE_COPY", str(tmp_path / "copy"))
    monkeypatch.setenv("CASCACHE_COPY_BYTES", "2GB")
    assert default_copy().max_bytes == 2 * 10**9


def test_a_user_without_a_home_reads_all_the_same(monkeypatch):
    for variable in ("CASCACHE_COPY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert default_copy() is None
