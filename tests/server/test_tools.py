"""Tools, structured output, the brake and biases of the server."""

import json

import calling
import pytest

pytest.importorskip("llguidance")

import jsonschema_rs

from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import InputError
from mlx_densesteer.generation import grammar
from mlx_densesteer.server import encoding

QUESTION = held_out(1)[0].question
SCHEMA = {
    "type": "object",
    "properties": {"left": {"enum": [1, 23, 456]}, "why": {"type": "string", "maxLength": 12}},
    "required": ["left", "why"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    with calling.calling_server(tmp_path_factory.mktemp("tools")) as running:
        yield running


@pytest.fixture
def free(monkeypatch):
    """As without the extra ``json``: no call is constrained."""
    monkeypatch.setattr(encoding, "can_constrain", lambda: False)


def first(body):
    choice = body["choices"][0]
    return choice["message"], choice["finish_reason"]


def streamed(events):
    """Return the message that the deltas make, and why it ended."""
    content, made, reason = "", [], None
    for event in events:
        for choice in event["choices"]:
            content += choice["delta"].get("content", "")
            for call in choice["delta"].get("tool_calls", ()):
                assert call["index"] == len(made)
                made.append({k: v for k, v in call.items() if k not in ("index", "id")})
            reason = choice["finish_reason"] or reason
    return content, made, reason


def check_call(call):
    assert set(call) == {"id", "type", "function"} and call["id"].startswith("call_")
    function = call["function"]
    [schema] = [
        tool["function"]["parameters"]
        for tool in calling.TOOLS
        if tool["function"]["name"] == function["name"]
    ]
    jsonschema_rs.validate(schema, json.loads(function["arguments"]))


def test_a_call_whole_and_streamed(calls, free):
    """Under the vector the model calls; its text is not steered, else it would be marks without end."""
    asked = {"tools": calling.TOOLS, "steering": {}, "max_tokens": 3}
    body = calls.chat("x", **asked)
    message, reason = first(body)
    assert message["content"] is None and reason == "length"  # then it calls again: max_tokens
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    assert body["steering"]["calls"] is False
    content, made, reason = streamed(calls.stream("x", **asked))
    assert (content, reason) == ("", "length")
    assert made == [{"type": "function", "function": call["function"]}]
    steered = first(calls.chat("x", **asked | {"steering": {"tool_calls": True}}))[0]
    assert steered["content"] == "<tool_call>" * 3 and "tool_calls" not in steered


def test_without_a_call_the_answer_is_text(calls):
    plain = calls.chat("x")
    assert first(plain) == ({"role": "assistant", "content": "51", "refusal": None}, "stop")
    assert first(calls.chat("x", tools=calling.TOOLS)) == first(plain)
    none = calls.chat("x", tools=calling.TOOLS, tool_choice="none", steering={}, max_tokens=2)
    assert first(none)[0]["content"] == "<tool_call>" * 2  # no tools: nothing is read as a call
    assert none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize("steering", [None, {}])
def test_a_call_can_be_required_or_named(calls, steering):
    asked = {"tools": calling.TOOLS, "steering": steering, "max_tokens": 100}
    asked["parallel_tool_calls"] = False
    message, reason = first(calls.chat("x", tool_choice="required", **asked))
    assert reason == "tool_calls" and message["content"] is None
    check_call(message["tool_calls"][0])
    for name in ("add", "now"):
        named = {"type": "function", "function": {"name": name}}
        message, reason = first(calls.chat("x", tool_choice=named, **asked))
        [call] = message["tool_calls"]
        check_call(call)
        assert reason == "tool_calls" and call["function"]["name"] == name


def test_a_grammar_that_cannot_be_made_is_logged_without_its_reason(calls, caplog, monkeypatch):
    """The reason may quote the request's schemas; the calls are then read as they come."""

    def refuse(*_, **__):
        raise InputError("the field 'private-name' is a puzzle")

    monkeypatch.setattr(encoding, "json_grammar", refuse)
    asked = {"tools": calling.TOOLS, "steering": {}, "max_tokens": 3}
    assert first(calls.chat("x", **asked))[0]["tool_calls"]
    assert "not constrained" in caplog.text and "private" not in caplog.text


def test_steered_calls_always_parse(calls):
    """They are constrained: several calls in an answer, unless that is not wanted; and drawn."""
    asked = {"tools": calling.TOOLS, "steering": {}, "max_tokens": 120}
    message, reason = first(calls.chat("x", **asked))
    made = message["tool_calls"]
    assert reason == "length" and len(made) > 1 and len({call["id"] for call in made}) == len(made)
    one, reason = first(calls.chat("x", parallel_tool_calls=False, **asked))
    assert len(one["tool_calls"]) == 1 and reason == "tool_calls"
    asked |= {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0}
    for seed in range(5):
        drawn, reason = first(calls.chat("x", seed=seed, **asked))
        assert reason == "tool_calls"
        made += drawn["tool_calls"]
    for call in made:
        check_call(call)


def test_what_a_tool_returned_is_read(calls):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
    }
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]  # fmt: skip
    body = calls.chat(messages, tools=calling.TOOLS)
    tokenizer = calls.service.vectors.model.tokenizer
    plain = [
        {**message, "content": message["content"] or ""} for message in json.loads(json.dumps(messages))
    ]  # fmt: skip
    plain[1]["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": 2}
    expected = tokenizer.apply_chat_template(plain, tools=calling.TOOLS, add_generation_prompt=True)
    assert body["usage"]["prompt_tokens"] == len(expected)
    assert first(body)[0]["content"] == "51"
    # text of control tokens is text, also in arguments
    call["function"]["arguments"] = json.dumps({"a": "<|im_end|></tool_call>"})
    more = calls.chat(messages, tools=calling.TOOLS)["usage"]["prompt_tokens"]
    assert more == len(expected) + len('"<|im_end|></tool_call>"') - len('1, "b": 2')


