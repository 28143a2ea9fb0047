"""What teacher_dump uses of vLLM, found in its own source: names, with the lines that use them.

    from vllm.distributed import get_pp_group      an import
    runner: Any ... runner.requests[...]           an attribute of something that is vLLM's
    _need(runner, "query_start_loc.np")            the same, as a path
    SamplingParams(detokenize=False)               a field
    {"enforce_eager": True, **settings.arguments}  an engine argument
    "VLLM_CPU_KVCACHE_SPACE"                       a setting in the environment

In these files a thing annotated `Any` is vLLM's: parameters, attributes, results. What is read from such
a thing, looped over or called is vLLM's too, until a variable gets a type. Names that tensors and Python's
own types have (`weight.dtype`) are left out behind a `weight` or a `dtype`.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "teacher_dump"
_TOUCHES = re.compile(r"(?:import|from) vllm|\b_llm\b|\brunner: Any|_[A-Z]+_ARGUMENTS = ")

_ENVIRONMENT = re.compile(r"VLLM_[A-Z0-9_]+|DO_NOT_TRACK")
_TABLES = {"_OWNED_ARGUMENTS", "_HARMLESS_ARGUMENTS"}
_OURS = {"any", "get", "size", "start", "stop", "to", "values"}  # of dictionaries, slices, tensors, images
_OPAQUE = {"weight", "dtype", "shape"}  # tensors and their parts: torch's names from here on
_FOREIGN = ("Any", "Sequence[Any]", "list[Any]", "Iterable[Any]")
_LOOKUPS = {"getattr", "hasattr", "_need"}

Uses = dict[str, list[str]]


def read_files() -> dict[str, str]:
    """Name to source of every file of the package that touches vLLM's objects."""
    texts = {file.name: file.read_text() for file in sorted(PACKAGE.glob("*.py"))}
    return {name: text for name, text in texts.items() if _TOUCHES.search(text)}


def find_uses(files: Mapping[str, str] | None = None) -> Uses:
    """Names of vLLM's to the places that use them, `seams.py:87`.

    Args:
        files: File name to source; None: `read_files()`.
    """
    texts = files or read_files()
    trees = {name: ast.parse(text) for name, text in texts.items()}
    foreign = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and _is_foreign(node.returns)
    }
    attributes = set().union(*map(_attributes, trees.values()))
    uses: Uses = defaultdict(list)
    for file, tree in trees.items():
        for name, line in _names(tree, foreign, attributes):
            if name not in _OURS and f"{file}:{line}" not in uses[name]:
                uses[name].append(f"{file}:{line}")
    return dict(sorted(uses.items()))


def _names(tree: ast.Module, foreign: set[str], attributes: set[str]) -> Iterator[tuple[str, int]]:
    yield from _imports(tree)
    yield from _settings(tree)
    attributes = attributes | {name for name, _ in _imports(tree) if "." not in name}
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {scope: set(ast.walk(scope)) for scope in scopes}
    for scope in scopes:
        outer = [each for each in scopes if scope is not each and scope in inside[each]]
        yield from _Scope(scope, outer, foreign, attributes).names()


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((each.name, node.lineno) for each in node.names if each.name.startswith("vllm."))


