"""The clients that people have, as they are: openai, llm, curl."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("starlette")

from calling import TOOLS, calling_server
from serving import serving

from mlx_densesteer.demo.problems import held_out

pytestmark = pytest.mark.slow

QUESTION = held_out(1)[0].question
KEY = "a-key-of-many-letters"


@pytest.fixture(scope="module")
def expected(server):
    """The text at two settings, as the server gives it to the simplest client."""
    return {
        model: server.chat(QUESTION, model=model)["choices"][0]["message"]["content"]
        for model in ("demo", "demo@demo=20%")
    }


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_openai_steers_by_the_models_name(client, expected):
    messages = [{"role": "user", "content": QUESTION}]
    for model, text in expected.items():
        answer = client.chat.completions.create(model=model, messages=messages)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == model
    assert expected["demo"] != expected["demo@demo=20%"]


def test_openai_steers_by_the_field_and_reads_the_receipt(client, expected):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}],
        extra_body={"steering": {"strength": "20%"}},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected["demo@demo=20%"]
    assert answer.steering["vector"] == "demo" and answer.steering["layers"] == [5]
    details = answer.usage.completion_tokens_details
    assert details.steps == 1 and details.density == answer.usage.completion_tokens


def test_openai_streams(client, expected):
    stream = client.chat.completions.create(
        model="demo@demo=20%", messages=[{"role": "user", "content": QUESTION}], stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected["demo@demo=20%"]
    assert chunks[-1].usage.completion_tokens > 10


def test_openai_reads_logprobs_choices_and_seeds(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], n=2, temperature=1.0, seed=3,
        max_tokens=5, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_openai_completions_and_models(client):
    plain = client.completions.create(
        model="demo@demo=2", prompt="Sam has", max_tokens=4, logprobs=1
    )
    assert len(plain.choices[0].logprobs.tokens) == 4
    listed = [model.id for model in client.models.list()]
    assert listed[0] == "demo" and "demo@demo=20%" in listed
    assert client.models.retrieve("demo@demo=0.3").id == "demo@demo=0.3"


def test_openai_understands_the_errors(client):
    import openai

    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.NotFoundError, match="demo only"):
        client.chat.completions.create(model="gpt-4o", messages=messages)
    with pytest.raises(openai.BadRequestError, match="this server has demo") as refused:
        client.chat.completions.create(model="demo@other=1", messages=messages)
    assert refused.value.code == "vector_not_found"
    with pytest.raises(openai.BadRequestError, match="modalities"):
        client.chat.completions.create(model="demo", messages=messages, modalities=["audio"])


def test_openai_with_an_api_key():
    openai = pytest.importorskip("openai")
    from mlx_densesteer.server.settings import Access

    with serving(access=Access(key=KEY.encode())) as locked:
        base = f"{locked.url}/v1"
        with openai.OpenAI(base_url=base, api_key=KEY) as client:
            assert client.models.list().data
        other = openai.OpenAI(base_url=base, api_key="other")
        with other, pytest.raises(openai.AuthenticationError):
            other.models.list()


def test_llm(server, expected, tmp_path):
    pytest.importorskip("llm")
    models = [
        f"- model_id: steered\n  model_name: demo@demo=20%\n  api_base: {server.url}/v1\n",
        f"- model_id: stock\n  model_name: demo\n  api_base: {server.url}/v1\n",
    ]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(models))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "unused"}
    for name, model in (("steered", "demo@demo=20%"), ("stock", "demo")):
        for how in ([], ["--no-stream"]):
            done = subprocess.run(
                [sys.executable, "-m", "llm", "-m", name, *how, QUESTION], env=environment,
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() == expected[model].strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server, expected):
    body = json.dumps(
        {"model": "demo@demo=20%", "messages": [{"role": "user", "content": QUESTION}]}
    )
    command = ["curl", "--fail-with-body", "-sS", f"{server.url}/v1/chat/completions"]
    done = subprocess.run(
        [*command, "--json", body], capture_output=True, text=True, check=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == expected["demo@demo=20%"]
    done = subprocess.run([*command, "-d", body], capture_output=True, text=True, timeout=60)
    assert done.returncode == 22 and "Content-Type: application/json" in done.stdout


def test_lm_eval_runs_tasks_against_the_server(server, tmp_path):
    """A task of choices, scored by the log-probabilities of echoed prompts, and one of answers."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")
    pytest.importorskip("tenacity", reason="lm-eval asks servers with tenacity")
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from mlx_densesteer import demo
    from mlx_densesteer.evaluation.harness import DenseSteerLM

    rows = [
        {"text": f"{problem.question} ", "choices": ["1", "7 boxes of 3: 7*3=21.", str(problem.answer)]}
        for problem in held_out(4)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\ndoc_to_choice: '{{{{choices}}}}'\n"
        "doc_to_target: 1\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "say.yaml").write_text(
        f"task: say\n{data}output_type: generate_until\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: '{{{{choices[2]}}}}'\n"
        "generation_kwargs:\n  until: ['####']\n  max_gen_toks: 24\nmetric_list:\n  - metric: exact_match\n"
    )

    def samples(model, task, **options):
        found = lm_eval.simple_evaluate(
            model=model, tasks=[task], bootstrap_iters=0, **options,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
        return [one["resps"] for one in found["samples"][task]]

    asked = {
        "model": "demo@demo=20%",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(demo.MODEL),
    }
    own = DenseSteerLM(pretrained="demo", vector="demo", strength="20%", layer=5)
    served = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", **asked)
    for doc, other in zip(samples(served, "choose"), samples(own, "choose"), strict=True):
        for (one,), (two,) in zip(doc, other, strict=True):
            assert one[0] == pytest.approx(two[0], abs=1e-2) and one[1] == two[1]
    chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model="demo@demo=20%")
    said = samples(chat, "say", apply_chat_template=True)
    assert said == samples(own, "say", apply_chat_template=True)


