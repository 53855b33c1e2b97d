"""Rules of the house: layers import downward, and every equation of the index is where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "stepladder"

FLOORS = [
    ["__init__", "errors", "prediction", "conditioning", "packing", "discovery"],
    ["storage", "progress", "precision", "fingerprint"],
    ["images", "processes", "resample"],
    ["ladder", "renoise"],
    ["sampling"],
    ["scheduler", "losses"],
    ["world"],
    ["backbones", "rewards"],
    ["roles"],
    ["methods", "data", "samplers", "planning"],
    ["training", "export"],
    ["evaluation", "distillation", "pipeline", "latency", "spectrum"],
    ["synthesis"],
    ["reproduction"],
    ["reporting"],
    ["cli"],
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "stepladder":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stepladder."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stepladder.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_layers_import_downward_only(path):
    own = part_of(path)
    for other in imports(path):
        assert other == own or FLOOR_OF[other] < FLOOR_OF[own], f"{own} must not import {other}"


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_methods_name_no_backbone(path):
    names = {item.stem for item in (SOURCE / "backbones").glob("*.py")} - {"base", "__init__", "loading"}
    text = path.read_text(encoding="utf-8").lower()
    assert not [name for name in names if f"backbones.{name}" in text]


ENTRY = re.compile(r"^\| (?P<label>[^|]+) \| `(?P<file>[\w/]+\.py)` \| `(?P<name>[\w.]+)` \|", re.MULTILINE)
INDEX = ENTRY.findall((ROOT / "docs" / "papers.md").read_text(encoding="utf-8"))


def test_the_index_has_entries():
    assert len(INDEX) >= 10


def named_nodes(tree: ast.Module) -> dict[str, ast.AST]:
    """Functions, classes, methods (as Class.method) and module constants."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}": item for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: f"{entry[0].strip()}-{entry[2]}")
def test_every_equation_is_where_the_index_says(entry):
    label, file, name = (part.strip() for part in entry)
    text = (SOURCE / file).read_text(encoding="utf-8")
    nodes = named_nodes(ast.parse(text))
    assert name in nodes, f"{file} defines no {name}"
    node = nodes[name]
    lines = text.splitlines()[max(0, node.lineno - 2) : node.end_lineno]
    assert re.search(rf"{re.escape(label)}(?!\d)", "\n".join(lines)), f"{name} in {file} does not name {label}"


def test_every_equation_in_the_code_is_in_the_index():
    said = set()
    for path in SOURCE.rglob("*.py"):
        said |= set(
            re.findall(
                r"# ((?:RMD|DMD2|DMDR|TDM|SwD) (?:Eq\. \d+|Algorithm \d|Table \d|student loss|section \d\.\d))",
                path.read_text(encoding="utf-8"),
            )
        )
    assert said <= {entry[0].strip() for entry in INDEX}
