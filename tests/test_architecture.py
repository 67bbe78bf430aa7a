"""The order of the rooms: imports go one way, and each foreign library is known where it belongs.

One test for each rule. It fails with a list of all that breaks the rule.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import hermes_async

PACKAGE = Path(hermes_async.__file__).parent
TESTS = Path(__file__).parent
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
USERS = ("server", "integrations")  # as users' own services do, they know the engine's public names alone
MAX_LINES = 450


@dataclass(frozen=True)
class Source:
    """A parsed file.

    Attributes:
        name: Its path within the package, or within the tests.
    """

    name: str
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of its syntax tree; the first is the module."""
        return list(ast.walk(ast.parse(self.text)))

    @property
    def room(self) -> str:
        return self.name.partition("/")[0]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @cached_property
    def imported(self) -> set[str]:
        """Every module that it imports, wherever; of `from a import b` also `a.b`."""
        names: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: a relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        return names

    @property
    def libraries(self) -> set[str]:
        return {name.partition(".")[0] for name in self.imported}


def sources_in(folder: Path) -> list[Source]:
    return [Source(path.relative_to(folder).as_posix(), path.read_text()) for path in sorted(folder.rglob("*.py"))]


@pytest.fixture(scope="module")
def modules() -> list[Source]:
    """All of the package."""
    return sources_in(PACKAGE)


def allowed_in(room: str) -> set[str] | None:
    """What of the package a room may import; None for the command line and the demo, which may import all."""
    if room in ROOMS:
        return {*ROOMS[: ROOMS.index(room) + 1], *BASE}
    if room == "errors.py":
        return set()
    if room in ("config.py", "foreign_errors.py", "results.py"):
        return {"errors"}
    return {*BASE, "server", *hermes_async.__all__, "__version__"} if room in USERS else None


def test_imports_go_one_way(modules: list[Source]) -> None:
    faults = []
    for module in modules:
        allowed = allowed_in(module.room)
        for name in sorted(module.imported):
            root, *rest = name.split(".")
            if root != "hermes_async" or allowed is None:
                continue
            if not rest and module.room not in USERS:
                faults.append(f"{module.name} imports the whole package")
            if rest and rest[0] not in allowed:
                faults.append(f"{module.name} imports {name}")
    assert faults == []


def test_each_room_knows_only_its_libraries(modules: list[Source]) -> None:
    faults = []
    for module in modules:
        refused = {"trio", "utils", "pytest", "hypothesis"}
        if module.room in ("storage", "memory", "pipeload", *(f"{name}.py" for name in BASE)):
            refused |= {"transformers", "tokenizers", "jinja2"}
        if module.room == "modeling":
            refused |= {"asyncio", "anyio", "aiofiles", "uvloop"}
        if module.name in ("serving/scheduler.py", "serving/speculation.py", "serving/sweep_times.py") or (
            module.room == "planning" and module.stem != "profile_store"
        ):
            refused |= {"asyncio", "anyio", "os", "pathlib", "torch"}
        faults += [f"{module.name} imports {name}" for name in sorted(module.libraries & refused)]
    assert faults == []


def test_aiofiles_is_known_to_the_reader_alone(modules: list[Source]) -> None:
    assert [module.name for module in modules if "aiofiles" in module.libraries] == ["storage/reader.py"]


def test_what_a_path_is_is_asked_of_file_kinds(modules: list[Source]) -> None:
    """The methods of `Path` say no when the system cannot tell, since Python 3.14."""
    faults = []
    for module in modules:
        if module.name not in ("storage/file_kinds.py", "server/page.py"):  # the page's files may be in an archive
            named = {node.attr for node in module.nodes if isinstance(node, ast.Attribute)}
            faults += [f"{module.name}: {name}" for name in sorted(named & {"exists", "is_file", "is_dir"})]
    assert faults == []


def test_nothing_is_unpickled(modules: list[Source]) -> None:
    assert [module.name for module in modules if module.libraries & {"pickle", "dill", "joblib"}] == []


def test_modules_are_of_a_size_to_be_read(modules: list[Source]) -> None:
    lengths = {module.name: len(module.text.splitlines()) for module in modules}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
    assert [module.name for module in modules if module.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_calls_with_many_arguments_name_them(modules: list[Source]) -> None:
    faults = []
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.Call):
                positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
                if len(positional) > 5 and not ast.unparse(node.func).endswith(".add_row"):
                    faults.append(f"{module.name}:{node.lineno}: {ast.unparse(node)}")
    assert faults == []


