"""Caches on the Hugging Face Hub, as far as a stand-in for it goes: every part is one commit."""

import threading

import numpy as np
import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from common.cache.cli import main  # noqa: E402
from common.cache.hub import HubStore  # noqa: E402
from common.cache.places import open_store  # noqa: E402
from common.cache.reader import CacheReader  # noqa: E402
from common.cache.transfer import transfer  # noqa: E402
from common.cache.verify import verify  # noqa: E402
from common.cache.writer import CacheWriter  # noqa: E402
from common.errors import CacheError, ConfigError, PartCorrupt  # noqa: E402
from scripts.loopback_hub import serve_hub  # noqa: E402
from tests.common.cache.records import assert_same_record, make_manifest, make_records  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
URL = "hf://datasets/team/caches/l1"


def records_of(part):
    return make_records(np.random.default_rng(part), 3, first=3 * part, topk=4)


def write(path, parts=(0, 1)):
    cache = CacheWriter.open(path, make_manifest(topk=4))
    for part in parts:
        cache.write_part(part, records_of(part), first_sample=3 * part, num_samples=3)
    return cache


def check(path):
    with CacheReader(path) as cache:
        for part in range(2):
            for record in records_of(part):
                assert_same_record(cache.read_record(record.sample_id), record, step=1 / 16)
    assert not verify(path).problems


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("CASCACHE_COPY", str(tmp_path / "copy"))
    with serve_hub() as (endpoint, repository):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield repository
        huggingface_hub.utils.close_session()


def test_pushed_opened_and_pulled(hub, tmp_path, capsys):
    source = str(tmp_path / "l1")
    write(source).finalize()
    assert main(["push", source, URL]) == 0
    assert hub.commits == 3 + 2 + 1, "the skeleton, two parts, the index"
    check(URL)
    assert main(["ls", "hf://datasets/team/caches"]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert transfer([source], URL).copied == ()
    transfer([URL], str(tmp_path / "back"))
    check(str(tmp_path / "back"))


def test_damage_on_the_hub_is_refused(hub, tmp_path):
    source = str(tmp_path / "l1")
    write(source).finalize()
    transfer([source], URL)
    victim = next(name for name in hub.files if name.endswith("sample_text/c.0.0"))
    hub.files[victim] = hub.files[victim][:-1] + b"?"
    with pytest.raises(PartCorrupt, match="not what was sealed"):
        transfer([URL], str(tmp_path / "back"))
    assert not verify(URL).ok


def test_of_several_creators_one_wins(hub):
    write(URL, parts=())
    won, barrier = [], threading.Barrier(4)

    def work(number):
        barrier.wait()
        won.append(HubStore(URL).create("seals/00000/zarr.json", bytes([number])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]


@pytest.mark.parametrize("url", ["hf://team/caches/l1", "hf://datasets/team", "hf://models/team/caches"])
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match="give hf://datasets/owner/name"):
        open_store(url)


def test_an_unreachable_hub_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CacheError, match="check that the repository exists"):
        CacheReader("hf://datasets/team/caches/l1")
