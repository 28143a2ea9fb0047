"""The table of facts is whole: every hub preset, a public source for every table, no silent guess."""

import re
from pathlib import Path

import pytest

from common.models import PRESETS, smallest_of_family
from tests.presets.facts import built_as, facts, families, family_of, presets, tables

ROOT = Path(__file__).parents[2]
HUB = {name: preset for name, preset in PRESETS.items() if preset.revision is not None}


def test_the_table_holds_the_hub_presets_and_no_others():
    assert {name: family for family in families() for name in presets(family)} == {
        name: preset.family for name, preset in HUB.items()
    }


@pytest.mark.parametrize("preset", HUB)
def test_every_table_names_a_source_that_is_an_address(preset):
    sources = tables()["sources"]
    for named in (tables()[family_of(preset)]["source"], presets(family_of(preset))[preset]["source"]):
        assert named
        assert all(sources[each].startswith("https://") for each in named)


def test_no_source_is_left_over():
    named = {each for family in families() for each in tables()[family]["source"]}
    named |= {each for family in families() for row in presets(family).values() for each in row["source"]}
    assert named == set(tables()["sources"])


@pytest.mark.parametrize("preset", HUB)
def test_ids_are_tokens_and_tokens_have_rows(preset):
    found = facts(preset)
    ids = [*found["special"].values(), *found.get("added", {}).values()]
    assert len(ids) == len(set(ids))
    assert max(ids) < found["tokens"] <= found["head_rows"]
    assert max(ids) == found["tokens"] - 1
    roles = {name: token for name, token in found["roles"].items() if name != "additional"}
    assert {*roles.values(), *found["roles"].get("additional", [])} <= set(found["special"])


@pytest.mark.parametrize("preset", HUB)
def test_what_is_taken_from_another_size_says_why_it_is_unknown_or_has_a_source_of_its_own(preset):
    row = presets(family_of(preset))[preset]
    if "same_as" not in row:
        return
    assert "same_as" not in presets(family_of(preset))[built_as(preset)]
    own = set(row["source"]) - set(presets(family_of(preset))[built_as(preset)]["source"])
    assert "unknown" in row or own or preset == "qwen3-vl-4b"


@pytest.mark.parametrize("family", families())
def test_sizes_of_a_family_share_tokens_whatever_their_heads(family):
    assert len({facts(name)["tokens"] for name in presets(family)}) == 1
    assert smallest_of_family(family).name in presets(family)


def test_the_readme_lists_every_preset():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"Presets: (.*?)\n\n", text, re.DOTALL)
    assert listed
    assert sorted(re.findall(r"`([^`]+)`", listed[1])) == sorted(PRESETS)
