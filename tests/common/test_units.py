import pytest

from common.errors import ConfigError
from common.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("2000", 2000),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("7kB", 7000),
        ("1e9", 10**9),
        (".5T", 5 * 10**11),
        ("3B", 3),
    ],
)
def test_sizes_take_units(text, size):
    assert parse_bytes(text, name="X") == size


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "-1", "two", "1..5", "2GB please", "1e999"])
def test_what_is_no_size_is_refused_with_the_setting_s_name(text):
    with pytest.raises(ConfigError, match="CASCACHE_X"):
        parse_bytes(text, name="CASCACHE_X")