def test_a_call_that_cannot_be_read_stays_text(tmp_path, free):
    with calling.calling_server(tmp_path, inside=calling.BROKEN) as server:
        asked = {"tools": calling.TOOLS, "steering": {}, "max_tokens": 3}
        text = f"<tool_call>{calling.BROKEN}</tool_call>"
        message, _ = first(server.chat("x", **asked))
        assert message["content"] == text and "tool_calls" not in message
        assert streamed(server.stream("x", **asked))[:2] == (text, [])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function: is missing."),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name: is missing."),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name: "),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: "),
        ({"tools": calling.TOOLS * 2}, "expected each name once"),
        ({"tools": calling.TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice: expected one of"),
        ({"tool_choice": "required"}, "tool_choice: expected one of"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "objct"}}}]},
         "the parameters of the tool f: cannot be enforced: Invalid type: objct"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]}, "a tool, or the id or name"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1<|im_end|>", "content": "y"}]}, "id or name of a call"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "<|im_end|>"}}]}]}, "id or name of a call"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
         "messages[1].tool_calls[0].function: is missing."),
        ({"response_format": {"type": "json_schema"}}, "expected a schema in json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, 'Unimplemented keys: ["not"]'),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "the model knows 0 to"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
    ],
)  # fmt: skip
def test_what_is_refused(calls, fields, words):
    status, message = calls.refusal(fields)
    assert status == 400 and words in message, message
    assert first(calls.chat("x"))[0]["content"] == "51"


def test_a_model_without_tools_says_so(server):
    """Apps send tools with every question: then the model answers without them, and the header tells."""
    asked = {"messages": [{"role": "user", "content": QUESTION}], "tools": calling.TOOLS}
    status, headers, body = server.ask("/v1/chat/completions", asked)
    assert status == 200 and headers["X-DenseSteer-Ignored"] == "tools"
    assert first(body) == first(server.chat(QUESTION))
    for wrong in (
        {"tools": calling.TOOLS, "tool_choice": "required"},
        {"messages": [*asked["messages"], {"role": "tool", "content": "3"}]},
    ):
        assert "knows no tools" in server.refusal(wrong)[1]


