"""schemathesis against the served OpenAPI schema: no answer that it does not document, and no error of the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hermes_async.server import ServerSettings
from tests.server.running import MODEL, RunningServer, running_server

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def short() -> Iterator[RunningServer]:
    """A server of short answers, as any number of tokens may be asked for."""
    with running_server(ServerSettings(served_model_name=MODEL, default_max_tokens=4), context_length=32) as running:
        yield running
        running.check_nothing_is_left()


@pytest.fixture(scope="module")
def openapi(short: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{short.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_every_answer_is_documented(openapi: Any, mode: GenerationMode) -> None:
    operations = [found.ok() for found in openapi.get_all_operations()]
    statuses: set[int] = set()
    for operation in operations:
        if mode.is_negative and not (operation.body or operation.path_parameters):
            continue  # nothing of it can be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=25 if operation.body else 5,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            statuses.add(case.call_and_validate(checks=CHECKS).status_code)

        check()
    assert len(operations) >= 7
    assert statuses >= ({422} if mode.is_negative else {200, 404}), statuses
