"""The server as its clients see it: the real one, on the demo model."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from importlib import import_module

import pytest

pytest.importorskip("starlette")

from helpers import rounding
from serving import serving

from mlx_densesteer import Sampling, demo, load, resolve
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import ModelError
from mlx_densesteer.evaluation.grading import stated_answer
from mlx_densesteer.generation.answer import step_starts
from mlx_densesteer.model.likelihood import log_likelihoods
from mlx_densesteer.model.prompt import decode

QUESTIONS = [problem.question for problem in held_out(12)]
ASKED = [{"role": "user", "content": "Hi"}]


def text(body, choice=0):
    return body["choices"][choice]["message"]["content"]


def streamed(events):
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])


def test_an_answer_is_that_of_generate(server, solo):
    for strength in (0, "20%", -7.0):
        body = server.chat(QUESTIONS[0], steering={"strength": strength}, max_tokens=50)
        alone = solo(QUESTIONS[0], strength, max_tokens=50)
        assert text(body) == alone.text
        assert body["choices"][0]["finish_reason"] == alone.finish_reason
        usage = body["usage"]
        assert usage["completion_tokens"] == alone.tokens
        assert usage["prompt_tokens"] == alone.prompt_tokens
        assert usage["total_tokens"] == alone.tokens + alone.prompt_tokens
        details = usage["completion_tokens_details"]
        assert details["steps"] == alone.steps
        assert body["choices"][0]["step_starts"] == step_starts(alone.text)
        assert body["choices"][0]["stated_answer"] == stated_answer(alone.text)
        assert details["density"] == pytest.approx(alone.density, abs=0.01)
        assert details["time_to_first_token"] > 0 and details["tokens_per_second"] > 0


def test_all_ways_to_say_a_dose_are_the_same(server, solo):
    strength = solo(QUESTIONS[1], "20%", max_tokens=30).steering.strength
    ways = [
        {"model": "demo@demo=20%"},
        {"model": "demo@demo"},
        {"steering": {"strength": "20%"}},
        {"steering": {"strength": "20 %", "layer": 5, "vector": "demo", "positions": "all"}},
        {"steering": {}},
        {"steering": {"strength": strength, "layers": [5]}},
        {"steering": {"strength": str(strength)}},
    ]
    bodies = [server.chat(QUESTIONS[1], max_tokens=30, **way) for way in ways]
    assert {text(body) for body in bodies} == {solo(QUESTIONS[1], "20%", max_tokens=30).text}
    assert text(bodies[0]) != solo(QUESTIONS[1], max_tokens=30).text
    assert all(body["steering"] == bodies[0]["steering"] for body in bodies)
    applied = bodies[0]["steering"]
    assert applied.pop("fingerprint")
    assert applied == {
        "vector": "demo", "strength": strength, "layers": [5], "positions": "all", "dose": 0.2, "warning": None,
    }  # fmt: skip
    assert {body["model"] for body in bodies[:5]} == {"demo@demo=20%"}
    assert {body["model"] for body in bodies[5:]} == {f"demo@demo={strength!r}"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "demo"},
        {"model": "DEMO"},
        {"model": "demo@demo=0"},
        {"model": "demo@demo=0%"},
        {"steering": {"strength": 0}},
        {"steering": {"strength": "-0%", "layer": 3}},
    ],
)
def test_ways_to_ask_for_the_stock_model(server, solo, fields):
    body = server.chat(QUESTIONS[2], max_tokens=20, **fields)
    assert body["steering"] is None and body["model"] == "demo"
    assert text(body) == solo(QUESTIONS[2], max_tokens=20).text


def test_a_large_dose_has_a_warning_and_several_layers_share_a_dose(server):
    large = server.chat(QUESTIONS[1], model="demo@demo=100%", max_tokens=2)
    assert large["steering"]["dose"] == 1.0 and "large dose" in large["steering"]["warning"]
    steering = {"strength": "-30%", "layers": [3, 4, 5]}
    body = server.chat(QUESTIONS[1], steering=steering, max_tokens=2)
    assert body["steering"]["dose"] == 0.3 and body["steering"]["strength"] < 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "demo@demo=4.7612345"}, "demo@demo=4.7612345"),
        ({"model": "demo@demo=12.3456%"}, "demo@demo=12.3456%"),
        ({"model": "demo@demo=-.1%"}, "demo@demo=-0.1%"),
        ({"steering": {"strength": 2, "layer": 5}}, "demo@demo=2"),
        ({"steering": {"strength": 2, "layer": 3}}, "demo"),
        ({"steering": {"strength": 2, "positions": "generated"}}, "demo"),
    ],
)
def test_the_model_that_is_named_asks_for_the_same_again(server, fields, name):
    body = server.chat(QUESTIONS[1], max_tokens=1, **fields)
    assert body["model"] == name and body["steering"]
    if name != "demo":
        assert server.chat(QUESTIONS[1], max_tokens=1, model=name)["steering"] == body["steering"]


def test_many_clients_each_get_the_answer_of_their_own_steering(server, solo):
    rng = random.Random(0)
    asked = [
        {
            "prompt": rng.choice(QUESTIONS),
            "strength": rng.choice([0, 2.4, "20%", "-30%", 9.0]),
            "layers": rng.choice([(5,), (3,), (2, 4)]),
            "positions": rng.choice(["all", "prompt", "generated", "steps"]),
        }
        for _ in range(20)
    ]

    def ask(number):
        one = asked[number]
        steering = {k: one[k] for k in ("strength", "layers", "positions")}
        if number % 2:
            return streamed(server.stream(one["prompt"], steering=steering, max_tokens=24))
        return text(server.chat(one["prompt"], steering=steering, max_tokens=24))

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(len(asked))))
    for one, answer in zip(asked, answers, strict=True):
        assert answer == solo(**one, max_tokens=24).text, one
    assert len(set(answers)) > 10


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "steps"])
def test_a_conversation_is_answered_as_without_the_prompt_cache(server, solo, positions):
    messages, cached = [{"role": "system", "content": "You add numbers. " * 6}], []
    for turn, strength in enumerate((0, "20%", "20%", 2.4)):
        messages.append({"role": "user", "content": QUESTIONS[turn]})
        steering = {"strength": strength, "layer": 4, "positions": positions}
        body = server.chat(messages, steering=steering, max_tokens=16)
        prompt = tuple(tuple(message.items()) for message in messages)
        alone = solo(prompt, strength, layers=(4,), positions=positions, max_tokens=16)
        assert text(body) == alone.text
        cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages.append({"role": "assistant", "content": text(body)})
    assert cached[2] > 64, cached  # the turn before, under the same steering


def test_streaming_gives_the_same_text_and_ends_with_the_receipt(server):
    whole = server.chat(QUESTIONS[3], model="demo@demo=20%")
    events = server.stream(
        QUESTIONS[3], model="demo@demo=20%", stream_options={"include_usage": True}
    )
    assert streamed(events) == text(whole)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[0]["steering"] == events[-1]["steering"] == whole["steering"]
    assert len({e["id"] for e in events}) == 1
    reasons = [c["finish_reason"] for e in events for c in e["choices"]]
    assert reasons.pop() == "stop" and not any(reasons)
    last = events[-2]["choices"][0]
    for name in ("step_starts", "stated_answer"):
        assert last[name] == whole["choices"][0][name]
    assert last["stated_answer"] and len(last["step_starts"]) == 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all("usage" not in e for e in server.stream(QUESTIONS[3], max_tokens=3))


def test_logprobs_are_those_of_the_model(server, solo):
    import mlx.core as mx

    body = server.chat(QUESTIONS[4], max_tokens=12, logprobs=True, top_logprobs=3)
    entries = body["choices"][0]["logprobs"]["content"]
    assert len(entries) == 12
    assert b"".join(bytes(e["bytes"]) for e in entries).decode() == text(body)
    alone = solo(QUESTIONS[4], max_tokens=12)
    network, tokenizer = solo.model
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[4]}], add_generation_prompt=True
    )
    logits = network(mx.array([[*prompt, *alone.token_ids]]))[0, len(prompt) - 1 : -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for at, entry in enumerate(entries):
        expected = logprobs[at, alone.token_ids[at]].item()
        assert entry["logprob"] == pytest.approx(expected, abs=rounding(logits))
        top = [one["logprob"] for one in entry["top_logprobs"]]
        expected = sorted(logprobs[at].tolist(), reverse=True)[:3]
        assert top == pytest.approx(expected, abs=rounding(logits))
    chunks = server.stream(QUESTIONS[4], max_tokens=12, logprobs=True)
    told = [
        e
        for c in chunks
        for x in c["choices"]
        if x.get("logprobs")
        for e in x["logprobs"]["content"]
    ]
    assert [e["logprob"] for e in told] == pytest.approx([e["logprob"] for e in entries], abs=1e-4)


def test_sampling_with_a_seed_repeats_and_equals_generate(server, solo):
    fields = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 16}
    alone = [
        solo(QUESTIONS[5], max_tokens=16, sampling=Sampling(0.9, 0.95, s)).text for s in (7, 8)
    ]
    body = server.chat(QUESTIONS[5], seed=7, n=2, **fields)
    assert [text(body, 0), text(body, 1)] == alone
    assert body["usage"]["completion_tokens"] > len(body["choices"])
    with ThreadPoolExecutor(4) as pool:
        seeds = [7, 8, 7, 8]
        bodies = list(pool.map(lambda s: server.chat(QUESTIONS[5], seed=s, **fields), seeds))
    assert [text(b) for b in bodies] == [alone[s - 7] for s in seeds]


def test_stop_texts_and_limits(server, solo):
    whole = solo(QUESTIONS[6], max_tokens=20).text
    stop = whole[10:14]
    body = server.chat(QUESTIONS[6], stop=[stop, "zzz"], max_tokens=20)
    assert text(body) == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    body = server.chat(QUESTIONS[6], max_completion_tokens=5)
    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"


def test_plain_completions(server, solo):
    tokenizer = solo.model.tokenizer
    ids = tokenizer.encode("Sam has 3 apples")
    alone = solo("Sam has 3 apples", raw=True, max_tokens=8)
    for prompt in ("Sam has 3 apples", ids):
        status, _, body = server.ask(
            "/v1/completions", {"prompt": prompt, "max_tokens": 8, "logprobs": 2}
        )
        assert status == 200 and body["object"] == "text_completion"
        assert body["choices"][0]["text"] == alone.text
        assert len(body["choices"][0]["logprobs"]["tokens"]) == 8
        assert all(len(top) == 2 for top in body["choices"][0]["logprobs"]["top_logprobs"])
        assert body["choices"][0]["logprobs"]["text_offset"][:2] == [
            0,
            len(body["choices"][0]["logprobs"]["tokens"][0]),
        ]
    _, _, body = server.ask(
        "/v1/completions", {"prompt": "Sam has", "max_tokens": 8, "logprobs": 0}
    )
    found = body["choices"][0]["logprobs"]
    assert [list(top) for top in found["top_logprobs"]] == [[token] for token in found["tokens"]]
    several = {"prompt": ["Sam has 3 apples", "Kim"], "max_tokens": 8, "n": 2}
    _, _, body = server.ask("/v1/completions", several)
    texts = [choice["text"] for choice in body["choices"]]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == alone.text and texts[2] == texts[3] != alone.text
    kim = len(tokenizer.encode("Kim"))
    assert body["usage"]["prompt_tokens"] == len(ids) + kim


def test_a_stream_tells_what_the_whole_answer_tells(server):
    body = {"prompt": "Sam has 3 apples", "max_tokens": 8, "logprobs": 1}
    choice = server.ask("/v1/completions", body)[2]["choices"][0]
    whole, text_of_whole = choice["logprobs"], choice["text"]
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}),
                       {"Content-Type": "application/json"})  # fmt: skip
    lines = connection.getresponse().read().decode().split("\n")
    connection.close()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    told = [
        c["choices"][0]["logprobs"] for c in chunks if c["choices"] and c["choices"][0]["logprobs"]
    ]
    assert "".join(whole["tokens"]) == text_of_whole
    for name in ("tokens", "text_offset"):
        assert [x for one in told for x in one[name]] == whole[name]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_the_receipt_counts_the_time_between_tokens(server):
    details = server.chat(QUESTIONS[0], max_tokens=1)["usage"]["completion_tokens_details"]
    assert details["tokens_per_second"] is None
    began = time.monotonic()
    details = server.chat(QUESTIONS[0], max_tokens=30)["usage"]["completion_tokens_details"]
    assert details["tokens_per_second"] >= 29 / (time.monotonic() - began)


def test_cached_tokens_are_counted_for_each_prompt(server):
    long = "Sam has 3 apples. " * 40
    server.ask("/v1/completions", {"prompt": long, "max_tokens": 1})
    for prompt in ([long, "Kim"], ["Kim", long]):
        usage = server.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})[2]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 100


def test_a_tiny_temperature_is_greedy(server):
    greedy = text(server.chat(QUESTIONS[0], max_tokens=20))
    for temperature in (1e-300, 1e-39, 1e-7):
        assert (
            text(server.chat(QUESTIONS[0], max_tokens=20, temperature=temperature, seed=1))
            == greedy
        )


def test_a_part_of_the_content_may_have_other_keys(server):
    part = {"type": "text", "text": QUESTIONS[0], "cache_control": {"type": "ephemeral"}}
    message = [{"role": "user", "content": [part]}]
    assert text(server.chat(message, max_tokens=9)) == text(server.chat(QUESTIONS[0], max_tokens=9))


def test_models_are_listed_and_found(server):
    data = server.ask("/v1/models")[2]["data"]
    assert [one["id"] for one in data] == ["demo", "demo@demo=20%"]
    assert data[0]["steering"] is None and data[1]["steering"]["layers"] == [5]
    status, _, body = server.ask("/v1/models/demo@demo=0.3")
    assert status == 200 and body["steering"]["strength"] == 0.3
    assert server.ask("/v1/models/demo@demo=30%")[2]["steering"]["dose"] == 0.3
    assert server.ask("/v1/models/gpt-4o")[0] == 404


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "gpt-4o"}, 404, "demo@VECTOR=20%"),
        ({"model": "demo@"}, 404, "demo only"),
        ({"model": "demo@nothing=1"}, 400, "this server has demo"),
        ({"model": "demo@demo=much"}, 400, "expected a number"),
        ({"model": "demo@demo="}, 400, "expected a number"),
        ({"model": "demo@demo=nan"}, 400, "expected a number"),
        ({"model": "demo@demo=" + "9" * 10_000}, 400, "expected a number"),
        ({"model": "demo@demo=1", "steering": {"strength": 1}}, 400, "expected it once"),
        ({"steering": {"strenght": 1}}, 400, "unknown key 'strenght': expected vector, strength, layer,"),
        ({"steering": {"strength": 0.2, "relative": True}}, 400, "unknown key 'relative'"),
        ({"sterring": {"strength": 1}}, 400, "did you mean `steering`"),
        ({"steering": {"strength": 1, "layer": 9}}, 400, "no vector for layer 9"),
        ({"steering": {"strength": 1, "vector": "../demo"}}, 400, "this server has demo"),
        ({"steering": {"strength": 1e12}}, 400, "1e+09 at most"),
        ({"steering": {"layer": 3, "layers": [4]}}, 400, "steering: expected one of"),
        ({"steering": {"layers": []}}, 400, "no layers to steer"),
        ({"strength": 3}, 400, "`strength` belongs in `steering`"),
        ({"steering": {"layer": "3-4"}}, 400, "steering.layer: expected a whole number or a list."),
        ({"steering": {"strength": [1]}}, 400, "steering.strength: expected a number or text."),
        ({"steering": {"strength": True}}, 400, "steering.strength: expected a number or text."),
        ({"steering": {"strength": "9" * 65}}, 400, "at most 64 characters"),
        ({"messages": []}, 400, "messages: expected at least 1."),
        ({"stop": ["a"] * 17}, 400, "stop: expected text or at most 16 entries."),
        ({"messages": [{"content": "Hi"}]}, 400, "messages[0].role: is missing."),
        ({"model": "demo@demo=1e10"}, 400, "1e+09 at most"),
        ({"steering": {"strength": "1e10%"}}, 400, "1e+09 at most"),
        ({f"field{i}": 1 for i in range(65)}, 400, "65 unknown fields"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, 400, "`response_format` is not supported"),
        ({"prompt": "x", "tools": [{"type": "function"}]}, 400, "`tools` is not supported"),
        ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "no message of the user has text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages[0].content"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "expected one of"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": -2}, 400, "max_tokens"),
        ({"top_p": -0.1}, 400, "top_p"),
        ({"messages": [*ASKED, {"role": "assistant", "function_call": {"name": "f"}}]}, 400,
         "`function_call` (messages[1].function_call) is not supported"),
        ({"n": 9}, 400, "n: "),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "the model's context is 1024"),
    ],
)  # fmt: skip
def test_what_is_refused(server, fields, status, words):
    found, message = server.refusal(
        fields, f"/v1/{'' if 'prompt' in fields else 'chat/'}completions"
    )
    assert found == status and words in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "demo@nothing=1"}, "model"),
        ({"steering": {"vector": "nothing"}}, "steering.vector"),
        ({"steering": {"strength": "much"}}, "steering"),
        ({"steering": {"strength": []}}, "steering.strength"),
        ({"steering": {"layer": "3"}}, "steering.layer"),
        ({"strength": 3}, "strength"),
    ],
)
def test_the_field_at_fault_is_named(server, fields, param):
    question = {"messages": [{"role": "user", "content": "Hi"}]}
    status, _, body = server.ask("/v1/chat/completions", question | fields)
    assert status == 400 and body["error"]["param"] == param


@pytest.mark.parametrize(
    "lenient",
    [
        {
            "max_tokens": 12,
            "top_p": 0,
            "temperature": 1.5,
            "seed": 3,
        },  # llama.cpp, OpenAI: the likeliest
        {"max_tokens": 12, "response_format": {}},
        {"max_tokens": 12, "stop": ""},
        {"max_tokens": 12, "stop": ["", "no such text"]},
        {"max_tokens": -1, "max_completion_tokens": 12},
        {"max_tokens": 12, "max_completion_tokens": -1},
    ],
)
def test_values_that_other_servers_take_are_taken_as_they_take_them(server, lenient):
    assert text(server.chat(QUESTIONS[0], **lenient)) == text(
        server.chat(QUESTIONS[0], max_tokens=12)
    )


def test_no_limit_is_that_of_the_server(server):
    body = server.chat(QUESTIONS[0], max_tokens=-1, stop="")
    assert text(body) == text(server.chat(QUESTIONS[0])) and body["choices"][0]["finish_reason"]


def test_several_prompts_as_token_ids(server):
    tokenizer = server.service.vectors.model.tokenizer
    prompts = ["Sam has 3 apples", "Kim buys 5"]
    ids = [tokenizer.encode(one) for one in prompts]

    def texts(prompt):
        body = server.ask("/v1/completions", {"prompt": prompt, "max_tokens": 8})[2]
        return [one["text"] for one in body["choices"]], body["usage"]["prompt_tokens"]

    assert texts(ids) == texts(prompts)
    assert texts([ids[0]]) == texts(ids[0]) == texts(prompts[0])
    for wrong in ([[]], [ids[0], []], [ids[0], "x"], [[0.5]], [[[1]]], [[-1]], 9 * [ids[0]]):
        status, message = server.refusal({"prompt": wrong}, "/v1/completions")
        assert status == 400 and message.startswith("prompt"), (wrong, message)
    assert "too large" in server.refusal({"prompt": [[1], [10**6]]}, "/v1/completions")[1]


def test_what_is_left_out_of_a_message_is_named(server):
    history = [
        {"role": "user", "content": "Hi", "name": "ada"},
        {"role": "assistant", "content": "Hi.", "tool_calls": [], "refusal": None},
        {"role": "assistant", "content": "Hi.", "reasoning_content": "hm", "tool_calls": None},
        {"role": "user", "content": QUESTIONS[0], "name": "ada"},
    ]
    status, headers, _ = server.ask(
        "/v1/chat/completions", {"messages": history, "max_tokens": 1, "top_k": 3}
    )
    assert status == 200
    assert headers["X-DenseSteer-Ignored"] == "top_k, messages.name, messages.reasoning_content"


def test_a_wrong_method_is_told_the_right_one(server):
    status, headers, body = server.ask("/v1/chat/completions")
    assert status == 405 and "use POST" in body["error"]["message"] and headers["Allow"] == "POST"


def test_neutral_fields_are_accepted_and_unknown_ones_are_named(server):
    fields = {
        "user": "me", "tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"},
        "logit_bias": None, "top_k": 40, "mirostat": 1, "max_tokens": 2,
    }  # fmt: skip
    question = {"messages": [{"role": "user", "content": QUESTIONS[0]}]}
    status, headers, _ = server.ask("/v1/chat/completions", question | fields)
    assert status == 200
    assert headers["X-DenseSteer-Ignored"] == "top_k, mirostat"
    odd = question | {"": 1, " ": 2, "\n": 3, "\u00e4": 4, "max_tokens": 1}
    assert server.ask("/v1/chat/completions", odd)[1]["X-DenseSteer-Ignored"] == "?, ?, ?, ?"


@pytest.fixture
def decoding(monkeypatch):
    """An event that is set when a step has decoded tokens."""
    from mlx_densesteer.generation.batch import Batch

    step, decoded = Batch.step, threading.Event()

    def watched(self):
        pieces = step(self)
        if pieces:
            decoded.set()
        return pieces

    monkeypatch.setattr(Batch, "step", watched)
    return decoded


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, decoding, stream):
    connection = server.connect()
    body = {
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "stream": stream,
        "steering": {"strength": 40.0},
        "max_tokens": 900,
    }
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    assert decoding.wait(20)
    connection.sock.close()
    connection.close()
    server.settle()


def test_a_full_queue_says_when_to_come_again(monkeypatch):
    from mlx_densesteer.generation.batch import Batch

    step, running, go_on = Batch.step, threading.Event(), threading.Event()

    def held(self):
        if self.running:  # the batch of another server may be idle
            running.set()
            go_on.wait(20)
        return step(self)

    monkeypatch.setattr(Batch, "step", held)
    with serving(rows=1, queue=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.chat, QUESTIONS[0], max_tokens=2)
        assert running.wait(30)
        pairs = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
        status, headers, body = server.ask("/v1/chat/completions", pairs)
        assert status == 429 and int(headers["Retry-After"]) >= 1
        assert body["error"]["type"] == "rate_limit_error"
        assert server.refusal({"n": 3})[0] == 400  # never fits: no use in coming again
        second = pool.submit(server.chat, QUESTIONS[1], max_tokens=2)
        go_on.set()
        assert first.result()["choices"] and second.result()["choices"]
        body = server.chat(QUESTIONS[0], n=2, seed=1, temperature=0.7, max_tokens=2)
        assert len(body["choices"]) == 2  # more than rows: one after the other


def test_answers_that_run_are_ended_at_shutdown():
    with serving(grace=0.3) as server:
        connection = server.connect()
        body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "stream": True,
                "steering": {"strength": 40.0}, "max_tokens": 1000}  # fmt: skip
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})  # fmt: skip
        response = connection.getresponse()
        response.read(200)
        server.uvicorn.should_exit = True
        rest = response.read().decode()
        assert '"code":"shutting_down"' in rest and "[DONE]" not in rest


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError("a secret path"), 503), (RuntimeError("a secret path"), 500)]
)
def test_a_step_that_fails_is_told_and_does_not_end_the_server(server, monkeypatch, error, status):
    from mlx_densesteer.generation.batch import Batch

    step, failures = Batch.step, [error]

    def failing(self):
        if failures:
            raise failures.pop()
        return step(self)

    monkeypatch.setattr(Batch, "step", failing)
    found, message = server.refusal({})
    assert found == status and "secret" not in message
    assert server.chat(QUESTIONS[0], max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The demo in float16, where a strength can overflow that does not in float32."""
    import shutil

    import mlx.core as mx

    folder = tmp_path_factory.mktemp("half") / "half"
    shutil.copytree(demo.MODEL, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: array.astype(mx.float16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves, metadata={"format": "mlx"})
    with serving(folder) as running:
        yield running


def test_a_strength_that_overflows_harms_no_other_answer(half):
    with ThreadPoolExecutor(4) as pool:
        others = [
            pool.submit(half.chat, q, model="half@demo=3", max_tokens=60) for q in QUESTIONS[:3]
        ]
        for _ in range(5):
            status, message = half.refusal({"model": "half@demo=1e8"})
            assert status == 400 and "overflows the model's float16" in message
        assert all(other.result()["usage"]["completion_tokens"] for other in others)
    assert half.ask("/health")[2]["running"] == 0


@pytest.mark.parametrize(
    "place",
    [
        "steering.request Request steering",
        "server.worker additions",
        "server.prompt_cache PromptCache read",
        "server.prompt_cache PromptReading caches",
        "server.prompt_cache PromptCache keep",
        "generation.batch Batch add",
    ],
)
@pytest.mark.parametrize("question", ["Hi", "word " * 200])
def test_after_any_failure_all_clients_are_answered(server, monkeypatch, place, question):
    module, *path, name = place.split(" ")
    kind = reduce(getattr, path, import_module(f"mlx_densesteer.{module}"))
    server.chat(QUESTIONS[0], max_tokens=1)

    def failing(*args, **options):
        raise RuntimeError("a secret path")

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, failing)
        with ThreadPoolExecutor(3) as pool:
            asked = [{"model": "demo@demo=10%", "messages": [{"role": "user", "content": f"{question} {i}"}]}
                     for i in range(3)]  # fmt: skip
            found = list(pool.map(lambda body: server.ask("/v1/chat/completions", body), asked))
    # prompts that come together may be read without being kept
    expected = {200, 500} if place.endswith("keep") else {500}
    assert {status for status, _, _ in found} <= expected
    assert not any("secret" in str(body) for _, _, body in found)
    health = server.ask("/health")[2]
    assert health["running"] == health["waiting"] == 0
    assert server.chat(QUESTIONS[0], max_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_stream_that_is_never_read_is_cleaned_up():
    import asyncio
    from contextlib import ExitStack

    from mlx_densesteer.server.answers import EventStream

    async def lines():
        yield b""

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0)

    held, let_go = ExitStack(), []
    held.callback(let_go.append, True)
    asyncio.run(EventStream(lines(), held, {})({"type": "http"}, receive, send))
    assert let_go


