"""Fixtures that several packages' tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny_families


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's random-weight models lie."""
    return tmp_path_factory.mktemp("tiny_families")


@pytest.fixture(scope="session")
def tiny_family(tiny_dir: Path) -> Callable[[str], Path]:
    """Directory of a random-weight model of a family in `tiny_families.FAMILIES`, built on first use."""
    return lambda family: tiny_families.build(family, tiny_dir)
