"""The pages say nothing that is not so: code compiles, programs run, commands, options, links and anchors exist."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import anyio
import pytest
import typer

import hermes_async
from hermes_async.cli import app
from hermes_async.demo import MODEL_PATH
from tests.docs.pages import PAGES, CodeBlock, anchors, code_blocks, code_spans, links, name_of, prose
from tests.project import PYPROJECT, ROOT

BLOCKS = [block for page in PAGES for block in code_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
PROGRAMS = [block for block in PYTHON if re.search(r"^(any|async)io\.run\(", block.code, re.MULTILINE)]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
           for name, command in COMMANDS.items()}  # fmt: skip
PARAMETERS = {
    "Engine": set(inspect.signature(hermes_async.Engine).parameters),
    "EngineConfig": {field.name for field in fields(hermes_async.EngineConfig)},
    "SamplingParams": {field.name for field in fields(hermes_async.SamplingParams)},
}


def code_of(block: CodeBlock) -> str:
    """The block's code, with the file that it includes on the site."""
    return re.sub(
        r"^--8<--\n(.+)\n--8<--$", lambda match: (ROOT / match[1]).read_text(), block.code, flags=re.MULTILINE
    )


def parsed(block: CodeBlock) -> ast.Module:
    code = compile(code_of(block), str(block), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(code, ast.Module)
    return code


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_names_what_exists(block: CodeBlock) -> None:
    for node in ast.walk(parsed(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = {"hermes_async": hermes_async, "engine": hermes_async.Engine}.get(node.value.id)
            assert owner is None or hasattr(owner, node.attr) or node.attr == "demo", f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Call):
            check_keywords(node)


def check_keywords(call: ast.Call) -> None:
    """Calls of the public classes name only parameters that there are."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in PARAMETERS:
        assert {keyword.arg for keyword in call.keywords} <= PARAMETERS[name], ast.unparse(call)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_calls_in_the_text_name_what_exists(page: Path) -> None:
    for span in code_spans(page):
        match = re.match(r"(?:hermes_async\.)?(Engine|EngineConfig|SamplingParams)\((.*)\)$", span)
        if match is not None:
            arguments = re.sub(r"(?<!=)\.\.\., ", "", match[2])  # those that are not shown
            call = ast.parse(f"{match[1]}({arguments})", mode="eval").body
            assert isinstance(call, ast.Call)
            check_keywords(call)


@pytest.mark.parametrize("block", [block for block in PROGRAMS if "--8<--" not in block.code], ids=str)
def test_programs_run(block: CodeBlock, capsys: pytest.CaptureFixture[str]) -> None:
    """With the demo model instead of a placeholder."""
    code = block.code.replace("path or hub id", str(MODEL_PATH))
    exec(compile(code, str(block), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_there_is_a_program_that_runs() -> None:
    assert [name_of(block.page) for block in PROGRAMS if "--8<--" not in block.code] == [
        "README.md",
        "docs/guides/structured-outputs.md",
        "docs/index.md",
    ]


@pytest.mark.parametrize(("name", "num_blocks"), [("docs/guides/tasks.md", 4), ("docs/guides/budget.md", 1)])
def test_the_guide_runs(name: str, num_blocks: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block that the demo model can do runs in the order of the page, in an engine that is open."""
    blocks = [block for block in code_blocks(ROOT / name) if block.language == "python" and needs_only_the_demo(block)]
    assert len(blocks) == num_blocks

    async def run_all() -> None:
        names = {"hermes_async": hermes_async}
        async with hermes_async.Engine(MODEL_PATH) as engine:
            names["engine"] = engine
            for block in blocks:
                code = block.code.replace("path or hub id", str(MODEL_PATH)).replace("3GiB", "6MiB")
                ran = eval(compile(code, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
                if inspect.iscoroutine(ran):
                    await ran
                names["engine"] = engine
            if "stack" in names:
                await names["stack"].aclose()

    anyio.run(run_all)
    assert capsys.readouterr().out


def needs_only_the_demo(block: CodeBlock) -> bool:
    return not re.search(r"sentence-transformers|classify|opus-mt|whisper|input_ids=\[\[101", block.code)


# --- shell ---


def commands(block: CodeBlock) -> Iterator[list[str]]:
    """The words of each command line, without its comment."""
    joined = re.sub(r"\\\n\s*", " ", block.code)
    for line in joined.splitlines():
        if line.startswith(("$ ", "# ")):  # "# " is a root's prompt
            yield shlex.split(line[2:], comments=True)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("console", "sh")], ids=str)
def test_commands_and_options_exist(block: CodeBlock) -> None:
    found = list(commands(block)) or [shlex.split(line, comments=True) for line in block.code.splitlines()]
    for words in found:
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    for span in code_spans(page):
        if span.startswith(("hermes-async ", "make ", "python -m benchmarks")):
            check_command(shlex.split(span))


def check_command(words: list[str]) -> None:
    match words:
        case ["hermes-async", name, *arguments]:
            if not name.startswith("--") and name != "COMMAND":
                options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
                assert options <= OPTIONS[name], f"{name} has no {options - OPTIONS[name]}"
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            names = {name for targets in known for name in targets.split()}
            assert {target for target in targets if "=" not in target} <= names
        case ["python", "-m", module, *_]:
            path = ROOT / module.replace(".", "/")
            is_there = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
            assert module in ("pytest", "benchmarks.NAME") or is_there, module
        case ["python", path, *_]:
            assert (ROOT / path).is_file(), path
        case ["pip", "install", *packages]:
            for extras in re.findall(r"\[([\w,-]+)\]", " ".join(packages)):
                assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])


# --- links ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def test_files_in_the_text_exist() -> None:
    """Paths of the project in code, such as `planning/resize.py`."""
    places = (ROOT, ROOT / "hermes_async", ROOT / "docs")
    missing = {
        f"{name_of(page)}: {span}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for span in code_spans(page)
        if re.fullmatch(r"[a-z_]+(/[\w.-]+)+\.(py|md)", span) and not any((place / span).exists() for place in places)
    }
    assert missing == set()


def test_every_image_is_used() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert [image.name for image in (ROOT / "docs" / "images").iterdir() if f"images/{image.name}" not in text] == []


def test_the_troubleshooting_page_has_every_error() -> None:
    text = prose(ROOT / "docs" / "troubleshooting.md")
    errors = {name for name in hermes_async.__all__ if name.endswith("Error")}
    assert {name for name in errors if f"`{name}`" not in text} == set()


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: hermes_async\.(\w+)$", pages, re.MULTILINE))
    assert documented == set(hermes_async.__all__)
