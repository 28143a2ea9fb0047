import io
import json

import pytest
from PIL import Image

from common.data.open import open_source
from common.errors import ConfigError, DataError
from common.images import image_bytes, read_image
from schemas.sample import ImageRef

datasets = pytest.importorskip("datasets")

MESSAGES = [
    [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}],
    [{"role": "user", "content": "<image>\nWhere?"}, {"role": "assistant", "content": "Here."}],
]


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [png("red"), png("blue")]


def saved(tmp_path, columns, features=None):
    path = tmp_path / "saved"
    datasets.Dataset.from_dict(columns, features=features and datasets.Features(features)).save_to_disk(path)
    return str(path)


TURN = {"role": datasets.Value("string"), "content": datasets.Value("string")}


@pytest.mark.parametrize("several", [False, True])
def test_encoded_images_come_untouched(tmp_path, several):
    images = [{"bytes": content, "path": None} for content in FILES]
    column, feature = ("images", datasets.List(datasets.Image())) if several else ("image", datasets.Image())
    path = saved(
        tmp_path,
        {"id": ["a", "b"], "messages": MESSAGES, column: [[image] if several else image for image in images]},
        {"id": datasets.Value("string"), "messages": datasets.List(TURN), column: feature},
    )
    source = open_source(path)
    assert list(source.sample_ids()) == ["a", "b"]
    assert [image_bytes(sample.images[0]) for sample in source] == FILES
    assert read_image(source[1].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert source[0].turns[0].parts == (0, "What?")
    keys = source.image_keys()
    assert keys[0] != keys[1]
    assert open_source(path).fingerprint() == source.fingerprint()


def test_paths_and_conversations(tmp_path):
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]]
    source = open_source(saved(tmp_path, {"conversations": turns, "image": ["a.png"], "kind": ["qa"]}))
    assert source[0].images == (ImageRef(path="a.png"),)
    assert (source[0].sample_id, source[0].kind) == ("0", "qa")


def test_message_parts(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    reply = [{"type": "text", "text": "A cat."}]
    messages = [[{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]]
    source = open_source(saved(tmp_path, {"messages": messages, "images": [["a.png"]]}))
    assert source[0].turns[0].parts == (0, "What?")


def test_a_bad_row_is_refused_alone(tmp_path):
    source = open_source(saved(tmp_path, {"messages": MESSAGES, "images": [[], ["a.png"]]}))
    with pytest.raises(DataError, match="row 0") as caught:
        source[0]
    assert caught.value.reason == "image-marks"
    assert source[1].images


def test_repeated_ids(tmp_path):
    path = saved(tmp_path, {"id": [3, 3], "messages": MESSAGES, "images": [["a"], ["b"]]})
    with pytest.raises(DataError, match="entry 0 and again at entry 1"):
        open_source(path)
    assert list(open_source(path + "#number").sample_ids()) == ["3", "3#2"]


@pytest.mark.parametrize("lists", [datasets.List, datasets.LargeList])
def test_images_in_any_column_come_untouched(tmp_path, lists):
    image = {"bytes": FILES[0], "path": None}
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None, "image": image},
                {"type": "text", "text": "What?", "image": None},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat.", "image": None}]},
    ]
    messages = lists({"role": datasets.Value("string"), "content": lists(part)})
    nested = open_source(saved(tmp_path, {"messages": [turns]}, {"messages": messages}))
    assert image_bytes(nested[0].images[0]) == FILES[0]
    listed = saved(
        tmp_path / "listed",
        {"messages": MESSAGES[:1], "images": [[image]]},
        {"messages": lists(TURN), "images": lists(datasets.Image())},
    )
    assert image_bytes(open_source(listed)[0].images[0]) == FILES[0]


def test_a_column_that_nobody_sees_is_refused_row_by_row(tmp_path):
    clips = [{"bytes": b"clip", "path": None}, None]
    path = saved(
        tmp_path,
        {"messages": [[{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}]] * 2}
        | {"video": clips},
        {"messages": datasets.List(TURN), "video": datasets.Video()},
    )
    source = open_source(path)
    with pytest.raises(DataError, match="video") as caught:
        source[0]
    assert caught.value.reason == "video"
    assert source[1].images == ()


def test_parquet_files_and_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "rows"
    place.mkdir()
    for number, (turns, file) in enumerate(zip(MESSAGES, FILES, strict=True)):
        row = {"id": [f"s{number}"], "messages": [turns], "images": [[{"bytes": file, "path": None}]]}
        features = {"id": datasets.Value("string"), "messages": datasets.List(TURN)}
        features["images"] = datasets.List(datasets.Image())
        rows = datasets.Dataset.from_dict(row, features=datasets.Features(features))
        rows.to_parquet(place / f"part-{number}.parquet")
    for path, ids in ((place, ["s0", "s1"]), (place / "part-1.parquet", ["s1"])):
        source = open_source(str(path))
        assert list(source.sample_ids()) == ids
        assert [image_bytes(sample.images[0]) for sample in source] == FILES[-len(ids) :]
        assert source.path == str(path)
    (place / "part-2.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        open_source(str(place))


def test_a_configuration_is_named_behind_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "owner" / "name"
    place.mkdir(parents=True)
    for configuration, turns in zip(("first", "second"), MESSAGES, strict=True):
        (place / f"{configuration}.jsonl").write_text(json.dumps({"messages": turns, "images": ["a.png"]}))
    table = "".join(f"- config_name: {each}\n  data_files: {each}.jsonl\n" for each in ("first", "second"))
    (place / "README.md").write_text(f"---\nconfigs:\n{table}---\n")
    assert open_source("hf:owner/name/second")[0].turns[0].parts == (0, "Where?")
    with pytest.raises(ConfigError, match="first"):
        open_source("hf:owner/name")


def test_splits(tmp_path):
    rows = datasets.Dataset.from_dict({"messages": MESSAGES, "images": [["a"], ["b"]]})
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "both")
    assert len(open_source(str(tmp_path / "both"))) == 2
    assert len(open_source(str(tmp_path / "both" / "test"))) == 1
    datasets.DatasetDict(a=rows, b=rows).save_to_disk(tmp_path / "named")
    with pytest.raises(ConfigError, match="splits a, b"):
        open_source(str(tmp_path / "named"))


def test_wrong_directories_and_columns(tmp_path):
    with pytest.raises(ConfigError, match="messages"):
        open_source(saved(tmp_path, {"text": ["x"]}))
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match="save_to_disk"):
        open_source(str(tmp_path / "plain"))


@pytest.mark.parametrize("name", ["hf:", "hf:owner", "hf:a/b/c/d", "hf:a/b/", "hf:/b"])
def test_malformed_hub_names(name):
    with pytest.raises(ConfigError, match="owner/name"):
        open_source(name)


def test_hub_names_load_through_the_library(tmp_path, monkeypatch):
    """`load_dataset` takes a relative directory of that name before it asks the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    rows = [{"messages": turns, "images": [f"{place}.png"]} for place, turns in enumerate(MESSAGES)]
    for split, part in (("train", rows), ("test", rows[:1])):
        text = "\n".join(json.dumps(row) for row in part)
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_text(text)
    source = open_source("hf:owner/name")
    assert [sample.images[0].path for sample in source] == ["0.png", "1.png"]
    assert len(open_source("hf:owner/name:test")) == 1
    with pytest.raises(ConfigError, match="check name, split"):
        open_source("hf:owner/name:validation")


def test_unreachable_hub_data_says_what_to_check(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="check name"):
        open_source("hf:no-such-owner-here/no-such-name")
