"""What works without any extra, and how what needs one says so."""

from __future__ import annotations

import json
import subprocess
import sys

from hermes_async.demo import MODEL_PATH


def without_extras(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.packaging.without_extras", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_public_name_can_be_imported() -> None:
    code = (
        "import hermes_async, importlib.util\n"
        "for name in hermes_async.__all__: getattr(hermes_async, name)\n"
        "print(hermes_async.__version__, importlib.util.find_spec('fastapi'), importlib.util.find_spec('PIL'))"
    )
    ended = without_extras("-c", code)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split()[1:] == ["None", "None"]


def test_the_commands_can_be_listed() -> None:
    ended = without_extras("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "generate" in ended.stdout


def test_generate_works() -> None:
    ended = without_extras("generate", MODEL_PATH, "All:", "--memory", "6MiB", "--max-tokens", 3, "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["usage"]["completion_tokens"] == 3


def test_doctor_names_what_is_missing() -> None:
    code = (
        "from hermes_async.profiler.findings import software\n"
        "required = [\"fastapi>=0.1; extra == 'serve'\", \"pillow>=1; extra == 'vision'\"]\n"
        "print([finding.values['missing'] for finding in software(required) if finding.name in ('extra serve', "
        "'extra vision')])"
    )
    ended = without_extras("-c", code)
    assert (ended.stdout, ended.stderr) == ("[['fastapi'], ['pillow']]\n", "")


def test_serve_names_its_extra() -> None:
    ended = without_extras("serve", MODEL_PATH)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert "[serve]'" in ended.stderr
