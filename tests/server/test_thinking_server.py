"""The server with a model that thinks (``thinking.py``): two parts, budgets, efforts."""

import pytest
from serving import serving

from mlx_densesteer import SteeringVector
from mlx_densesteer.errors import InputError
from mlx_densesteer.server.effort import EFFORTS, Effort, parse_effort
from mlx_densesteer.server.vectors import NamedVector
from mlx_densesteer.steering.request import Amount

QUESTION = "17 * 3?"


@pytest.fixture(scope="module")
def vector(thinking_folder):
    found = SteeringVector.load(thinking_folder / "out.npz")
    found.name = "out"
    return found


@pytest.fixture(scope="module")
def server(thinking_folder, vector):
    with serving(thinking_folder, [NamedVector(vector, Amount(2.0), (1,), "think")]) as running:
        yield running


@pytest.fixture(scope="module")
def plain(thinking_folder):
    with serving(thinking_folder, []) as running:
        yield running


def said(body):
    message = body["choices"][0]["message"]
    return message.get("reasoning_content"), message["content"]


def streamed(events):
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    return tuple("".join(d.get(k, "") for d in deltas) for k in ("reasoning_content", "content"))


def test_thought_and_answer_come_apart_whole_and_streamed(plain):
    asked = {"thinking_budget": 7, "max_tokens": 30}
    body = plain.chat(QUESTION, **asked)
    assert said(body) == ("tabc\n\nta", "51")
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 11
    events = plain.stream(QUESTION, stream_options={"include_usage": True}, **asked)
    assert streamed(events) == said(body)
    kinds = [sorted(e["choices"][0]["delta"]) for e in events if e["choices"]]
    assert all(len(kind) <= 1 for kind in kinds[1:])  # a piece is of one part
    # a text completion is what the model wrote
    status, _, raw = plain.ask("/v1/completions", {"prompt": "1", "max_tokens": 3})
    assert status == 200 and "reasoning_content" not in raw["choices"][0]
    cut = plain.chat(QUESTION, max_tokens=5)
    assert said(cut) == ("tabc", "") and cut["choices"][0]["finish_reason"] == "length"


def test_a_budget_steers_with_a_vector_and_ends_by_force_without(server):
    body = server.chat(QUESTION, thinking_budget=9, max_tokens=30)
    assert (
        said(body)[1] == "" and body["steering"]["budget"]["tokens"] == 9
    )  # 20 % is too weak here
    assert body["steering"]["strength"] == 0
    body = server.chat(QUESTION, thinking_budget=9, thinking_budget_hard=True, max_tokens=30)
    assert said(body) == ("tabc\n\ntabc", "51") and body["steering"] is None
    assert body["choices"][0]["thinking_limit"] == 9
    body = server.chat(QUESTION, steering={"strength": 0.25}, thinking_budget=9, max_tokens=30)
    assert body["steering"]["strength"] == 0.25
    assert body["steering"]["budget"]["strength"] > 0.25


def test_a_soft_budget_needs_a_vector(plain, server):
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 20,
        "thinking_budget": 5,
    }
    for one, fields, ignored in (
        (plain, {"thinking_budget_hard": False}, "thinking_budget"),
        (server, {"steering": {"strength": 0}}, None),
        (server, {"model": "Clockwork@out=0"}, None),
    ):
        status, headers, found = one.ask("/v1/chat/completions", body | fields)
        assert (status, headers["X-DenseSteer-Ignored"]) == (200, ignored)
        assert "thinking_limit" not in found["choices"][0]
        assert (found["steering"] is None) == (ignored is not None)
    del body["thinking_budget"]
    _, headers, _ = plain.ask("/v1/chat/completions", body | {"thinking_budget_hard": True})
    assert headers["X-DenseSteer-Ignored"] == "thinking_budget_hard"


