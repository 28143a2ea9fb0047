import io
import json
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import json_file
from common.data.index import Strings, unique_ids
from common.data.llava_json import scan_array
from common.data.open import open_source, recorded_path
from common.data.source import SampleSource
from common.errors import ConfigError, DataError
from schemas.sample import ImageRef


def entry(name=None, image="a.png", answer="A cat."):
    mark = "<image>\n" if image else ""
    found = {"conversations": [{"from": "human", "value": mark + "What?"}, {"from": "gpt", "value": answer}]}
    return found | ({} if name is None else {"id": name}) | ({"image": image} if image else {})


def llava_file(tmp_path, entries, **options):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries, **options), "utf-8")
    return str(path)


def jsonl_file(tmp_path, entries):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(found) for found in entries), "utf-8")
    return str(path)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(ANY_JSON, max_size=6),
    indent=st.sampled_from([None, 1, 4]),
    ascii_only=st.booleans(),
    window=st.integers(1, 64),
)
def test_scanning_equals_parsing_at_any_window(values, indent, ascii_only, window):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    found = list(scan_array(io.BytesIO(text), name="x", window_bytes=window))
    assert [value for _, _, value in found] == values
    assert [json.loads(text[start:stop]) for start, stop, _ in found] == values


def test_byte_order_mark_and_white_space_are_skipped():
    found = list(scan_array(io.BytesIO(b"\xef\xbb\xbf \n[ 1 ,\t2 ] \n"), name="x", window_bytes=1))
    assert [value for _, _, value in found] == [1, 2]


BROKEN = [
    (b"", 1, 0),
    (b"{}", 1, 0),
    (b'{"id": 1}\n{"id": 2}', 1, 0),
    (b"[", 1, 1),
    (b"[1", 1, 2),
    (b"[1,]", 1, 3),
    (b"[1 2]", 1, 3),
    (b'[\n{"a": 1},\n{"a" 2}\n]', 3, 17),
    (b'[{"a": "x', 1, 7),
    (b"[1]x", 1, 3),
    (b'["\xff"]', 1, 2),
    (b"[" * 100_000, None, None),
]


@pytest.mark.parametrize(("text", "line", "byte"), BROKEN)
@pytest.mark.parametrize("window", [1, 7, 2**20])
def test_broken_files_name_line_and_byte(tmp_path, text, line, byte, window):
    with pytest.raises(DataError) as caught:
        list(scan_array(io.BytesIO(text), name="x", window_bytes=window))
    assert caught.value.reason == "json"
    if line is not None:
        assert f"line {line}, byte {byte}:" in str(caught.value)


@pytest.mark.parametrize("cut", range(5, 400, 13))
def test_a_cut_file_is_refused_at_opening(tmp_path, cut):
    text = json.dumps([entry("a"), entry("b"), entry("c")])
    (tmp_path / "data.json").write_text(text[:cut])
    with pytest.raises(DataError, match="line 1, byte") as caught:
        open_source(str(tmp_path / "data.json"))
    assert caught.value.reason == "json"


@pytest.mark.parametrize("write", [llava_file, jsonl_file])
def test_samples_come_in_order_with_ids_and_keys(tmp_path, write):
    source = open_source(
        write(tmp_path, [entry("x"), entry(7, image="b.png"), entry(image=None), entry("y")])
    )
    assert len(source) == 4
    assert list(source.sample_ids()) == ["x", "7", "2", "y"]
    assert [sample.sample_id for sample in source] == ["x", "7", "2", "y"]
    keys = source.image_keys()
    assert keys.dtype == np.int64
    assert keys[0] == keys[3] != keys[1]
    assert keys[2] == 0
    assert source[-1].images == (ImageRef(path="a.png"),)
    with pytest.raises(IndexError):
        source[4]


def test_non_ascii_survives_both_ways(tmp_path):
    for ascii_only in (True, False):
        path = llava_file(tmp_path, [entry("é😀", answer="naïve — ✓"), entry("b")], ensure_ascii=ascii_only)
        source = open_source(path)
        assert source[0].turns[1].parts == ("naïve — ✓",)
        assert source.sample_ids()[0] == "é😀"
        assert source[1].sample_id == "b"


@pytest.mark.parametrize("write", [llava_file, jsonl_file])
def test_a_bad_sample_is_refused_alone(tmp_path, write):
    source = open_source(write(tmp_path, [entry("a"), entry("b", answer=""), ["no object"], entry("c")]))
    assert list(source.sample_ids()) == ["a", "b", "2", "c"]
    with pytest.raises(DataError, match=r"entry 1 \(id b, byte \d+\)") as caught:
        source[1]
    assert caught.value.reason == "empty-response"
    with pytest.raises(DataError):
        source[2]
    assert source[3].sample_id == "c"
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize("write", [llava_file, jsonl_file])
def test_repeated_ids_name_both_places(tmp_path, write):
    path = write(tmp_path, [entry("a"), entry("b"), entry("c"), entry("b"), entry("b")])
    with pytest.raises(DataError, match=r"'b' stands at entry 1 and again at entry 3 \(2 such") as caught:
        open_source(path)
    assert caught.value.reason == "duplicate-id"
    numbered = open_source(path + "#number")
    assert list(numbered.sample_ids()) == ["a", "b", "c", "b#2", "b#3"]
    assert numbered.path.endswith("#number")
    assert list(open_source(numbered.path).sample_ids()) == list(numbered.sample_ids())