ZED = {
    "model": "calls", "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 80,
    "temperature": 0.0, "tool_choice": "auto", "parallel_tool_calls": False, "prompt_cache_key": "thread-1",
    "tools": [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": TOOLS[0]["function"]["parameters"]}}
    ],
    "messages": [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1, \"b\": 2}"}}]},
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "hm"},
        {"role": "user", "content": "and?"},
    ],
}  # fmt: skip
# Empty content is one blank; undefined fields are left out.
CONTINUE = {
    "model": "calls", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 80, "temperature": 0.0,
    "tools": [{"type": "function", "function": {**tool["function"], "strict": False}} for tool in TOOLS],
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": " ", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}]},
        {"role": "tool", "content": "12:00", "tool_call_id": "call_1"},
    ],
}  # fmt: skip
OPEN_WEBUI = {
    "model": "calls", "stream": True, "stream_options": {"include_usage": True},
    "messages": [{"role": "user", "content": "x"}],
}  # fmt: skip


@pytest.mark.parametrize("body", [ZED, CONTINUE, OPEN_WEBUI], ids=["Zed", "Continue", "Open WebUI"])
def test_requests_of_apps_as_their_sources_build_them(tmp_path_factory, body):
    """Their fields and messages; the answer is streamed, and ends with the usage."""
    with calling_server(tmp_path_factory.mktemp("apps")) as server:
        messages = body["messages"]
        events = server.stream(None, **body)
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == "51"
        usage = events[-1]["usage"]
        assert usage["completion_tokens"] == 2 and usage["prompt_tokens"] > 4 * len(messages)
        listed = server.ask("/v1/models")[2]["data"]
        assert listed[0]["id"] == "calls" and listed[0]["object"] == "model"


