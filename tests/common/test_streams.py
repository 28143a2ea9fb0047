import pytest

from common.streams import key_of, stream


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 2])
def test_neighbouring_keys_and_seeds_give_other_numbers(key):
    here = stream(7, key).random(4).tolist()
    assert here == stream(7, key).random(4).tolist()
    assert here != stream(7, key + 1).random(4).tolist()
    assert here != stream(8, key).random(4).tolist()


def test_names_have_keys_of_64_bits():
    keys = {key_of(f"image-{number}.png") for number in range(1000)}
    assert len(keys) == 1000
    assert max(keys) < 2**64
    assert max(keys) > 2**63