def test_an_integer_id_and_its_text_are_the_same_id(tmp_path):
    with pytest.raises(DataError, match="entry 0 and again at entry 1"):
        open_source(llava_file(tmp_path, [entry("1"), entry(1)]))


@given(st.lists(st.text(st.characters(exclude_characters="#"), max_size=3), max_size=30))
def test_numbering_makes_ids_unique_and_keeps_firsts(names):
    found = list(unique_ids(Strings.of(names), path="x", duplicates="number"))
    assert len(set(found)) == len(names)
    first = [name not in names[:place] for place, name in enumerate(names)]
    assert [new == old for new, old in zip(found, names, strict=True)] == first


def test_numbering_never_takes_a_name_that_is_there():
    found = unique_ids(Strings.of(["a", "a", "a#2", "a", "a#2", "a#2#2"]), path="x", duplicates="number")
    assert list(found) == ["a", "a#3", "a#2", "a#4", "a#2#3", "a#2#2"]


def test_a_linked_file_keeps_its_name_and_directory(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "0123").write_text(json.dumps([entry("a")]))
    (snapshot / "a.png").write_bytes(b"x")
    (snapshot / "train.json").symlink_to(blobs / "0123")
    source = open_source(str(snapshot / "train.json"))
    assert source.path == str(snapshot / "train.json")
    assert source.image_root == str(snapshot)
    assert open_source(source.path)[0].images[0].path == "a.png"


def test_an_image_root_holds_in_every_directory(tmp_path, monkeypatch):
    (tmp_path / "imgs").mkdir()
    (tmp_path / "train.json").write_text(json.dumps([entry("a")]))
    monkeypatch.chdir(tmp_path)
    assert open_source("train.json", image_root="imgs").image_root == str(tmp_path / "imgs")


def test_broken_lines_name_line_and_byte(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(entry("a")).encode() + b"\n{oops\n")
    with pytest.raises(DataError, match=r"line 2, byte \d+") as caught:
        open_source(str(path))
    assert caught.value.reason == "json"


def test_a_file_changed_under_us_is_noticed(tmp_path):
    path = llava_file(tmp_path, [entry("a"), entry("b")])
    source = open_source(path)
    (tmp_path / "data.json").write_text("x" * 2000)
    with pytest.raises(DataError, match="changed"):
        source[1]


FINGERPRINT_CHANGES = [
    [entry("a"), entry("c")],
    [entry("b"), entry("a")],
    [entry("a"), entry("b", image="c.png")],
    [entry("a"), entry("b", answer="Two cats.")],
    [entry("a"), entry("b", image=None)],
    [entry("a")],
    [entry("a"), entry("b"), entry("c")],
    [entry("a"), entry("b", answer="")],
]


@pytest.mark.parametrize("changed", FINGERPRINT_CHANGES)
def test_fingerprint_changes_with_content(tmp_path, changed):
    before = open_source(llava_file(tmp_path, [entry("a"), entry("b")])).fingerprint()
    assert open_source(llava_file(tmp_path, changed)).fingerprint() != before


def test_fingerprint_ignores_place_and_layout(tmp_path):
    entries = [entry("a"), entry("b", answer="é")]
    here = open_source(llava_file(tmp_path, entries)).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    moved = open_source(llava_file(tmp_path / "elsewhere", entries, indent=2, ensure_ascii=False))
    assert moved.fingerprint() == here == open_source(jsonl_file(tmp_path, entries)).fingerprint()


def test_sources_travel_to_other_processes_and_threads(tmp_path):
    source = open_source(llava_file(tmp_path, [entry(str(i), answer=f"answer {i}") for i in range(200)]))
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy, SampleSource)
    wrong = []

    def check(offset):
        wrong.extend(i for i in range(offset, 200, 4) if copy[i].turns[1].parts != (f"answer {i}",))

    threads = [threading.Thread(target=check, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_image_root_is_found_beside_the_file_or_in_images(tmp_path):
    path = llava_file(tmp_path, [entry("t", image=None), entry("a")])
    assert open_source(path).image_root == str(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    assert open_source(path).image_root == str(tmp_path / "images")
    (tmp_path / "a.png").touch()
    assert open_source(path).image_root == str(tmp_path)
    assert open_source(path, image_root="/").image_root == "/"


def test_unknown_data_lists_the_formats(tmp_path):
    (tmp_path / "data.csv").touch()
    for path in (tmp_path / "data.csv", tmp_path / "gone.json"):
        with pytest.raises(ConfigError, match=r"\.jsonl"):
            open_source(str(path))
    with pytest.raises(ConfigError, match="image root"):
        open_source(llava_file(tmp_path, []), image_root=str(tmp_path / "gone"))


def test_large_files_show_progress_and_stay_compact(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(json_file, "SHOW_PROGRESS_BYTES", 1000)
    source = open_source(llava_file(tmp_path, [entry(f"{i:012d}") for i in range(2000)]))
    assert "index data.json" in capsys.readouterr().err
    assert len(pickle.dumps(source)) < 2000 * 60


@pytest.mark.parametrize(
    "path", [None, "shapes", "shapes:train=9", "hf:owner/name", "s3://bucket/x.json", "gone.json"]
)
def test_what_a_cache_names_is_followed_only_if_it_is_a_file_here(path):
    assert recorded_path(path) is None


def test_a_file_that_a_cache_names_is_followed(tmp_path):
    path = llava_file(tmp_path, [entry("a")])
    assert recorded_path(path) == path
    assert recorded_path(path + "#number") == path + "#number"
