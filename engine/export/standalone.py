"""Turns a function of the engine or of a user's file into source code that needs only torch, with everything it uses.

Definitions are copied verbatim, with comments; imports from the engine are replaced by the imported definitions.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
Import = ast.Import | ast.ImportFrom
OURS = "engine"


class NotSelfContained(Exception):
    """A function cannot be made self-contained; the message names the file and the reason."""


@dataclass(frozen=True)
class Imported:
    """The origin of a name: `from module import name as alias` or, if `name` is empty, `import module as alias`."""

    module: str
    name: str
    alias: str

    def __str__(self) -> str:
        """The statement that imports it."""
        head, own = (
            (f"from {self.module} import {self.name}", self.name)
            if self.name
            else (f"import {self.module}", self.module.split(".")[0])
        )
        return head if self.alias == own else f"{head} as {self.alias}"


@dataclass
class Source:
    """A Python file: its top-level definitions and imports by name, and the names of the definitions to copy."""

    path: Path
    lines: list[str]
    defined: dict[str, Definition]
    imported: dict[str, Imported]
    wanted: set[str] = field(default_factory=set)


@dataclass
class Closure:
    """Everything that a function needs: definitions by file, which file uses which, and imports of other libraries."""

    sources: dict[Path, Source] = field(default_factory=dict)
    uses: dict[Path, set[Path]] = field(default_factory=dict)
    imports: set[Imported] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)

    def import_lines(self) -> list[str]:
        """The imports, one line per module."""
        plain = sorted(str(entry) for entry in self.imports if not entry.name)
        modules: dict[str, list[str]] = {}
        for entry in sorted(self.imports, key=str):
            if entry.name:
                modules.setdefault(entry.module, []).append(str(entry).partition(" import ")[2])
        return plain + [f"from {module} import {', '.join(names)}" for module, names in sorted(modules.items())]

    def text(self) -> str:
        """The definitions. A file comes after the files that it uses; within a file the order is kept."""
        uses = {path: self.uses.get(path, set()) for path in self.sources}
        try:
            paths = list(TopologicalSorter(uses).static_order())
        except CycleError as error:
            raise NotSelfContained("its files import each other") from error
        blocks: list[tuple[str, bool]] = []
        for source in map(self.sources.__getitem__, paths):
            # By line, so that a statement that defines two names is copied once.
            nodes = {source.defined[name].lineno: name for name in source.wanted}
            for _, name in sorted(nodes.items()):
                blocks.append((excerpt(source, name), isinstance(source.defined[name], ast.Assign | ast.AnnAssign)))
        blocks += [(f"{alias} = {name}", True) for alias, name in self.renamed.items()]
        gaps = [""] + ["\n" if a and b else "\n\n\n" for (_, a), (_, b) in pairwise(blocks)]
        return "".join(gap + text for gap, (text, _) in zip(gaps, blocks, strict=True))

    def add_imports(self, wanted: set[Imported], names: set[str]) -> None:
        """Adds imports for a file that will also define `names`; NotSelfContained if two things have the same name."""
        self.imports |= wanted
        defined = {name for source in self.sources.values() for name in source.wanted} | set(self.renamed)
        imported = sorted(entry.alias for entry in self.imports)
        ambiguous = (
            {a for a, b in pairwise(imported) if a == b} | (defined & names) | (set(imported) & (defined | names))
        )
        if ambiguous:
            raise NotSelfContained(f"`{min(ambiguous)}` would mean two things in one file; rename it")


def call_of(build: Callable[..., Any]) -> tuple[Callable[..., Any], str]:
    """A space's `build` as a module-level function and its leading arguments as text, like "0.25, 1, ".

    Raises NotSelfContained for a method, a lambda, or an argument that is not a literal.
    """
    function, arguments, named = build, [], {}
    if isinstance(build, partial):
        function, arguments, named = build.func, list(build.args), build.keywords
    if getattr(function, "__qualname__", "<") != getattr(function, "__name__", "") or not hasattr(function, "__code__"):
        raise NotSelfContained("`build` is not a function at the top level of a file")
    for value in (*arguments, *named.values()):
        if not _literal(value):
            raise NotSelfContained(f"`build` has the argument {value!r}, which cannot be written as text")
    if named:
        raise NotSelfContained(f"`build` has arguments by name ({', '.join(named)}); give them by position")
    return function, "".join(f"{value!r}, " for value in arguments)


def closure_of(*definitions: Callable[..., Any]) -> Closure:
    """Everything that module-level functions and classes need, apart from torch and the standard library.

    Raises NotSelfContained, with the file and the name, if it needs another library.
    """
    closure = Closure()
    for one in definitions:
        _add_definition(closure, Path(inspect.getfile(one)), one.__name__)
    return closure


def excerpt(source: Source, name: str) -> str:
    """The source of a top-level definition with the comment above it, without inner imports from the engine."""
    node = source.defined[name]
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while start and source.lines[start - 1].startswith("#"):
        start -= 1
    removed = {line for entry in _inner_imports(node) if _of_ours(entry) for line in _span(entry)}
    assert node.end_lineno is not None
    kept: list[str] = []
    for number in range(start + 1, node.end_lineno + 1):
        line, before = source.lines[number - 1], kept[-1].rstrip() if kept else ""
        gap = not line.strip() and number - 1 in removed and (not before or before.endswith(":"))
        if number not in removed and not gap:
            kept.append(line)
    return "\n".join(kept)


def _add_definition(closure: Closure, path: Path, name: str) -> None:
    """Adds a definition of a file, and everything it needs, to a closure."""
    source = closure.sources.get(path)
    if source is None:
        source = closure.sources[path] = read(path)
    if name in source.wanted:
        return
    if name not in source.defined:
        if name in source.imported:
            return _add_import(closure, source, source.imported[name])
        raise NotSelfContained(f"{path.name} has no `{name}` at its top level")
    other = next((found for found in closure.sources.values() if name in found.wanted), None)
    if other is not None:
        raise NotSelfContained(f"both {other.path.name} and {path.name} define `{name}`; rename one")
    source.wanted.add(name)
    node = source.defined[name]
    inside = {entry.alias: entry for statement in _inner_imports(node) for entry in entries(statement, source)}
    needed, annotated = _names_in(node)
    for used in sorted(needed):
        _resolve(closure, source, inside, used)
    for used in sorted(annotated - needed):
        _add_annotation(closure, source, inside, used)


def _resolve(closure: Closure, source: Source, inside: dict[str, Imported], name: str) -> None:
    if name in inside:
        # An inner import from other libraries stays in place.
        if inside[name].module.split(".")[0] == OURS or not _allowed(inside[name]):
            _add_import(closure, source, inside[name])
    elif name in source.defined:
        _add_definition(closure, source.path, name)
    elif name in source.imported:
        _add_import(closure, source, source.imported[name])


def _add_annotation(closure: Closure, source: Source, inside: dict[str, Imported], name: str) -> None:
    """Adds a name used in an annotation if that is cheap. It may be missing: annotations are not evaluated."""
    entry = inside.get(name) or source.imported.get(name)
    if entry is not None and _allowed(entry) and name not in source.defined:
        closure.imports.add(entry)
    elif name in source.defined and isinstance(source.defined[name], ast.ClassDef):
        _add_definition(closure, source.path, name)
    elif name in source.defined:
        names, _ = _names_in(source.defined[name])
        if not names & (set(source.defined) | set(source.imported)):
            _add_definition(closure, source.path, name)  # an alias of built-in types


def _add_import(closure: Closure, source: Source, entry: Imported) -> None:
    if _allowed(entry):
        closure.imports.add(entry)
        return
    if entry.module.split(".")[0] != OURS or not entry.name:
        raise NotSelfContained(f"{source.path.name} imports {entry.module}")
    found = importlib.util.find_spec(entry.module)
    if found is None or found.origin is None:
        raise NotSelfContained(f"{source.path.name} imports {entry.module}, which is not a file")
    closure.uses.setdefault(source.path, set()).add(Path(found.origin))
    _add_definition(closure, Path(found.origin), entry.name)
    if entry.alias != entry.name:
        closure.renamed[entry.alias] = entry.name


def read(path: Path) -> Source:
    """The top-level definitions and imports of a Python file, including those under `if TYPE_CHECKING`."""
    text = path.read_text()
    source = Source(path, text.splitlines(), {}, {})
    body = ast.parse(text).body
    checked = [
        inner
        for node in body
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in node.body
    ]
    for node in (*body, *checked):
        if isinstance(node, Import):
            source.imported |= {entry.alias: entry for entry in entries(node, source)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            source.defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            source.defined |= dict.fromkeys(names, node)
    return source


def entries(statement: Import, source: Source) -> Iterator[Imported]:
    """The names that an import statement binds."""
    if isinstance(statement, ast.ImportFrom):
        if statement.level:
            raise NotSelfContained(f"{source.path.name} imports from its own package (`from . import`)")
        for alias in statement.names:
            yield Imported(statement.module or "", alias.name, alias.asname or alias.name)
        return
    for alias in statement.names:
        parent, _, leaf = alias.name.rpartition(".")
        if alias.asname and parent:
            yield Imported(parent, leaf, alias.asname)  # import torch.nn as nn
        else:
            yield Imported(alias.name, "", alias.asname or alias.name.split(".")[0])


def _allowed(entry: Imported) -> bool:
    root = entry.module.split(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


def _of_ours(statement: Import) -> bool:
    modules = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else [a.name for a in statement.names]
    return any(module.split(".")[0] == OURS for module in modules)


def _inner_imports(node: ast.AST) -> list[Import]:
    return [inner for inner in ast.walk(node) if isinstance(inner, Import)]


def _names_in(node: ast.AST) -> tuple[set[str], set[str]]:
    """Names that the node looks up at run time, and names in annotations."""
    annotations = [
        annotation
        for inner in ast.walk(node)
        for annotation in (getattr(inner, "annotation", None), getattr(inner, "returns", None))
        if isinstance(annotation, ast.AST)
    ]
    inside = {id(inner) for annotation in annotations for inner in ast.walk(annotation)}
    names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)]
    return {n.id for n in names if id(n) not in inside}, {n.id for n in names if id(n) in inside}


def _span(node: Import) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
