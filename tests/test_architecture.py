"""The order of the rooms: imports go one way, and each foreign library is known where it belongs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import hermes_async

PACKAGE = Path(hermes_async.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
BASE = {"config", "errors", "foreign_errors", "results"}
ROOMS = (
    "storage",
    "memory",
    "pipeload",
    "planning",
    "quantization",
    "modeling",
    "serving",
    "engine",
    "profiler",
    "conversion",
)
MAX_LINES = 450


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed module, which many tests walk."""
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Every module that `path` imports, wherever in it; of `from a import b` also `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ROOMS:
        allowed = {*ROOMS[: ROOMS.index(room) + 1], *BASE}
    elif room == "errors.py":
        allowed = set()
    elif room == "config.py" or room in ("foreign_errors.py", "results.py"):
        allowed = {"errors"}
    elif room in ("server", "integrations"):  # as users' own services do, they know the engine's public names alone
        allowed = {*BASE, "server", *hermes_async.__all__, "__version__"}
    else:  # the command line and the demo
        return
    for name in imported(path):
        root, *rest = name.split(".")
        if root == "hermes_async":
            assert rest or room in ("server", "integrations"), f"{path} imports the whole package"
            if not rest:
                continue
            assert rest[0] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_each_room_knows_only_its_libraries(path: Path) -> None:
    room, libraries = room_of(path), roots(path)
    if room in ("storage", "memory", "pipeload", "errors.py", "config.py", "foreign_errors.py", "results.py"):
        assert not libraries & {"transformers", "tokenizers", "jinja2"}
    if room == "modeling":
        assert not libraries & {"asyncio", "anyio", "aiofiles", "uvloop"}
    if ids(path) in ("serving/scheduler.py", "serving/speculation.py", "serving/sweep_times.py") or (
        room == "planning" and path.name != "profile_store.py"
    ):
        assert not libraries & {"asyncio", "anyio", "os", "pathlib", "torch"}
    assert not libraries & {"trio", "utils", "pytest", "hypothesis"}


def test_aiofiles_is_known_to_the_reader_alone() -> None:
    assert [ids(path) for path in MODULES if "aiofiles" in roots(path)] == ["storage/reader.py"]


def test_nothing_is_unpickled() -> None:
    assert [ids(path) for path in MODULES if roots(path) & {"pickle", "dill", "joblib"}] == []


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_modules_are_of_a_size_to_be_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_calls_with_many_arguments_name_them(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
            assert len(positional) <= 5 or ast.unparse(node.func).endswith(".add_row"), ast.unparse(node)


def test_every_module_says_what_it_is() -> None:
    assert [ids(path) for path in MODULES if not ast.get_docstring(tree_of(path))] == []


# Names that start with an underscore and are ours, or Python's; every other one is a library's private name.
_PRIVATE = re.compile(r"_[a-z]\w*")


def private_names_of_others(path: Path) -> set[str]:
    """Attributes that begin with an underscore and that no class or module of the package defines."""
    used = {
        node.attr
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and _PRIVATE.fullmatch(node.attr)
    }
    return used - OWN_NAMES - {"_exit"}  # os._exit is documented


def bound_name(node: ast.AST) -> str | None:
    """The name of a function, a class, an attribute of `self` or a variable that is bound here."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else None
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def own_names() -> set[str]:
    """Every name that the package itself binds."""
    nodes = [node for path in MODULES for node in ast.walk(tree_of(path))]
    return {name for node in nodes if (name := bound_name(node)) is not None}


OWN_NAMES = own_names()
PRIVATE_NAMES = {name for name in OWN_NAMES if re.fullmatch(r"_[A-Za-z]\w*", name)}
CHANGING = ("past_key_values", "cache_params", "conversion_mapping", "core_model_loading")


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_private_and_changing_names_of_libraries_are_in_one_module(path: Path) -> None:
    if ids(path) in (
        "modeling/transformers_api.py",
        "modeling/generation_api.py",
        "modeling/chat_api.py",
        "modeling/experts_api.py",
        "quantization/kernel_layouts.py",
        "demo/train.py",
    ):
        return
    assert not private_names_of_others(path)
    words = {
        word
        for node in ast.walk(tree_of(path))
        for word in (
            [node.attr] if isinstance(node, ast.Attribute) else
            [node.arg] if isinstance(node, ast.keyword) and node.arg else
            [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        )
    }  # fmt: skip
    words |= {part for name in imported(path) if name.startswith("transformers.") for part in name.split(".")}
    assert not words & set(CHANGING)


# --- the tests ---

TESTS = Path(__file__).parent
INSIDE = "inside.py"
# Tests that read private names of the module they test. May only become fewer: others go through `inside.py`.
PRIVATE_IN_TESTS = {
    "engine/test_opening.py": {"_BUILDING"},
    "memory/test_automatic_budget.py": {"_resize"},
    "memory/test_claims.py": {"_CLAIMS", "_observe"},
    "features/machines.py": {"_observe"},
    "fuzz/__main__.py": {"_exit"},  # that of os
    "modeling/test_attention.py": {"_grouped_attention"},
    "modeling/test_kernels.py": {"_packs_attention"},
    "modeling/test_selfcheck.py": {"_separately"},
    "pipeload/conftest.py": {"_free"},
    "profiler/test_profiler.py": {"_DISK_REST_SECONDS", "_DISK_SECONDS", "_KERNEL_SECONDS"},
    "serving/test_kv_blocks.py": {"_free", "_root", "_unused"},
    "storage/test_buffers.py": {"_map", "_within"},
    "storage/test_hub.py": {"_FIRST_BYTES"},
    "storage/test_parking.py": {"_DEFAULT_FOLDER", "_MAX_BYTES_PER_CALL", "_O_TMPFILE", "_fd"},
    "storage/test_rows.py": {"_buffer"},
}


def private_names_in(path: Path) -> set[str]:
    """Private names of the package that a test reads, imports or replaces, and does not define itself."""
    tree = tree_of(path)
    own = {name for node in ast.walk(tree) if (name := bound_name(node)) is not None}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            used |= set() if of_itself else {node.attr}
        elif isinstance(node, ast.alias):
            used.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            used.add(node.value.rpartition(".")[2])  # as `monkeypatch.setattr` takes it
    return used & PRIVATE_NAMES


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_use_no_private_names(path: Path) -> None:
    name = str(path.relative_to(TESTS))
    if name not in (INSIDE, Path(__file__).name):
        assert private_names_in(path) == PRIVATE_IN_TESTS.get(name, set())
