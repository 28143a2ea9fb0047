import base64

import pytest

from common.data.entries import entry_id, first_reference, reference_key, to_sample
from common.errors import DataError
from schemas.sample import ImageRef, Turn


def read(entry):
    return to_sample(entry, sample_id="s", where="here")


def llava(*values, **rest):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[place % 2], "value": value} for place, value in enumerate(values)]
    return {"conversations": turns, **rest}


def chat(*contents, **rest):
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)],
        **rest,
    }


def test_llava_entry():
    sample = read(llava("<image>\nWhat?", "A cat.", "Sure?", "Yes.", image="a.png", kind="qa"))
    assert sample.images == (ImageRef(path="a.png"),)
    assert sample.turns == (
        Turn(role="user", parts=(0, "What?")),
        Turn(role="assistant", parts=("A cat.",)),
        Turn(role="user", parts=("Sure?",)),
        Turn(role="assistant", parts=("Yes.",)),
    )
    assert sample.kind == "qa"


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", (0, "What?")),
        ("What?\n<image>", ("What?", 0)),
        ("<image>", (0,)),
        ("Look <image> here", ("Look ", 0, " here")),
        ("two\n\n<image>\r\nlines\nkept\n", ("two", 0, "lines\nkept\n")),
    ],
)
def test_line_breaks_next_to_a_mark_belong_to_it(value, parts):
    assert read(llava(value, "x", image="a")).turns[0].parts == parts


def test_several_images_are_numbered_in_reading_order():
    sample = read(llava("<image><image>\nSame?", "No.", "And <image>?", "Yes.", image=["a", "b", "c"]))
    assert [image.path for image in sample.images] == ["a", "b", "c"]
    assert sample.turns[0].parts == (0, 1, "Same?")
    assert sample.turns[2].parts == ("And ", 2, "?")


def test_questions_without_answers_and_images_without_text():
    assert [turn.role for turn in read(llava("<image>\nWhat?", image="a")).turns] == ["user"]
    bare = read({"id": "x", "image": "a.png"})
    assert (bare.images, bare.turns) == ((ImageRef(path="a.png"),), ())


def test_text_only_and_system_turns():
    sample = read(
        {"conversations": [{"from": "system", "value": "Be kind."}, *llava("Hi", "Hello")["conversations"]]}
    )
    assert sample.images == ()
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize("image", [None, "", []])
def test_empty_image_fields_mean_text_only(image):
    assert read(llava("Hi", "Hello", image=image)).images == ()


PIXEL = base64.b64encode(b"encoded").decode()
PARTS = [
    ({"type": "image", "path": "a.png"}, ImageRef(path="a.png")),
    ({"type": "image", "image": "a.png"}, ImageRef(path="a.png")),
    ({"type": "image", "url": "file:///tmp/a%20b.png"}, ImageRef(path="/tmp/a b.png")),
    ({"type": "image_url", "image_url": {"url": "file:///a.png"}}, ImageRef(path="/a.png")),
    ({"type": "image_url", "image_url": "a.png"}, ImageRef(path="a.png")),
    ({"type": "image", "image": {"bytes": b"encoded", "path": "x"}}, ImageRef(data=b"encoded")),
    ({"type": "image", "image": {"bytes": None, "path": "x"}}, ImageRef(path="x")),
    (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        ImageRef(data=b"encoded"),
    ),
]


@pytest.mark.parametrize(("part", "ref"), PARTS)
def test_image_parts(part, ref):
    entry = chat([part, {"type": "text", "text": "What?"}], [{"type": "text", "text": "A cat."}])
    sample = read(entry)
    assert sample.images == (ref,)
    assert sample.turns[0].parts == (0, "What?")
    assert first_reference(entry) == ref


def test_bare_image_parts_take_the_next_of_the_list():
    bare = {"type": "image", "text": None}
    entry = chat([bare, bare, {"type": "text", "text": "Same?"}], "No.", images=["a", {"path": "b"}])
    assert [image.path for image in read(entry).images] == ["a", "b"]
    assert first_reference(entry) == ImageRef(path="a")


