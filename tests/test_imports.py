"""Imports point one way. A room imports those below it, modules do not import each other in a circle, and what
a module keeps to itself is nobody else's."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import meshdemo

# From the top: each may import what stands below it, and the modules that stand beside the rooms.
ROOMS = ("cli", "bench", "ui", "remediation", "runtime", "control", "apps")
ALONE = "workloads"  # what runs inside the mesh; bench makes its load with the same generator
BASIC = {"durations", "errors", "files", "kube", "limits", "names", "positions", "resources"}

ROOT = Path(meshdemo.__file__).parent
MODULES = {
    ".".join(("meshdemo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


class NotForTypes(ast.NodeTransformer):
    """Leaves out what is there for the type checker alone."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def imports(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a module imports of the project, wherever it does; name may be empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("meshdemo"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            source = node.module or ""
            if source.split(".")[0] == "meshdemo":
                for alias in node.names:
                    whole = f"{source}.{alias.name}"
                    yield (whole, "") if whole in MODULES else (source, alias.name)


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
IMPORTS = {module: list(imports(module, tree)) for module, tree in TREES.items()}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_every_module_stands_in_a_room_that_is_known() -> None:
    assert {room(module) for module in MODULES} == {"", "__main__", ALONE, *ROOMS, *BASIC}


def allowed(importer: str, imported: str) -> bool:
    above, below = room(importer), room(imported)
    if below in (above, ""):
        return True
    if above in ("__main__", "cli"):
        return below != "__main__"
    if above == ALONE:
        return False
    if above in BASIC:
        return below in BASIC
    if below == ALONE:
        return above == "bench"
    return below in BASIC or (below in ROOMS and ROOMS.index(below) > ROOMS.index(above))


def test_rooms_import_what_is_below_them() -> None:
    wrong = [(a, b) for a, found in IMPORTS.items() for b, _ in found if not allowed(a, b)]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    # An import inside a function counts: it is how a circle is hidden.
    at_work = {a: {b for b, _ in imports(a, NotForTypes().visit(tree))} for a, tree in TREES.items()}
    TopologicalSorter(at_work).prepare()  # raises CycleError, which names the modules


def test_what_is_private_is_not_imported() -> None:
    wrong = [
        (module, source, name)
        for module, found in IMPORTS.items()
        for source, name in found
        if name.startswith("_") and name != "__version__"
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["meshdemo.control.server", "meshdemo.runtime.kubernetes.server"])
def test_a_control_plane_says_how_grpc_is_to_run_before_it_loads_it(module: str) -> None:
    watch = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'grpc': print(os.environ.get('GRPC_EXPERIMENTS'))\n"
        f"sys.meta_path.insert(0, Watch()); import {module}\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run([sys.executable, "-c", watch], env=env, check=True, capture_output=True, text=True)
    assert done.stdout == "-event_engine_listener\n"
