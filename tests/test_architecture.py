"""The rooms of the house and who imports whom: what docs/architecture.md prints is what the code does."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from library.options.toml_file import PROJECT_ROOT

MOST_LINES = 400
PACKAGES = ("library", "networks")
PAGE = PROJECT_ROOT / "docs" / "architecture.md"


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in (PROJECT_ROOT / package).rglob("*.py")}


def room_of(module: str) -> str:
    """ "training", "search.study"; "ground" is what lies in library/ itself."""
    parts = module.split(".")
    if parts[0] == "networks":
        return "networks"
    folders = parts[1:] if MODULES[module].name == "__init__.py" else parts[1:-1]
    return ".".join(folders[: 2 if folders[:1] == ["search"] else 1]) or "ground"


def imports_of(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, at its top, in functions or for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            named = [name if name in MODULES else str(node.module) for name in inner]
        else:
            continue
        yield from (name for name in named if name in MODULES)


@cache
def imports() -> dict[str, set[str]]:
    return {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}


@cache
def arrows() -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    found: dict[str, set[str]] = {room_of(module): set() for module in MODULES}
    for module, imported in imports().items():
        found[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    return found


def printed_arrows() -> dict[str, set[str]]:
    """The table under "## Arrows"."""
    section = PAGE.read_text(encoding="utf-8").partition("## Arrows")[2]
    table = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert table is not None
    rows = (line.partition("->") for line in table[1].splitlines() if "->" in line)
    return {room.strip(): set(imported.split()) for room, _, imported in rows}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected nodes (Tarjan 1972), of two and more."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_and_no_room_imports_in_a_circle() -> None:
    assert circles(imports()) == []
    assert circles(arrows()) == []


def test_the_page_prints_the_arrows_that_there_are() -> None:
    here, printed = arrows(), printed_arrows()
    differences = defaultdict(list)
    for room in here.keys() | printed.keys():
        for other in here.get(room, set()) ^ printed.get(room, set()):
            kind = "not on the page" if other in here.get(room, set()) else "only on the page"
            differences[kind].append(f"{room} -> {other}")
    assert not differences, dict(differences)


def test_networks_import_nothing_of_the_library() -> None:
    assert arrows()["networks"] == set()


def test_no_file_is_longer_than_a_reader_holds() -> None:
    files = [*MODULES.values(), *PROJECT_ROOT.glob("*.py"), *(PROJECT_ROOT / "tests").rglob("*.py")]
    lengths = {
        path.relative_to(PROJECT_ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    assert not {name: count for name, count in lengths.items() if count > MOST_LINES}


def test_the_page_names_every_room_and_no_file_that_is_not_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tree = page.partition("```\n")[2].partition("```")[0]
    named = set(re.findall(r"\b([a-z_0-9]+)\.py\b", tree))
    there = {path.stem for folder in (*PACKAGES, "tools", "tests") for path in (PROJECT_ROOT / folder).rglob("*.py")}
    there |= {path.stem for path in PROJECT_ROOT.glob("*.py")}
    assert not named - there, "the page names files that are not there"
    rooms = {room.rpartition(".")[2] for room in arrows()} - {"ground"}
    assert not {room for room in rooms if f"{room}/" not in tree}, "the page leaves out rooms"