def test_strict_tools_of_a_model_whose_calls_are_no_json(calls, monkeypatch):
    """They cannot be enforced, so they are refused; others are offered, and read as they come."""
    monkeypatch.setattr(encoding, "calls_are_json", lambda model: False)
    strict = [{"type": "function", "function": {**calling.TOOLS[0]["function"], "strict": True}}]
    assert "the tool add is strict" in calls.refusal({"tools": strict})[1]
    assert (
        "cannot be enforced"
        in calls.refusal({"tools": calling.TOOLS, "tool_choice": "required"})[1]
    )
    message, _ = first(calls.chat("x", tools=calling.TOOLS, steering={}, max_tokens=3))
    assert message["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize("steering", [None, {"strength": "20%"}, {"strength": "200%"}])
def test_json_whole_and_streamed(server, steering):
    asked = {"response_format": FORM, "steering": steering, "max_tokens": 100}
    message, reason = first(server.chat(QUESTION, **asked))
    assert reason == "stop"
    jsonschema_rs.validate(SCHEMA, json.loads(message["content"]))
    assert streamed(server.stream(QUESTION, **asked))[0] == message["content"]
    for form in ({"type": "json_object"}, {"type": "json_object", "schema": SCHEMA}):
        asked["response_format"] = form
        content = first(server.chat(QUESTION, **asked | {"max_tokens": 30}))[0]["content"]
        assert content.startswith('{"left": ' if "schema" in form else "{")


def test_rows_with_and_without_a_schema_do_not_change_each_other(server):
    """Eight at once, by turns; each says what it says alone."""
    from concurrent.futures import ThreadPoolExecutor

    requests = [
        {"max_tokens": 60, "steering": {"strength": s}} | ({"response_format": FORM} if form else {})
        for s in (0, "20%") for form in (0, 1) for _ in range(2)
    ]  # fmt: skip
    alone = [first(server.chat(QUESTION, **one)) for one in requests]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda one: first(server.chat(QUESTION, **one)), requests)
        assert list(together) == alone


def test_the_brake_is_on_for_steered_answers_and_told(server):
    asked = {"steering": {"strength": "100%"}, "max_tokens": 200}
    body = server.chat(QUESTION, **asked)
    choice = body["choices"][0]
    assert choice["brakes"][0]["strength_before"] > choice["brakes"][0]["strength_after"]
    assert choice["brakes"][0]["dropped"] > 50
    events = server.stream(QUESTION, **asked)
    assert streamed(events)[0] == choice["message"]["content"]
    last = events[-1]["choices"][0]
    assert last["brakes"] == choice["brakes"] and last["finish_reason"] == choice["finish_reason"]
    free = server.chat(QUESTION, **asked | {"steering": {"strength": "100%", "brake": False}})
    assert "brakes" not in free["choices"][0] and free["usage"]["completion_tokens"] == 200


def test_json_that_looks_like_a_call_is_the_answer(calls):
    call = {"name": "now", "arguments": {}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": call}}}
    asked = {"tools": calling.TOOLS, "response_format": form, "max_tokens": 60}
    message, reason = first(calls.chat("x", **asked))
    assert (json.loads(message["content"]), reason) == (
        call,
        "stop",
    ) and "tool_calls" not in message


def test_where_a_schema_may_demand_repetition_nothing_is_cut_unless_that_is_wanted(server):
    schema = {"type": "array", "items": {"const": 7}, "minItems": 150, "maxItems": 150}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"response_format": form, "max_tokens": 500}
    for brake in (None, True):
        steering = {"strength": "20%"} | ({"brake": brake} if brake else {})
        choice = server.chat(QUESTION, steering=steering, **asked)["choices"][0]
        assert json.loads(choice["message"]["content"]) == [7] * 150
        assert ("brakes" in choice) == bool(brake)


def test_a_hard_schema_holds_up_its_own_request_only(server, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    compiled = Event()
    monkeypatch.setattr(grammar, "_compile", lambda rules: compiled.wait(60) and None)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "hard"}}}
    with ThreadPoolExecutor(1) as pool:
        hard = pool.submit(server.refusal, {"response_format": form})
        server.chat(QUESTION, max_tokens=2)
        assert not hard.done()
        compiled.set()
        assert "too intricate" in hard.result()[1]


def test_penalties_and_biases(server):
    tokenizer = server.service.vectors.model.tokenizer
    usual = first(server.chat(QUESTION, max_tokens=40))[0]["content"]
    token = tokenizer.encode(usual)[0]
    banned = first(server.chat(QUESTION, max_tokens=5, logit_bias={str(token): -100}))[0]["content"]
    assert tokenizer.encode(banned)[0] != token
    only = first(server.chat(QUESTION, max_tokens=5, logit_bias={str(token): 100}))[0]["content"]
    assert tokenizer.encode(only) == [token] * 5
    asked = {"logit_bias": {str(token): 100}, "max_tokens": 6}
    for fields in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"presence_penalty": -1}):
        asked |= fields
        first_time = first(server.chat(QUESTION, **asked))
        again = first(server.chat(QUESTION, **asked))  # now the prompt is in the cache
        assert first_time == again
    calm = first(server.chat(QUESTION, max_tokens=40, frequency_penalty=2.0))[0]["content"]
    assert calm != usual
    raw = {"prompt": "Sam has", "max_tokens": 4, "logit_bias": {str(token): 100}}
    text = server.ask("/v1/completions", raw)[2]["choices"][0]["text"]
    assert tokenizer.encode(text) == [token] * 4
