"""The source check finds what the capture uses of vLLM, and notices when any of it is gone."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.tested_versions import TESTED_VLLM
from scripts.check_vllm_source import check, main
from scripts.vllm_seams import EXPECTED, Absent, Call, Expected, Member, Text, names_used
from scripts.vllm_source import Source, open_source
from scripts.vllm_uses import PACKAGE, find_uses, read_files

ROOT = Path(__file__).parent.parent.parent


@cache
def installed() -> Source:
    """The vLLM that the tests run with, as source."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return open_source(str(Path(spec.origin).parent))


def name_of(each: Expected) -> str:
    return f"{type(each).__name__} {each.where.split('/')[-1]} {each.name}"


def problems(source: Source, *expected: Expected) -> list[str]:
    return [each.problem for each in check(source, expected, {}) if each.problem]


def test_the_installed_vllm_has_all_of_it():
    assert problems(installed(), *EXPECTED) == []


def test_every_name_of_vllm_that_teacher_dump_uses_is_in_the_table():
    assert set(find_uses()) - names_used() == set()


def test_every_file_that_imports_vllm_is_looked_through():
    doors = {file.name for file in PACKAGE.glob("*.py") if re.search(r"(import|from) vllm", file.read_text())}
    assert doors
    assert doors <= read_files().keys()


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (
            "runner.requests[name].num_computed_tokens",
            "runner.requests[name].num_seen",
            "num_seen",
        ),
        ('"query_start_loc.np"', '"query_start_loc.cpu"', "cpu"),
        (
            'getattr(head, "bias", None)',
            'getattr(head, "skew", None)',
            "skew",
        ),
        ("new.mm_features", "new.mm_inputs", "mm_inputs"),
        ("group.rank_in_group", "group.rank", "rank"),
        ("place.is_embed is None", "place.mask is None", "mask"),
        (
            "import get_pp_group, get_tp_group",
            "import get_pp_group, get_dp_group",
            "get_dp_group",
        ),
        ("detokenize=False", "detokenise=False", "detokenise"),
        ('"VLLM_CPU_KVCACHE_SPACE"', '"VLLM_CPU_KV_SPACE"', "VLLM_CPU_KV_SPACE"),
        ('"use_tqdm_on_load": False', '"load_tqdm": False', "load_tqdm"),
        ('"mm_processor_cache_gb",', '"mm_cache_gb",', "mm_cache_gb"),
        ('given["multi_modal_uuids"]', 'given["mm_uuids"]', "mm_uuids"),
        ("output.outputs[0].finish_reason", "output.outputs[0].why", "why"),
        ("current_platform.is_cpu()", "current_platform.is_plain()", "is_plain"),
        ("self._llm.llm_engine.model_config", "self._llm.llm_engine.config", "config"),
        ("flat.logprobs", "flat.values_of_rows", "values_of_rows"),
    ],
)
def test_a_new_use_of_vllm_is_noticed(old, new, name):
    texts = read_files()
    assert any(old in text for text in texts.values())
    texts = {file: text.replace(old, new) for file, text in texts.items()}
    assert name in set(find_uses(texts)) - names_used()


def where_of(kind: type[Expected]) -> list[str]:
    return list(dict.fromkeys(each.where for each in EXPECTED if isinstance(each, kind)))


@pytest.mark.parametrize("where", where_of(Member | Text))
def test_what_is_renamed_in_the_source_is_missed_by_name(where):
    wanted = [each for each in EXPECTED if each.where == where and isinstance(each, Member | Text)]
    names = "|".join(re.escape(each.name) for each in wanted)
    homes = {each.found.rpartition(":")[0] for each in check(installed(), wanted, {})}
    files = {where.partition(":")[0], *installed().lineage(where), *homes}
    texts = {file: re.sub(rf"\b({names})\b", r"\1_of_old", installed().read(file)) for file in files}
    found = check(installed().replace(texts), wanted, {})
    assert [each.name for each in wanted if each.name not in _problem(found, each)] == []


def _problem(verdicts, wanted):
    (found,) = [each.problem for each in verdicts if each.name == wanted.name]
    return found


@pytest.mark.parametrize("each", [each for each in EXPECTED if isinstance(each, Call)], ids=name_of)
def test_a_call_that_is_gone_is_missed_by_name(each):
    file = each.where.partition(":")[0]
    text = re.sub(rf"\b{each.name}\(", f"{each.name}_of_old(", installed().read(file))
    (found,) = problems(installed().replace({file: text}), each)
    assert found == f"{each.where.partition(':')[2]} does not call {each.name}"


