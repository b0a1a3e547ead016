"""The arrows between the packages: stages below cluster, cluster below serving; training uses stages."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "stages": set(),
    "cluster": {"stages"},
    "serving": {"stages", "cluster"},
    "training": {"stages"},
}
FILES = [path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, at_import_time=False):
    """Full names of what a file imports, in its own words; with `at_import_time`, only outside of functions."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_upward(path):
    package = path.relative_to(ROOT).parts[0]
    own = {name.split(".")[0] for name in imports(path)} & BELOW.keys()
    assert own <= BELOW[package] | {package}


def test_modules_do_not_import_one_another_in_a_circle():
    modules = {module_name(path): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        used = {part for full in imports(path, at_import_time=True) for part in (full, full.rpartition(".")[0])}
        graph[name] = (used & modules.keys()) - {name}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_stages_know_nothing_of_ray():
    stages = [path for path in FILES if path.is_relative_to(ROOT / "stages")]
    assert not [path for path in stages if any(name.split(".")[0] == "ray" for name in imports(path))]


@pytest.mark.parametrize("package", ["serving", "serving.client", "cluster", "cluster.member", "stages.messages"])
def test_light_packages_leave_torch_unloaded(package):
    code = f"import {package}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