def test_an_agent_with_two_tools(tmp_path_factory):
    """The loop that agents run, with openai: call, answer the call, ask again, until there is text."""
    openai = pytest.importorskip("openai")
    done = {"add": lambda a, b: a + b, "now": lambda: "12:00"}
    with (
        calling_server(tmp_path_factory.mktemp("agent")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        messages, called = [{"role": "user", "content": "x"}], []
        for choice in (
            *({"type": "function", "function": {"name": name}} for name in done),
            "auto",
        ):
            answer = client.chat.completions.create(
                model="calls", messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=80,
                parallel_tool_calls=False,
            )  # fmt: skip
            message, reason = answer.choices[0].message, answer.choices[0].finish_reason
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or ():
                assert reason == "tool_calls"
                called.append(call.function.name)
                result = done[call.function.name](**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        assert called == ["add", "now"] and (message.content, reason) == ("51", "stop")


def test_openai_parses_an_answer_into_a_class(client):
    """Its helper sends a strict schema, and reads the answer."""
    from typing import Literal

    from pydantic import BaseModel

    class Stones(BaseModel):
        left: Literal[1, 23]
        sure: bool

    answer = client.chat.completions.parse(
        model="demo@demo=20%", messages=[{"role": "user", "content": QUESTION}], response_format=Stones,
    )  # fmt: skip
    assert answer.choices[0].message.parsed.left in (1, 23)
    with client.chat.completions.stream(
        model="demo", messages=[{"role": "user", "content": QUESTION}], response_format=Stones
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Stones)


def test_pages_of_other_servers_are_named(server):
    for path, words in (
        ("embeddings", "no embeddings"), ("responses", "use /v1/chat/completions"), ("x", "no such page"),
    ):  # fmt: skip
        status, _, body = server.ask(f"/v1/{path}", {"input": "x"})
        assert status == 404 and words in body["error"]["message"]


@pytest.mark.checkpoint
def test_a_real_model_calls_tools_steered_or_not(checkpoint):
    """The 0.5B, under a vector of noise at a dose that garbles its text: what it calls can be read."""
    import numpy as np

    from mlx_densesteer import SteeringVector, VectorMeta
    from mlx_densesteer.server.vectors import NamedVector
    from mlx_densesteer.steering.request import Amount

    tools = [
        {"type": "function", "function": {"name": "multiply", "description": "Multiply two numbers.", "parameters": {
            "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}}},
        {"type": "function", "function": {"name": "get_weather", "description": "Get the weather of a city.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    ]  # fmt: skip
    noise = np.random.default_rng(0).normal(size=896).astype(np.float32)
    vector = SteeringVector({12: noise}, VectorMeta("noise", 896, 24), name="noise")
    with serving(checkpoint, [NamedVector(vector, Amount.parse("40%"), (12,))]) as server:
        asked = {"tools": tools, "max_tokens": 60, "parallel_tool_calls": False}
        usual = server.chat("What is 347 * 29?", **asked)["choices"][0]
        [call] = usual["message"]["tool_calls"]  # the model leaves the marks out
        assert usual["finish_reason"] == "tool_calls" and call["function"]["name"] == "multiply"
        steered = {"steering": {}, "tool_choice": "required"}
        choice = server.chat("What is the weather in Rome?", **steered, **asked)["choices"][0]
        [call] = choice["message"]["tool_calls"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


LITELLM = """
import json, sys
import litellm

url, tools = sys.argv[1], json.loads(sys.argv[2])
asked = {"model": "openai/calls", "api_base": url, "api_key": "unused", "max_tokens": 80, "messages": [{"role": "user", "content": "x"}]}
calling = asked | {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
whole = litellm.completion(**calling).choices[0].message
streamed = litellm.stream_chunk_builder([*litellm.completion(**calling, stream=True)]).choices[0].message
form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [51]}, "strict": True}}
told = [[call.function.name for call in one.tool_calls] for one in (whole, streamed)]
told += [litellm.completion(**asked | more).choices[0].message.content for more in ({}, {"response_format": form})]
print(json.dumps(told))
"""


def test_litellm(tmp_path_factory):
    """Calls whole and streamed, text, JSON; in a process of its own, as it changes much that is global."""
    pytest.importorskip("litellm", reason="litellm is not installed")
    with calling_server(tmp_path_factory.mktemp("litellm")) as server:
        done = subprocess.run(
            [sys.executable, "-c", LITELLM, f"{server.url}/v1", json.dumps(TOOLS)], capture_output=True, text=True,
            timeout=120, env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, streamed, text, answer = json.loads(done.stdout.splitlines()[-1])
    assert whole == streamed and len(whole) == 1
    assert (text, answer) == ("51", "51")