def test_levels_of_effort(server, plain, vector, thinking_folder):
    low = server.chat(QUESTION, reasoning_effort="low", max_tokens=30)
    assert said(low) == ("", "51")
    assert low["steering"]["budget"]["tokens"] == 512 and low["steering"]["strength"] == 2
    medium = server.chat(QUESTION, reasoning_effort="medium", max_tokens=30)
    assert medium["steering"]["strength"] == 1 and medium["steering"]["budget"]["tokens"] == 2048
    high = server.chat(QUESTION, reasoning_effort="high", max_tokens=30)
    assert high["steering"] is None and said(high)[1] == ""
    # where the request says how to steer, a level only sets the budget
    both = server.chat(
        QUESTION,
        reasoning_effort="low",
        thinking_budget=3,
        steering={"strength": 1.5},
        max_tokens=30,
    )
    assert both["steering"]["strength"] == 1.5 and both["steering"]["budget"]["tokens"] == 3
    named = server.chat(QUESTION, model="Clockwork@out=2", reasoning_effort="high", max_tokens=30)
    assert named["steering"]["strength"] == 2
    for one, fields in (
        (server, {"reasoning_effort": "xhigh"}),
        (plain, {"reasoning_effort": "low"}),
    ):
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3} | fields
        status, headers, _ = one.ask("/v1/chat/completions", body)
        assert status == 200 and headers["X-DenseSteer-Ignored"] == "reasoning_effort"


def test_levels_are_read_from_the_command_line():
    assert parse_effort("low=30%:256") == ("low", Effort(Amount(0.3, "dose"), budget=256))
    assert parse_effort("high=-1") == ("high", Effort(Amount(-1.0)))
    for text in ("low", "low=", "max=1", "low=1:", "low=1:0", "low=1:x", "=1"):
        with pytest.raises(InputError):
            parse_effort(text)
    assert set(EFFORTS) == {"low", "medium", "high"}


def test_a_conversation_without_its_thoughts_is_read_from_the_cache(server):
    fields = {"steering": {"strength": 2}, "max_tokens": 30}
    first = server.chat(QUESTION, **fields)
    messages = [
        {"role": "user", "content": QUESTION},
        first["choices"][0]["message"],
        {"role": "user", "content": "And twice?"},
    ]
    second = server.chat(messages, **fields)
    assert said(second) == ("", "51")
    again = server.chat(messages, **fields)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert said(again) == said(second)


def test_rows_of_all_kinds_in_one_batch(server):
    import threading

    asked = [
        {"thinking_budget": 4, "thinking_budget_hard": True}, {"steering": {"strength": 2}},
        {"steering": {"strength": 2, "positions": "steps"}}, {}, {"n": 2, "reasoning_effort": "low"},
        {"steering": {"strength": 2, "positions": "first:2"}},
    ]  # fmt: skip
    alone = [server.chat(QUESTION, max_tokens=20, **one) for one in asked]
    found = [None] * len(asked)

    def ask(number):
        found[number] = server.chat(QUESTION, max_tokens=20, **asked[number])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, alone, strict=True):
        assert [c["message"] for c in one["choices"]] == [c["message"] for c in other["choices"]]


@pytest.mark.parametrize(
    "fields", [{"thinking_budget": 0}, {"thinking_budget": "5"}, {"thinking_budget": -1}]
)
def test_budgets_that_cannot_be_are_refused(server, fields):
    status, message = server.refusal(fields)
    assert status == 400 and "thinking_budget" in message
    status, message = server.refusal({"steering": {"strength": 1, "positions": "first:0"}})
    assert status == 400 and "first:N" in message


def test_a_model_that_does_not_think_ignores_them(demo_model):
    with serving() as running:
        body = {"messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 3}
        fields = {"reasoning_effort": "low", "thinking_budget": 5}
        status, headers, found = running.ask("/v1/chat/completions", body | fields)
        assert status == 200 and found["steering"] is None
        assert headers["X-DenseSteer-Ignored"] == "reasoning_effort, thinking_budget"
        assert "think" not in running.ask("/v1/steering")[2]["positions"]
