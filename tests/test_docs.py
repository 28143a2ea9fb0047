"""What the pages say to type works, in the order in which they say it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.data.open import open_source
from common.data.shapes import write_shapes
from common.doctor.check import CHECKS
from common.models import TINY
from teacher_dump.doctor.agreement import TOLERANCES
from teacher_dump.isolate import ENGINE_KILLED
from teacher_dump.request import ROWS_MISSING

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL
)


def blocks(page: str) -> list[str]:
    """Commands of a page; those that do not run say why."""
    found = [match.groupdict() for match in BLOCK.finditer((DOCS / page).read_text())]
    assert found
    return [block["code"] for block in found if block["language"] == "sh" and not block["reason"]]


@pytest.fixture
def workplace(tmp_path):
    """A directory with a small, self-contained cache; no data beside it."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    from scripts.plain_dump import dump_plain

    data = write_shapes(tmp_path / "data", num_images=8, seed=3, questions_per_image=2)
    place = tmp_path / "place"
    dump_plain(
        str(TINY / "tiny-l1"),
        open_source(str(data)),
        place / "zarr" / "l1",
        part_samples=10,
        with_images=True,
    )
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    return place


def run_page(page: str, where: Path, **variables: str) -> None:
    """Type every block of a page, one after another."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    for block in blocks(page):
        command = ["bash", "-euc", block]
        done = subprocess.run(
            command, cwd=where, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_sharing_page(workplace):
    from scripts.loopback_s3 import serve_bucket_apart

    with serve_bucket_apart() as bucket:
        run_page("sharing.md", workplace, **bucket)


@pytest.mark.slow
def test_the_trust_page(workplace):
    run_page("trust.md", workplace)


def test_the_cascade_page(tmp_path):
    run_page("cascade.md", tmp_path)


@pytest.mark.slow
def test_the_gpu_page(tmp_path):
    run_page("gpu.md", tmp_path)
    assert json.loads((tmp_path / "doctor.json").read_text())["summary"]["fail"] == 0


def test_the_gpu_page_explains_every_check():
    page = (DOCS / "gpu.md").read_text()
    assert [name for names in CHECKS.values() for name in names if f"| `{name}` |" not in page] == []


def test_the_gpu_page_states_the_tolerances():
    page = (DOCS / "gpu.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in page.splitlines()]
    told = {row[0]: tuple(map(float, row[1:])) for row in rows if row and row[0] in TOLERANCES}
    assert told == TOLERANCES


def test_the_data_page_explains_every_reason():
    root = DOCS.parent
    files = [*(root / "common").rglob("*.py"), *(root / "teacher_dump").rglob("*.py")]
    named = {
        word
        for file in files
        for word in re.findall(r'\breason(?:: str)? ?= ?"([a-z-]+)"', file.read_text("utf-8"))
    }
    apart = {ENGINE_KILLED, ROWS_MISSING, "not-finite", "image-mismatch", "prompt-mismatch", "banned-token"}
    cells = [
        line.split("|")[1] for line in (DOCS / "data.md").read_text("utf-8").splitlines() if line[:1] == "|"
    ]
    told = {word for cell in cells for word in re.findall(r"`([a-z-]+)`", cell)}
    assert {"template", "image-missing", "empty"} <= named
    assert (named | apart) - told - {"data"} == set()


def test_the_entries_of_the_data_page_are_read(tmp_path):
    page = (DOCS / "data.md").read_text("utf-8")
    samples = []
    for match in BLOCK.finditer(page):
        file = tmp_path / f"data.{match['language']}"
        file.write_text(match["code"], "utf-8")
        samples += list(open_source(str(file)))
    assert [(each.sample_id, each.kind, len(each.images)) for each in samples] == [
        ("a", "caption", 1),
        ("b", None, 2),
        ("c", None, 0),
    ]