def test_a_conversation_that_the_template_refuses(hf_folder):
    from mlx_densesteer.model.prompt import opening_tokens
    from mlx_densesteer.server.encoding import Encoder
    from mlx_densesteer.server.faults import Fault
    from mlx_densesteer.server.schema import ChatRequest

    model = load(hf_folder)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    model.tokenizer._tokenizer.chat_template = refuse + model.tokenizer.chat_template
    asked = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hi"}]
    with pytest.raises(Fault, match="refuses this conversation .no systems") as refused:
        Encoder(model)._encode(ChatRequest(messages=asked))
    assert (refused.value.status, refused.value.param) == (400, "messages")
    model.tokenizer._tokenizer.chat_template = "{% if %}"
    with pytest.raises(ModelError, match="chat template cannot be used"):
        opening_tokens(model.tokenizer)


@pytest.mark.parametrize("steering", [None, {"strength": "40%"}])
def test_a_prompt_is_echoed_with_its_log_probabilities(server, steering):
    """As lm-eval's local-completions asks for them: of lists of token ids, one token further."""
    model = server.service.vectors.model
    prompts = [model.tokenizer.encode(one) for one in (QUESTIONS[0], "Sam has 3 apples.")]
    asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "steering": steering}
    body = server.ask("/v1/completions", asked)[2]
    how = resolve(model, "demo", "40%" if steering else 0, (5,), "all")
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert choice["text"].startswith(decode(model.tokenizer, prompt))
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert len(found["tokens"]) == len(prompt) + 1 == len(found["text_offset"])
        [(_, total, greedy)] = log_likelihoods(
            model.network, [prompt[:1]], [prompt[1:]], steering=how
        )
        assert sum(found["token_logprobs"][1:-1]) == pytest.approx(total, abs=2e-3)
        pairs = zip(found["tokens"][1:-1], found["top_logprobs"][1:-1], strict=True)
        assert all(token == max(top, key=top.get) for token, top in pairs) == greedy
    plain = server.ask("/v1/completions", asked | {"echo": False})[2]
    for one, choice in zip(plain["choices"], body["choices"], strict=True):
        assert choice["text"].endswith(one["text"])
        assert choice["logprobs"]["tokens"][-1] == one["logprobs"]["tokens"][-1]
    assert body["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    text = server.ask("/v1/completions", asked | {"prompt": "Sam has", "logprobs": None})[2]
    assert text["choices"][0]["text"].startswith("Sam has") and not text["choices"][0]["logprobs"]


@pytest.mark.parametrize("positions", ["generated", "steps", "first:8"])
def test_a_prompt_is_not_scored_unsteered_under_the_name_of_a_steering(server, positions):
    asked = {"prompt": "Sam has 3 apples.", "echo": True, "logprobs": 1, "max_tokens": 1}
    steering = {"strength": "40%", "positions": positions}
    status, message = server.refusal(asked | {"steering": steering}, "/v1/completions")
    assert status == 400 and f"positions {positions} steer nothing of a prompt" in message
    for fields in ({"logprobs": None}, {"echo": False}, {"steering": {"strength": 0}}):
        assert server.ask("/v1/completions", asked | {"steering": steering} | fields)[0] == 200


def test_the_tokens_of_an_answer_that_a_stop_text_ended_join_to_its_text(server):
    usual = server.ask("/v1/completions", {"prompt": QUESTIONS[0], "max_tokens": 30})[2]
    whole = usual["choices"][0]["text"]
    for stop in (whole[5:7], whole[8:11], whole[12]):
        asked = {"prompt": QUESTIONS[0], "max_tokens": 30, "logprobs": 1, "stop": [stop]}
        choice = server.ask("/v1/completions", asked)[2]["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