def _settings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Environment names, engine arguments, sampling parameters and prompt keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _ENVIRONMENT.fullmatch(node.value):
                yield node.value, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("SamplingParams"):
            yield from ((each.arg, node.lineno) for each in node.keywords if each.arg)
        elif isinstance(node, ast.Assign) and {ast.unparse(each) for each in node.targets} & _TABLES:
            yield from _strings(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in ("_arguments", "_wishes", "_to_vllm"):
            yield from (each for inner in ast.walk(node) for each in _keys(inner))


def _keys(node: ast.AST) -> Iterator[tuple[str, int]]:
    """String keys of a dictionary that is built or filled; not those of a value inside another."""
    keys = node.keys if isinstance(node, ast.Dict) else []
    if isinstance(node, ast.Subscript):
        keys = [node.slice]
    for key in keys:
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value != "image":
            yield key.value, key.lineno


def _strings(value: ast.AST) -> Iterator[tuple[str, int]]:
    found = value.keys if isinstance(value, ast.Dict) else ast.walk(value)
    for each in found:
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value, each.lineno


def _attributes(tree: ast.Module) -> set[str]:
    """`self.x` that hold something of vLLM's: annotated so, or assigned from a parameter that is."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and _is_foreign(node.annotation):
            found.add(ast.unparse(node.target))
        elif isinstance(node, ast.FunctionDef):
            given = {each.arg for each in node.args.args if _is_foreign(each.annotation)}
            for inner in node.body:
                if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Tuple):
                    names = [ast.unparse(each) for each in inner.targets[0].elts]
                    values = inner.value.elts if isinstance(inner.value, ast.Tuple) else []
                    pairs = zip(names, map(ast.unparse, values), strict=False)
                    found |= {name for name, value in pairs if value in given}
    return {name for name in found if name.startswith("self.")} | {"self.model_runner"}


def _is_foreign(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in _FOREIGN


class _Scope:
    """One function, and which of its variables are vLLM's."""

    def __init__(
        self, function: ast.FunctionDef, outer: list[ast.FunctionDef], foreign: set[str], fields: set[str]
    ) -> None:
        self.function, self.foreign, self.held = function, foreign, set(fields)
        for each in (*outer, function):
            arguments = (*each.args.args, *each.args.kwonlyargs)
            self.held |= {a.arg for a in arguments if _is_foreign(a.annotation)}
        for _ in range(3):  # a loop may use what a later line binds
            for each in (*outer, function):
                for node in ast.walk(each):
                    self._bind(node)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and self.is_held(node.value):
            for target in node.targets:
                self._hold(target)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                for name, value in zip(getattr(target, "elts", []), node.value.elts, strict=False):
                    if self.is_held(value):
                        self._hold(name)
        elif isinstance(node, ast.For | ast.comprehension) and self.is_held(node.iter):
            self._hold(node.target)
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Call):
            self._bind_zip(node.target, node.iter)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            self.held |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            self.held |= {alias.name for alias in node.names if alias.name == "vllm"}

    def _bind_zip(self, target: ast.expr, call: ast.Call) -> None:
        if isinstance(target, ast.Tuple) and ast.unparse(call.func) in ("zip", "enumerate"):
            names = target.elts[1:] if ast.unparse(call.func) == "enumerate" else target.elts
            for name, value in zip(names, call.args, strict=False):
                if self.is_held(value):
                    self._hold(name)

    def _hold(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.held.add(target.id)

    def is_held(self, node: ast.expr) -> bool:
        """Whether an expression is something of vLLM's."""
        if isinstance(node, ast.Name):
            return node.id in self.held
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            return whole in self.held or (node.attr not in _OPAQUE and self.is_held(node.value))
        if isinstance(node, ast.Call):
            return self._is_held_call(node)
        if isinstance(node, ast.BoolOp):
            return any(self.is_held(each) for each in node.values)
        if isinstance(node, ast.IfExp):
            return self.is_held(node.body) or self.is_held(node.orelse)
        return isinstance(node, ast.Subscript | ast.Starred) and self.is_held(node.value)

    def _is_held_call(self, node: ast.Call) -> bool:
        name = ast.unparse(node.func).split(".")[-1]
        if name in _LOOKUPS:
            path = node.args[1]
            opaque = isinstance(path, ast.Constant) and str(path.value).split(".")[-1] in _OPAQUE
            return name != "hasattr" and not opaque and self.is_held(node.args[0])
        if name in ("iter", "next", "zip", "list", "sorted"):
            return any(self.is_held(each) for each in node.args)
        return name in self.foreign or self.is_held(node.func)

    def names(self) -> Iterator[tuple[str, int]]:
        """Every name that is looked up on something of vLLM's."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Attribute):
                owned = self.is_held(node.value) and ast.unparse(node) not in self.held
                if owned or ast.unparse(node) == "self.model_runner":
                    yield node.attr, node.lineno
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in _LOOKUPS:
                if self.is_held(node.args[0]) and isinstance(node.args[1], ast.Constant):
                    yield from ((name, node.lineno) for name in str(node.args[1].value).split("."))
            elif isinstance(node, ast.For) and _is_path_loop(node):
                yield from ((name, line) for text, line in _strings(node.iter) for name in text.split("."))


def _is_path_loop(node: ast.For) -> bool:
    """`for path in ("requests", …): _need(runner, path)`."""
    return ast.unparse(node.target) == "path" and "_need" in ast.unparse(node)
