import json

import pytest

from common.cache.cli import main
from common.cache.size import Kept, LevelShape, row_bytes, size_bytes

SHAPE = LevelShape(samples=1000, positions=880, response_rows=90, images=400, image_positions=729)


def test_terms_follow_their_counts():
    sizes = size_bytes(SHAPE, Kept())
    assert sizes["response"] == pytest.approx(1000 * 90 * row_bytes(64), rel=1e-6)
    assert sizes["visual"] == pytest.approx(400 * 729 * row_bytes(64), rel=1e-6)
    assert sizes["hidden"] == 0
    quarter = size_bytes(SHAPE, Kept(visual_fraction=0.25, relation_store="none", profile="portable"))
    assert quarter["visual"] == pytest.approx(0.25 * 1.4 * sizes["visual"], rel=1e-6)
    assert quarter["relation"] == 0
    raw = size_bytes(SHAPE, Kept(relation_store="hidden", hidden_size=3584))
    assert raw["hidden"] == 400 * 729 * 3584 * 2
    assert size_bytes(SHAPE, Kept(topk=0))["response"] == 0


def test_the_measured_row_and_factor_are_met():
    """120 bytes a row at K = 64 and 27.5 KB a factor of 729 positions were measured."""
    assert row_bytes(64) == pytest.approx(120, rel=0.1)
    assert size_bytes(SHAPE, Kept())["relation"] / 400 == pytest.approx(27_500, rel=0.1)


def test_the_command_counts_an_image_once(capsys):
    flags = ["estimate", "--samples", "1000", "--images", "100", "--rate", "1000", "--engines", "2", "--json"]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["positions_computed"] == 1000 * 150 + 100 * 2929
    assert found["seconds"] == pytest.approx(found["positions_computed"] / 2000, abs=0.1)
    assert sum(found["bytes_by_term"].values()) == found["bytes"]
    assert main(["estimate", "--samples", "665298"]) == 0
    assert "within a factor of two" in capsys.readouterr().out
