"""The clients that people have, as they are: openai, llm, curl."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("starlette")

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