def test_a_class_that_moved_is_looked_for_elsewhere():
    (each,) = [each for each in EXPECTED if isinstance(each, Member) and each.name == "np"]
    texts = {"v1/utils.py": "", "v1/buffers.py": installed().read("v1/utils.py")}
    source = Source([*installed().names, "v1/buffers.py"], lambda name: texts.get(name, ""), "9.9.9")
    wanted = "no CpuGpuBuffer in v1/utils.py; something of that name is in v1/buffers.py"
    assert problems(source, each) == [wanted]


@pytest.mark.parametrize(
    "each", [each for each in EXPECTED if isinstance(each, Member) and each.takes], ids=name_of
)
def test_other_parameters_are_noticed(each):
    (verdict,) = check(installed(), [each], {})
    file = verdict.found.rpartition(":")[0]
    head = rf"(def {each.name}\(\s*(?:self,\s*)?){each.takes[0]}\b"
    text, count = re.subn(head, rf"\1first: int, {each.takes[0]}", installed().read(file))
    assert count
    (found,) = problems(installed().replace({file: text}), each)
    assert f"{each.name} takes (first, " in found


@pytest.mark.parametrize("each", [each for each in EXPECTED if isinstance(each, Call)], ids=name_of)
def test_a_call_under_a_condition_is_noticed(each):
    file = each.where.partition(":")[0]
    (verdict,) = check(installed(), [each], {})
    line = int(verdict.found.rpartition(":")[2])
    source = installed()
    node = next(
        inner
        for inner in _statements(source, each.where)
        if inner.lineno <= line <= inner.end_lineno and not hasattr(inner, "body")
    )
    lines = source.read(file).splitlines()
    indent = " " * node.col_offset
    lines[node.lineno - 1 : node.end_lineno] = [
        f"{indent}if wanted:",
        *(f"    {text}" for text in lines[node.lineno - 1 : node.end_lineno]),
    ]
    (found,) = problems(source.replace({file: "\n".join(lines)}), each)
    assert found == f"{each.name} is called under a condition now"


def _statements(source, where):
    node, _ = source.find(where)
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt)]


def test_other_arguments_of_a_call_are_noticed():
    (each,) = [each for each in EXPECTED if isinstance(each, Call) and each.name == "compute_prompt_logprobs"]
    file = each.where.partition(":")[0]
    text = (
        installed()
        .read(file)
        .replace("self.model.compute_logits,\n            hidden_states,", "hidden_states,")
    )
    (found,) = problems(installed().replace({file: text}), each)
    assert found.startswith("compute_prompt_logprobs is called with (hidden_states, input_batch, ")


def test_a_runner_that_gains_the_other_ones_seam_is_noticed():
    (each,) = [each for each in EXPECTED if isinstance(each, Absent)]
    file, _, owner = each.where.partition(":")
    text = re.sub(rf"(class {owner}\b[^:]*:\n)", rf"\1    {each.name} = None\n", installed().read(file))
    (found,) = problems(installed().replace({file: text}), each)
    assert found == f"{owner} has {each.name} now"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with vLLM's files, as pip downloads it, but without its libraries."""
    path = tmp_path_factory.mktemp("wheel") / "vllm-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(installed().names):
            archive.writestr(f"vllm/{name}", installed().read(name))
        lines = [
            "Name: vllm",
            "Version: 9.9.9",
            "Requires-Dist: torch==9.0",
            'Requires-Dist: x; extra == "y"',
        ]
        archive.writestr("vllm-9.9.9.dist-info/METADATA", "\n".join(lines))
    return path


def test_a_wheel_is_checked_without_being_installed(wheel, capsys):
    assert main([str(wheel), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["vllm"], report["standing"], report["holds"]) == ("9.9.9", "untested", True)
    assert report["wants"] == {"torch": "==9.0"}
    assert report["checked"] == len(EXPECTED)


def test_a_source_that_lacks_something_ends_with_1_and_names_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    file = tmp_path / "vllm" / "v1" / "utils.py"
    file.write_text(file.read_text().replace("self.np", "self.array"))
    command = [sys.executable, "-m", "scripts.check_vllm_source", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 1
    assert "MISSING  no np in CpuGpuBuffer" in run.stdout
    assert re.search(r"^np +seams.py:\d+, ", run.stdout, re.MULTILINE)
    assert f"vllm 9.9.9 (untested): {len(EXPECTED)} checked, 1 missing" in run.stdout


@pytest.mark.parametrize("what", ["no_such.whl", "text.whl", "empty", "other.whl"])
def test_what_is_no_vllm_is_refused_in_one_line(tmp_path, capsys, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.whl").write_text("not an archive")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    assert main([str(tmp_path / what)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"DataError: {tmp_path / what} ")
    assert len(message.splitlines()) == 1


def test_the_installed_release_is_a_tested_one():
    assert installed().release.split("+")[0] in TESTED_VLLM


def test_every_kind_of_expectation_is_in_the_table():
    assert {type(each) for each in EXPECTED} == {Member, Call, Text, Absent}
