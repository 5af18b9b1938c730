"""The API answers any request as its OpenAPI description says."""

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode

from audience_sync.calls.model import CallType
from tests.intake.conftest import AS_SHOP, KEY

PATHS = [("GET", "/healthz"), ("POST", "/v1/batch"), *(("POST", f"/v1/{each}") for each in CallType)]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("GET", "/healthz", GenerationMode.POSITIVE),
        *((*each, mode) for each in PATHS[1:] for mode in GenerationMode),
    ],
)
def test_answers_are_as_described(make_api, method, path, mode):
    api = make_api(tracked=f'write_keys = ["{KEY}"]\ncalls_per_second = 1_000_000').api
    operation = schemathesis.openapi.from_asgi("/openapi.json", api)[path][method]

    lenient = [
        checks.positive_data_acceptance
    ]  # descriptions say that one of two ids is required, and much else
    if path == "/v1/batch":
        lenient.append(checks.negative_data_rejection)  # its calls are refused one by one

    @settings(max_examples=50)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(headers=AS_SHOP, excluded_checks=lenient)

    check()


ALIASES = ["import", "b", *(each.value[0] for each in CallType)]


def test_everything_that_is_served_is_described(make_api):
    described = schemathesis.openapi.from_asgi("/openapi.json", make_api().api).raw_schema["paths"]
    aliases = {path for path, each in described.items() if "$ref" in each}
    assert aliases == {f"/v1/{name}" for name in ALIASES}
    assert sorted(
        (method.upper(), path) for path, each in described.items() if path not in aliases for method in each
    ) == sorted(PATHS)
