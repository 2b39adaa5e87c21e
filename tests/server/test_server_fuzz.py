"""Requests that schemathesis makes from the description that the server serves.

Longer, with what memory does: python tests/server/test_server_fuzz.py EXAMPLES
"""

import collections
import os
import sys

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("starlette")

from server_process import server_process

schemathesis = (
    pytest.importorskip("schemathesis") if not os.environ.get("CI") else __import__("schemathesis")
)

from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.slow

OPERATIONS = [
    ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/v1/steering"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
]  # fmt: skip


def fuzz(server, method, path, examples, statuses):
    """Send what is made of one operation; every answer must be one that the description knows."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    send_all(schema[path][method], GenerationMode.POSITIVE, examples, statuses)
    if method == "POST":  # every path is a string: a GET cannot be wrong
        send_all(schema[path][method], GenerationMode.NEGATIVE, examples, statuses)


def send_all(operation, mode, examples, statuses):
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])  # fmt: skip
    def send(case):
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            shorten(case.body)
        response = case.call(timeout=60)
        statuses[operation.path, response.status_code] += 1
        assert response.status_code < 500
        case.validate_response(response, checks=CHECKS)

    send()


def shorten(body):
    """Ask for short answers, mostly of the model and the vector that there are."""
    steering = body.get("steering")
    if len(str(body.get("model"))) % 4:
        body.pop("model", None)
    if isinstance(steering, dict) and len(str(steering)) % 4:
        steering["vector"] = "demo"
        if isinstance(steering.get("strength"), str) and len(str(steering)) % 3:
            steering["strength"] = "20%"
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], 3)
    body.setdefault("max_tokens", 3)
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)
    if len(str(body)) % 3 == 0:  # nothing is wrong with these but perhaps their steering
        known = {name: body[name] for name in ("stream", "temperature", "steering") if name in body}
        asked = [{"role": "user", "content": "2 + 2?"}]
        body.clear()
        body |= known | {"prompt": "2 +", "messages": asked, "max_tokens": 3}


CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_is_sent_is_answered_as_described(process, method, path):
    statuses = collections.Counter()
    fuzz(process, method, path, 60 if method == "POST" else 25, statuses)
    if method == "POST":
        found = {status for _, status in statuses}
        assert {200, 400} <= found <= {200, 400, 404, 413}


def main(examples):
    statuses = collections.Counter()
    with server_process("--prompt-cache", "64") as server:
        memory = [server.resident_mib]
        for share in range(6):
            for method, path in OPERATIONS:
                fuzz(server, method, path, examples // 6, statuses)
            memory.append(server.resident_mib)
            print(
                f"{share + 1}/6",
                sum(statuses.values()),
                [round(m) for m in memory],
                file=sys.stderr,
            )
        server.stop()
        print(server.said, file=sys.stderr)
    for (path, status), count in sorted(statuses.items()):
        print(f"{path} {status}: {count}")
    print("requests:", sum(statuses.values()), "resident MiB:", [round(m) for m in memory])


if __name__ == "__main__":
    main(int(sys.argv[1]))