def test_every_module_says_what_it_is(modules: list[Source]) -> None:
    trees = {module.name: module.nodes[0] for module in modules}
    assert [name for name, tree in trees.items() if isinstance(tree, ast.Module) and not ast.get_docstring(tree)] == []


# --- private names ---


def bound_name(node: ast.AST) -> str | None:
    """The name of a function, a class, an attribute of `self` or a variable that is bound here."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else None
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def names_bound_in(source: Source) -> set[str]:
    return {name for node in source.nodes if (name := bound_name(node)) is not None}


@pytest.fixture(scope="module")
def own_names(modules: list[Source]) -> set[str]:
    """Every name that the package itself binds. Another one that starts with an underscore is a library's."""
    return set().union(*map(names_bound_in, modules))


CHANGING = {"past_key_values", "cache_params", "conversion_mapping", "core_model_loading"}
KNOW_LIBRARIES = (
    "modeling/transformers_api.py",
    "modeling/generation_api.py",
    "modeling/chat_api.py",
    "modeling/experts_api.py",
    "quantization/kernel_layouts.py",
    "demo/train.py",
)


def words_in(module: Source) -> set[str]:
    """Attributes, keywords and texts, and the parts of what is imported from transformers."""
    words = {
        word
        for node in module.nodes
        for word in (
            [node.attr] if isinstance(node, ast.Attribute) else
            [node.arg] if isinstance(node, ast.keyword) and node.arg else
            [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        )
    }  # fmt: skip
    return words | {part for name in module.imported if name.startswith("transformers.") for part in name.split(".")}


def test_private_and_changing_names_of_libraries_are_in_few_modules(modules: list[Source], own_names: set[str]) -> None:
    known = own_names | {"_exit"}  # os._exit is documented
    faults = {}
    for module in modules:
        if module.name in KNOW_LIBRARIES:
            continue
        attributes = {node.attr for node in module.nodes if isinstance(node, ast.Attribute)}
        private = {name for name in attributes - known if re.fullmatch(r"_[a-z]\w*", name)}
        if found := private | (words_in(module) & CHANGING):
            faults[module.name] = found
    assert faults == {}


INSIDE = "inside.py"
# Tests that read private names of the module they test. May only become fewer: others go through `inside.py`.
PRIVATE_IN_TESTS = {
    "engine/test_opening.py": {"_BUILDING"},
    "memory/test_automatic_budget.py": {"_resize"},
    "memory/test_claims.py": {"_CLAIMS", "_observe"},
    "features/machines.py": {"_observe"},
    "fuzz/__main__.py": {"_exit"},  # that of os
    "modeling/test_attention.py": {"_grouped_attention"},
    "modeling/test_bfloat16_weight.py": {"_INPUTS", "_SMALL_BLOCK"},
    "modeling/test_kernels.py": {"_packs_attention"},
    "modeling/test_selfcheck.py": {"_separately"},
    "pipeload/conftest.py": {"_free"},
    "quantization/test_encoded_weight.py": {"_LEAST_BLOCK_ROWS"},
    "profiler/test_profiler.py": {"_DISK_REST_SECONDS", "_DISK_SECONDS", "_KERNEL_SECONDS"},
    "serving/test_kv_blocks.py": {"_free", "_root", "_unused"},
    "storage/test_buffers.py": {"_map", "_within"},
    "storage/test_hub.py": {"_FIRST_BYTES"},
    "storage/test_parking.py": {"_DEFAULT_FOLDER", "_MAX_BYTES_PER_CALL", "_O_TMPFILE", "_fd"},
    "storage/test_rows.py": {"_buffer"},
}


def private_names_in(test: Source, private_names: set[str]) -> set[str]:
    """Private names of the package that a test reads, imports or replaces, and does not define itself."""
    own = names_bound_in(test)
    used: set[str] = set()
    for node in test.nodes:
        if isinstance(node, ast.Attribute):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            used |= set() if of_itself else {node.attr}
        elif isinstance(node, ast.alias):
            used.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            used.add(node.value.rpartition(".")[2])  # as `monkeypatch.setattr` takes it
    return used & private_names


def test_tests_use_no_private_names(own_names: set[str]) -> None:
    private_names = {name for name in own_names if re.fullmatch(r"_[A-Za-z]\w*", name)}
    others = [test for test in sources_in(TESTS) if test.name not in (INSIDE, Path(__file__).name)]
    found = {test.name: private_names_in(test, private_names) for test in others}
    assert {name: names for name, names in found.items() if names} == PRIVATE_IN_TESTS
