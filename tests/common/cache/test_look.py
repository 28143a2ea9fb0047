"""What `diff`, `show` and `report` say is what the cache holds."""

import dataclasses
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from common.cache import cli
from common.cache.charts import HEIGHT, WIDTH, histogram
from common.cache.differ import compare
from common.cache.look import entropy_nats, kept_mass, patch_grids
from common.cache.reader import CacheReader
from common.cache.report import spread
from common.cache.terminal import half_blocks, heat_map, plain
from common.cache.writer import CacheWriter
from common.data.open import open_source
from common.data.shapes import write_shapes
from common.models import TINY
from schemas.manifest import DataSource, Quarantined
from tests.common.cache.records import make_manifest, make_records, topk_of


def write(path, records, *, quarantined=(), **changes):
    manifest = make_manifest(num_samples=len(records) + len(quarantined), part_samples=6, **changes)
    writer = CacheWriter.open(str(path), manifest)
    writer.write_part(
        0, records, first_sample=0, num_samples=len(records) + len(quarantined), quarantined=quarantined
    )
    writer.finalize()
    return str(path)


@pytest.fixture
def records():
    return make_records(np.random.default_rng(0), 4)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A cache with images beside it and a tokenizer that is known."""
    from scripts.plain_dump import dump_plain

    place = tmp_path_factory.mktemp("look")
    data = write_shapes(place / "data", num_images=3, seed=3, questions_per_image=2)
    return str(dump_plain(str(TINY / "tiny-l1"), open_source(str(data)), place / "l1"))


def run(capsys, *arguments):
    code = cli.main([str(each) for each in arguments])
    return code, capsys.readouterr()


def test_entropy_of_all_ids_is_the_true_one():
    logits = np.random.default_rng(0).normal(scale=2, size=(5, 40))
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    true = -(np.exp(logs) * logs).sum(axis=1)
    whole, part = topk_of(logits, topk=40), topk_of(logits, topk=8)
    assert np.allclose(entropy_nats(whole), true, atol=1e-5)
    assert (entropy_nats(part) <= true + 1e-6).all()
    assert np.allclose(kept_mass(part), np.exp(part.logprobs.astype(float)).sum(axis=1), atol=1e-6)
    assert np.allclose(kept_mass(whole), 1)


def test_patches_lie_where_their_tile_says(records):
    image = records[0].visual[0]
    values = np.arange(len(image.topk.positions), dtype=float)
    assert patch_grids(image, values) == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    half = dataclasses.replace(
        image,
        topk=dataclasses.replace(
            image.topk,
            **{
                f.name: getattr(image.topk, f.name)[::2]
                for f in dataclasses.fields(image.topk)
                if f.name != "counts"
            },
        ),
    )
    assert patch_grids(half, values[::2]) == [[[0, None, 2], [None, 4, None], [6, None, 8]]]


def test_a_cache_is_the_same_as_itself_and_its_other_encoding_is_close(tmp_path, records, capsys):
    first = write(tmp_path / "a", records)
    code, said = run(capsys, "diff", first, first, "--json")
    answer = json.loads(said.out)
    assert (code, answer["same"], answer["identity"]) == (0, True, [])
    assert answer["response"]["largest_logprob_gap_nats"] == 0
    second = write(tmp_path / "b", records, logits="float32")
    code, said = run(capsys, "diff", first, second)
    assert code == 1
    assert "encoding.logits: found 'steps', wanted 'float32'" in said.out
    with CacheReader(first) as a, CacheReader(second) as b:
        found = compare(a, b)
    assert 0 < found["response"]["largest_logprob_gap_nats"] <= found["encodings_allow_nats"]
    assert found["response"]["topk_agreement"] == found["response"]["argmax_agreement"] == 1


def test_other_values_and_other_samples_are_differences(tmp_path, records):
    other = make_records(np.random.default_rng(9), 4)
    moved = [
        dataclasses.replace(r, response=dataclasses.replace(o.response, positions=r.response.positions))
        if len(o.response.positions) == len(r.response.positions)
        else r
        for r, o in zip(records, other, strict=True)
    ]
    paths = [write(tmp_path / "a", records), write(tmp_path / "b", moved), write(tmp_path / "c", records[:3])]
    a, b, c = (CacheReader(path) for path in paths)
    found = compare(a, b)
    assert not found["same"]
    assert found["response"]["topk_agreement"] < 1
    assert compare(a, c)["samples"]["only_in_first"] == 1
    assert not compare(a, c)["same"]


def test_show_tells_every_response_token_and_its_rank(real, capsys):
    with CacheReader(real) as cache:
        record = cache.read_record(0)
    code, said = run(capsys, "show", real, record.sample_id, "--tokenizer", TINY / "tiny-l1", "--json")
    answer = json.loads(said.out)
    assert code == 0
    assert answer["images"][0]["picture_found"]
    for row, told in enumerate(answer["response"]):
        position = told["position"]
        assert record.response.positions[row] == position - 1
        assert told["id"] == record.token_ids[position]
        if told["rank"]:
            assert record.response.token_ids[row, told["rank"] - 1] == told["id"]
            assert math.isclose(
                told["probability"], math.exp(record.response.logprobs[row, told["rank"] - 1])
            )
        assert [each["id"] for each in told["teacher"]] == record.response.token_ids[row, :5].tolist()
    assert "USER:" in answer["prompt"]
    code, said = run(capsys, "show", real, record.sample_id)
    assert "#" in said.out, "the teacher is a path, which nobody follows: ids instead of texts"
    assert "entropy from" in said.out


def test_show_names_what_it_lacks(real, tmp_path, capsys):
    code, said = run(capsys, "show", real, "nobody")
    assert code == 2
    assert "holds no sample 'nobody'" in said.err
    copy = shutil.copytree(TINY / "tiny-l1", tmp_path / "other")
    table = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    vocabulary = table["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (copy / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    with CacheReader(real) as cache:
        name = cache.sample_ids[0]
    code, said = run(capsys, "show", real, name, "--tokenizer", copy)
    assert code == 2
    assert "is not the cache's" in said.err


def test_texts_that_were_taken_out_are_not_made_up(real, tmp_path, capsys):
    bare = str(tmp_path / "bare")
    assert run(capsys, "pull", real, bare, "--strip-text")[0] == 0
    with CacheReader(real) as cache:
        name = cache.sample_ids[0]
    code, said = run(capsys, "show", bare, name, "--tokenizer", TINY / "tiny-l1", "--json")
    answer = json.loads(said.out)
    assert code == 0
    assert answer["prompt"] is answer["prompt_ids"] is None
    assert {row["id"] for row in answer["response"]} == {None}
    assert all(row["teacher"][0]["text"] for row in answer["response"])
    assert "not in this cache" in run(capsys, "show", bare, name)[1].out
    code, said = run(capsys, "diff", real, bare, "--json")
    answer = json.loads(said.out)
    assert (code, answer["response"]["argmax_agreement"], answer["samples"]["other_token_ids"]) == (1, 1.0, 0)
    out = tmp_path / "report.html"
    assert run(capsys, "report", real, bare, "--out", out, "--tokenizer", TINY / "tiny-l1")[0] == 0


def test_without_transformers_there_are_ids(real, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with CacheReader(real) as cache:
        name = cache.sample_ids[0]
    assert run(capsys, "show", real, name)[0] == 0
    code, said = run(capsys, "show", real, name, "--tokenizer", "tiny")
    assert code == 2
    assert "cascache[student]" in said.err


def test_terminals_obey_no_cache(tmp_path, records, capsys):
    evil = "a\x1b]0;owned\x07\u202eb"
    records = [dataclasses.replace(records[0], sample_id=evil, kind="\x1b[2J"), *records[1:]]
    path = write(tmp_path / "a", records, teacher=make_manifest().teacher.model_copy(update={"model": evil}))
    for command in (["show", path, evil], ["info", path], ["diff", path, path]):
        out = run(capsys, *command)[1].out
        assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert plain(evil) == "a\\x1b]0;owned\\x07\\u202eb"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_page_that_loads_nothing(real, tmp_path, capsys):
    out = tmp_path / "report.html"
    code, _ = run(capsys, "report", real, real, "--out", out, "--gallery", 2, "--tokenizer", TINY / "tiny-l1")
    assert code == 0
    page = Page(out.read_text("utf-8"))
    assert not page.open
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [
        attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes
    ]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(", out.read_text("utf-8"))
    text = "".join(page.text)
    for words in ("Identity", "Bytes by array", "Kept mass", "every sample has a record", "ASSISTANT:"):
        assert words in text
    assert sum(tag == "svg" for tag, _ in page.tags) >= 5 + 2 * 2


def test_the_report_counts_quarantine_and_escapes_everything(tmp_path, records, capsys):
    evil = "<script>alert(1)</script>"
    lost = [Quarantined(sample_id=f"{evil}{n}", reason="too-long", detail="") for n in range(2)]
    records = [dataclasses.replace(records[0], sample_id=evil), *records[1:]]
    path, out = write(tmp_path / "a", records, quarantined=lost), tmp_path / "report.html"
    assert run(capsys, "report", path, "--out", out)[0] == 0
    page = Page(out.read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert f"{evil}0, {evil}1" in page.text
    assert page.text[page.text.index("too-long") + 1 : page.text.index(f"{evil}0, {evil}1")].count("2") == 1


def test_a_report_that_cannot_be_written_says_so(tmp_path, records, capsys):
    path = write(tmp_path / "a", records)
    code, said = run(capsys, "report", path, "--out", tmp_path / "no" / "report.html")
    assert code == 2
    assert "--out" in said.err


def test_bins_hold_every_value_once():
    chart = histogram([np.array([0.0, 1, 1, 3]), np.empty(0)], low=0.0, whole=True)
    assert chart.outlines[1] is None
    tops = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)L", chart.outlines[0])]
    assert [(HEIGHT - y) / HEIGHT for y in tops] == [0.5, 1.0, 0.0, 0.5]
    assert chart.highest == "50 %"
    assert [place for place, _ in chart.ticks][-1] == WIDTH
    powers = histogram([np.array([-9.0, -1.0])], low=-7.0, high=0.0, powers=True)
    assert powers.ticks[0] == (0.0, "1e-7")


def test_terminal_pictures():
    from PIL import Image

    assert heat_map([[0.0, 1.0, None], [0.5, 0.2, float("nan")]], low=0.0, high=1.0) == ["  ██··", "▒▒░░··"]
    assert heat_map([[1.0]], low=1.0, high=1.0) == ["▒▒"]
    lines = half_blocks(Image.new("RGB", (100, 50), (1, 2, 3)), columns=20)
    assert len(lines) == 5
    assert lines[0].count("▀") == 20
    assert "38;2;1;2;3" in lines[0]


@pytest.mark.parametrize(("count", "wanted", "chosen"), [(0, 3, []), (3, 9, [0, 1, 2]), (10, 2, [0, 9])])
def test_samples_are_spread(count, wanted, chosen):
    assert spread(count, wanted) == chosen


@pytest.mark.parametrize("named", ["shapes:train=3,dir=made", "hf:no-such-owner/no-such-name"])
def test_looking_neither_makes_nor_fetches_what_a_cache_names(tmp_path, records, capsys, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "l1", records, data_source=DataSource(path=named))
    name = records[0].sample_id
    for command in (["show", path, name], ["report", path, "--out", "page.html"], ["info", path]):
        assert run(capsys, *command)[0] == 0, command
    assert {each.name for each in tmp_path.iterdir()} == {"l1", "page.html"}
