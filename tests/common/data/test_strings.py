import pytest

from common.data.index import Strings

NAMES = ["a", "", "é😀", "\ud800", "long" * 100]


def test_strings_are_a_list():
    packed = Strings.of(NAMES)
    assert len(packed) == len(NAMES)
    assert list(packed) == NAMES
    assert packed[-1] == NAMES[-1]
    assert packed[1:4] == NAMES[1:4]
    assert packed[::-1] == NAMES[::-1]
    assert "é😀" in packed
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            packed[wrong]


def test_no_strings():
    assert list(Strings.of([])) == []