def test_plain_text_messages():
    assert read(chat("<image>\nWhat?", "A cat.", images=["a"])).turns[0].parts == (0, "What?")


BAD = [
    (llava("What?", "x", image="a"), "image-marks", "0 <image> mark"),
    (llava("<image>\nWhat?", "x"), "image-marks", "1 <image> mark"),
    (llava("<image><image>", "x", image="a"), "image-marks", r"2 <image> mark\(s\) for 1"),
    (llava("Hi", "<image>", image="a"), "image-marks", "response"),
    (chat([{"type": "image"}], "x"), "image-marks", "1 <image> mark"),
    (llava("Hi", ""), "empty-response", "response 0"),
    (llava("Hi", "a", "b", " \n"), "empty-response", "response 1"),
    ({"conversations": []}, "turns", "0 turns"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "turns", "robot"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "turns", "turn 0"),
    ({"conversations": ["x"]}, "turns", "str"),
    ({"conversations": "x"}, "entry", "list of turns"),
    ({"conversations": [{"from": "human"}]}, "turns", "null"),
    (chat([{"type": "video", "path": "v"}], "x"), "video", "has 'video'"),
    (chat([{"type": "video_url", "video_url": "v"}], "x"), "video", "neither teacher nor student"),
    (chat([{"type": "input_audio", "data": "v"}], "x"), "input-audio", "input_audio"),
    (chat([{"type": "smell"}], "x"), "turns", "smell"),
    (llava("<video>\nWhat?", "x", video="v.mp4"), "video", "drop the entry"),
    (llava("<image>\nWhat?", "x", image="a", audios=["v.wav"]), "audio", "audios"),
    (llava("<lidar>\nWhat?", "x", lidar="v.bin"), "lidar", "lidar"),
    (llava("Hi \ud83d", "x"), "text", "surrogate"),
    (llava("Hi", "x\ude00y"), "text", "character 1"),
    (llava("<image>\nWhat?", "x", image=PIXEL * 2000), "image-reference", "too long for a file name"),
    (llava("<image>\nWhat?", "x", image="a" * 256), "image-reference", "256 bytes"),
    (llava("<image>\nWhat?", "x", image="a\0b"), "image-reference", "control character"),
    (chat(["x"], "x"), "turns", "None"),
    ({"text": "x"}, "entry", "'text'"),
    ([1], "entry", "list"),
    (None, "entry", "null"),
    (llava("<image>", "x", image="https://x.org/a.png"), "image-remote", "https://x"),
    (chat([{"type": "image_url", "image_url": {"url": "http://x/a"}}], "x"), "image-remote", "local"),
    (llava("<image>", "x", image=3), "image-reference", "int"),
    (llava("<image>", "x", image="data:image/png;base64,@@"), "image-reference", "base64"),
    (llava("<image>", "x", image="data:image/svg+xml,<svg>"), "image-reference", "base64"),
    (llava("Hi", "x", kind=3), "entry", "kind"),
]


@pytest.mark.parametrize(("entry", "reason", "says"), BAD)
def test_bad_entries_say_why(entry, reason, says):
    with pytest.raises(DataError, match=says) as caught:
        read(entry)
    assert caught.value.reason == reason
    first_reference(entry)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"id": "a"}, "a"),
        ({"id": 7}, "7"),
        ({"id": ""}, ""),
        ({}, "5"),
        ({"id": None}, "5"),
        ([], "5"),
        ({"id": True}, "5"),
    ],
)
def test_ids_are_text_or_the_index(entry, found):
    assert entry_id(entry, 5) == found


def test_reference_keys_tell_images_apart():
    refs = [ImageRef(path="a"), ImageRef(path="b"), ImageRef(data=b"c")]
    keys = [reference_key(ref) for ref in refs]
    assert len(set(keys)) == 3
    assert 0 not in keys
    assert keys == [reference_key(ref) for ref in refs]
    assert all(-(2**63) <= key < 2**63 for key in keys)
