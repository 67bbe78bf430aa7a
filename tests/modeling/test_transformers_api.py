"""What changes between versions of transformers and torch: found by its name, or one error that names the versions."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers as t
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from hermes_async import IncompatibleVersionError, UnsupportedModelError
from hermes_async.modeling import transformers_api as api
from hermes_async.modeling.packed import check_forward_signature
from hermes_async.modeling.skeleton import build_model
from tests.project import PYPROJECT, ROOT


@pytest.fixture(autouse=True)
def warn_again():
    api.warn_of_untested_versions.cache_clear()
    yield
    api.warn_of_untested_versions.cache_clear()


@pytest.mark.parametrize("library", api.TESTED_VERSIONS)
def test_the_declared_range_is_the_tested_one(library: str) -> None:
    declared = next(one for one in PYPROJECT["project"]["dependencies"] if one.startswith(f"{library}>="))
    allowed = SpecifierSet(declared.removeprefix(library))
    lowest, highest = api.TESTED_VERSIONS[library]
    assert lowest in allowed
    assert highest in allowed
    major, minor, *_ = (int(part) for part in highest.split("."))
    assert f"{major}.{minor + 1}.0" not in allowed
    major, minor, *_ = (int(part) for part in lowest.split("."))
    assert f"{major}.{minor - 1}.9" not in allowed


def test_the_oldest_tested_versions_are_the_lowest_declared_ones() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    for declared in map(Requirement, PYPROJECT["project"]["dependencies"]):
        lowest = next(Version(one.version) for one in declared.specifier if one.operator == ">=")
        assert Version(pinned[declared.name]).release[: len(lowest.release)] == lowest.release, declared


@pytest.mark.parametrize(
    ("library", "version", "warned"),
    [
        ("transformers", "5.19.0", True),
        ("transformers", "5.25.1", True),
        ("transformers", "6.0.0.dev0", True),
        ("torch", "2.99.0+cpu", True),
        ("torch", f"{api.TESTED_VERSIONS['torch'][1]}+cu130", False),
        ("transformers", api.TESTED_VERSIONS["transformers"][0], False),
    ],
)
def test_a_version_outside_the_range_is_one_warning(
    library: str, version: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The module that is asked, though a test may have imported the library anew.
    monkeypatch.setattr(getattr(api, library), "__version__", version)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        api.warn_of_untested_versions()
        api.warn_of_untested_versions()
    assert len(seen) == warned
    for warning in seen:
        assert version in str(warning.message)


def test_what_a_version_lacks_is_one_error_that_names_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(t.PreTrainedModel, "_from_config")
    with pytest.raises(IncompatibleVersionError, match="make a model") as caught:
        build_model(t.LlamaConfig(num_hidden_layers=1), torch.float32, None, where="here")
    assert caught.value.installed["transformers"] == t.__version__
    assert t.__version__ in str(caught.value)
    assert api.TESTED_VERSIONS["transformers"][1] in str(caught.value)


class _Model(nn.Module):
    def __init__(self, forward: object) -> None:
        super().__init__()
        self.forward = forward  # type: ignore[assignment]


def test_the_kv_cache_is_found_by_its_old_and_new_name() -> None:
    def old(input_ids: object, attention_mask: object, position_ids: object, past_key_values: object) -> None: ...

    def new(input_ids: object, attention_mask: object, position_ids: object, cache: object) -> None: ...

    def none(input_ids: object, attention_mask: object, position_ids: object) -> None: ...

    assert api.kv_cache_argument(_Model(old)) == "past_key_values"  # type: ignore[arg-type]
    assert api.kv_cache_argument(_Model(new)) == "cache"  # type: ignore[arg-type]
    assert api.kv_cache_argument(_Model(none)) is None  # type: ignore[arg-type]
    check_forward_signature(_Model(new))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=f"{t.__version__} takes no KV cache"):
        check_forward_signature(_Model(none))  # type: ignore[arg-type]
