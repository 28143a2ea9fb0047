"""A processor whose library is missing says which extra brings it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_families import build

ROOT = Path(__file__).parents[2]
HIDE = """
import importlib.util, sys
whole = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else whole(name, *rest)
sys.modules["torchvision"] = None
from common.errors import ConfigError
from common.processor import load_processor
try:
    print(type(load_processor(sys.argv[1]).image_processor).__name__)
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "told"),
    [("qwen3_vl", "pip install 'cascache[student]'"), ("llava_siglip", "SiglipImageProcessorPil")],
)
def test_without_torchvision_a_processor_loads_or_names_the_extra(tmp_path, family, told):
    model = build(family, tmp_path)
    command = [sys.executable, "-c", HIDE, str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.endswith(told)
