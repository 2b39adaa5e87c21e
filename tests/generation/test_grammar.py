"""Answers that match a JSON schema, and the calls of tools in them."""

import json

import mlx.core as mx
import pytest

pytest.importorskip("llguidance")

import calling
import jsonschema_rs
import thinking

import mlx_densesteer as ds
from mlx_densesteer.errors import InputError
from mlx_densesteer.generation import grammar as grammar_module
from mlx_densesteer.generation.answer import receipt
from mlx_densesteer.generation.batch import Batch
from mlx_densesteer.generation.brake import Brake
from mlx_densesteer.generation.grammar import ANY_OBJECT, Tool, check_schema, json_grammar
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.model.prompt import encode_prompt

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "who": {"type": "string", "maxLength": 8},
            "left": {"type": "integer", "minimum": 0, "maximum": 99},
            "sure": {"type": "boolean"},
        },
        "required": ["who", "left", "sure"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["a", "bc", 3, None]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"const": {"x": [1, '\u00e9\n"']}}]},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "n": {"enum": [1, 2]},
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    },
]
QUESTION = "Ben has 24 stones. Later Ben buys 21. How many stones does Ben have now?"


@pytest.mark.parametrize("schema", SCHEMAS, ids=["object", "array", "any", "tree"])
@pytest.mark.parametrize("strength", [0, "20%", "200%"])
def test_what_is_drawn_matches_steered_or_not(demo_model, schema, strength):
    """A model that never saw JSON; each answer is drawn alone, in a batch, and greedily with a draft."""
    steering = ds.resolve(demo_model, "demo", strength, (5,))
    made = json_grammar(demo_model, schema)
    alone = [
        ds.generate(
            demo_model, QUESTION, steering=steering, grammar=made, max_tokens=150,
            sampling=ds.Sampling(1.0, seed=seed) if seed else ds.Sampling(),
        )
        for seed in range(4)
    ]  # fmt: skip
    with Batch(demo_model) as batch:
        rows = [
            batch.add(
                encode_prompt(demo_model.tokenizer, QUESTION), steering=steering, max_tokens=150,
                grammar=made if seed != 9 else None, sampling=ds.Sampling(1.0, seed=seed) if seed else ds.Sampling(),
            )
            for seed in (*range(4), 9)
        ]  # fmt: skip
        found = {}
        while batch.running:
            found |= {piece.row: piece.result for piece in batch.step() if piece.result}
    for row, one in zip(rows, alone, strict=False):
        if one.finish_reason == "stop":
            jsonschema_rs.validate(schema, json.loads(one.text))
        assert found[row].token_ids == one.token_ids and found[row].text == one.text
    assert sum(one.finish_reason == "stop" for one in alone) >= 2
    drafted = ds.generate(
        demo_model, QUESTION, steering=steering, grammar=made, max_tokens=150, draft=Draft(demo_model, 3)
    )  # fmt: skip
    assert drafted.token_ids == alone[0].token_ids


def test_a_batch_of_prompts(demo_model):
    made = json_grammar(demo_model, SCHEMAS[1])
    for _, found in ds.generate_batch(demo_model, [QUESTION, "Sam has 3."], grammar=made):
        jsonschema_rs.validate(SCHEMAS[1], json.loads(found.text))


def test_json_is_on_one_line_and_any_object_is_an_object(demo_model):
    made = json_grammar(demo_model, SCHEMAS[0])
    text = ds.generate(demo_model, QUESTION, grammar=made, max_tokens=200).text
    assert text == json.dumps(json.loads(text), ensure_ascii=False)
    made = json_grammar(demo_model, ANY_OBJECT)
    assert ds.generate(demo_model, QUESTION, grammar=made, max_tokens=20).text.startswith("{")


def test_after_a_brake_the_rest_still_matches(demo_model):
    """The kept part is read again under less strength, and the grammar goes on from it."""
    schema = {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 60, "maxItems": 60}
    steering = ds.resolve(demo_model, "demo", "100%", (5,))
    found = ds.generate(
        demo_model, QUESTION, steering=steering, grammar=json_grammar(demo_model, schema), max_tokens=900,
        brake=Brake(limit=16),
    )  # fmt: skip
    assert found.brakes
    jsonschema_rs.validate(schema, json.loads(found.text))


def test_a_thought_is_free_and_the_answer_after_it_matches(tmp_path):
    for template in ("R1", "Qwen3"):
        model = ds.load(thinking.make_folder(tmp_path / template, template))
        made = json_grammar(model, {"enum": [51, 517]})
        found = ds.generate(model, "17 * 3?", grammar=made, think_limit=7, max_tokens=30)
        assert (found.thought_tokens, found.answer, found.finish_reason) == (7, "51", "stop")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return ds.load(calling.make_folder(tmp_path_factory.mktemp("calls") / "model"))


TOOLS = [Tool(one["function"]["name"], one["function"]["parameters"]) for one in calling.TOOLS]


def prompt_of(model):
    return model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tools=calling.TOOLS, add_generation_prompt=True
    )


def read_call(text):
    head, _, rest = text.partition("<tool_call>\n")
    inner, closed, after = rest.partition("\n</tool_call>")
    assert not head and closed
    call = json.loads(inner)
    schema = {tool.name: tool.parameters for tool in TOOLS}[call["name"]]
    jsonschema_rs.validate(schema, call["arguments"])
    return call, after


def test_a_call_matches_the_tools_and_text_is_free(calls):
    prompt = prompt_of(calls)
    made = json_grammar(calls, None, TOOLS)
    assert ds.generate(calls, prompt, grammar=made, max_tokens=20).text == "51"
    steering = ds.Steering(ds.SteeringVector.load(calling.vector_of(calls)), 2.0, (1,), calls=False)
    one = ds.generate(calls, prompt, steering=steering, grammar=made, max_tokens=60).text
    read_call(one.partition("</tool_call>")[0] + "</tool_call>")


def test_the_answer_can_be_made_to_begin_with_a_call(calls):
    prompt = prompt_of(calls)
    for tools in (TOOLS, TOOLS[:1]):
        made = json_grammar(calls, None, tools, call_first=True)
        for seed in range(4):
            sampling = ds.Sampling(1.0, seed=seed)
            text = ds.generate(calls, prompt, grammar=made, sampling=sampling, max_tokens=120).text
            call, _ = read_call(text[: text.index("</tool_call>") + 12])
            assert call["name"] in {tool.name for tool in tools}


def test_an_answer_in_json_or_a_call_before_it(calls):
    """With both, the first token decides; after a call there is another one, or the end."""
    prompt = prompt_of(calls)
    made = json_grammar(calls, {"enum": [51]}, TOOLS)
    assert ds.generate(calls, prompt, grammar=made, max_tokens=60).text == "51"
    vector = ds.SteeringVector.load(calling.vector_of(calls))
    steering = ds.Steering(vector, 2.0, (1,), "first:1")
    found = ds.generate(calls, prompt, steering=steering, grammar=made, max_tokens=100)
    _, after = read_call(found.text)
    assert after == "" and found.finish_reason == "stop"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": "object", "if": {}, "x-guidance": {"lenient": True}}, 'Unimplemented keys: \\["if"\\]'),
        ({"$ref": "http://example.com/x.json"}, "http://example.com/x.json"),
        ({"type": "string", "enum": []}, "Unsatisfiable"),
        ([], "expected a JSON Schema, which is an object"),
        (True, "expected a JSON Schema, which is an object"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_named(demo_model, schema, words):
    with pytest.raises(InputError, match=words):
        check_schema(schema)
    with pytest.raises(InputError, match=words):
        json_grammar(demo_model, schema)


def test_a_puzzle_of_patterns_ends_in_time(demo_model, calls, monkeypatch):
    monkeypatch.setattr(grammar_module, "SECONDS", 2)
    puzzle = {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(40)]}
    with pytest.raises(InputError, match="too intricate"):
        json_grammar(demo_model, puzzle)
    hard = {"properties": {"x": puzzle}}
    tools = [Tool("f", hard), *TOOLS]
    assert json_grammar(calls, None, tools)  # called with any object
    with pytest.raises(InputError, match="the tool f: is too"):
        json_grammar(calls, None, [Tool("f", hard, strict=True)])
    strict = [Tool(one.name, one.parameters, strict=True) for one in TOOLS]  # not to blame
    assert json_grammar(calls, None, [Tool("f", hard), *strict])


def test_schemas_are_checked_beyond_those_that_are_remembered(calls, monkeypatch, tmp_path):
    """Also in a folder with a module of that name, which is not imported."""
    monkeypatch.setattr(grammar_module, "KNOWN", 2)
    monkeypatch.setattr(grammar_module, "_known_faults", {})
    (tmp_path / "json.py").write_text("raise SystemExit('wrong module')")
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        tools = [
            Tool("old", {"const": 0}),
            Tool("new", {"const": number}),
            Tool("bad", {"type": 1}),
        ]
        assert json_grammar(calls, None, tools)
        assert len(grammar_module._known_faults) <= 2
    with pytest.raises(InputError, match="the tool bad"):
        json_grammar(calls, None, [Tool("bad", {"type": 1}, strict=True)])


@pytest.mark.parametrize("length", [30, 100, 917, 2480, 20000])
def test_a_long_chain_of_references_is_compiled_or_refused(demo_model, length):
    """It takes stack at each link: what passes the check has room for more than itself."""
    defs = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    schema = {"$defs": defs | {f"a{length}": {"enum": [7]}}, "$ref": "#/$defs/a0"}
    if length > 100:
        with pytest.raises(InputError, match="too intricate"):
            json_grammar(demo_model, schema)
        return
    found = ds.generate(demo_model, QUESTION, grammar=json_grammar(demo_model, schema))
    assert found.text == "7"


@pytest.mark.parametrize("text", ["<|im_end|>", "x<|im_start|>system", '<|im_end|>"\\\n'])
def test_the_text_of_control_tokens_is_text(demo_model, text):
    """In constants, keys and patterns; not one of the tokens is a control token."""
    key = {"type": "object", "properties": {text: {"const": 1}}, "required": [text], "additionalProperties": False}  # fmt: skip
    pattern = "^" + "".join(f"[{c}]" for c in text[:10]) + "$"
    schemas = [{"const": text}, key, {"enum": [text + "1", text + "2"]}]
    if text.isprintable():
        schemas.append({"type": "string", "pattern": pattern})
    for schema in schemas:
        made = json_grammar(demo_model, schema)
        found = ds.generate(demo_model, QUESTION, grammar=made, max_tokens=80)
        assert found.finish_reason == "stop"
        jsonschema_rs.validate(schema, json.loads(found.text))
        assert not set(found.token_ids) & set(demo_model.tokenizer.added_tokens_decoder)


def test_tools_of_a_model_whose_calls_are_no_json(demo_model):
    with pytest.raises(InputError, match="calls are no JSON"):
        json_grammar(demo_model, None, TOOLS)


def test_the_arguments_of_a_call_are_an_object(calls):
    made = json_grammar(
        calls, None, [Tool("f", {"properties": {"a": {"const": 1}}})], call_first=True
    )
    text = ds.generate(calls, prompt_of(calls), grammar=made, max_tokens=80).text
    assert '"arguments": {' in text


def test_a_grammar_that_cannot_go_on_ends_its_answer_and_no_other(demo_model, caplog):
    """A choice of 2,500 objects is more than llguidance follows."""
    schema = {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(2500)]}
    made, prompt = json_grammar(demo_model, schema), encode_prompt(demo_model.tokenizer, QUESTION)
    usual = ds.generate(demo_model, QUESTION, max_tokens=20)
    with Batch(demo_model) as batch:
        rows = [batch.add(prompt, grammar=one, max_tokens=20) for one in (made, None)]
        found = {}
        while batch.running:
            found |= {piece.row: piece.result for piece in batch.step() if piece.result}
    assert found[rows[1]].text == usual.text
    given_up = [found[rows[0]], ds.generate(demo_model, QUESTION, grammar=made, max_tokens=20)]
    for one in given_up:
        assert (one.text, one.finish_reason, one.gave_up) == ("{", "length", True)
        assert "too intricate" in receipt(one, demo_model.context)
    assert not usual.gave_up
    assert "cannot go on" in caplog.text


def test_every_mask_leaves_a_token(demo_model):
    """A mask without any would make all logits equal."""
    made = json_grammar(demo_model, SCHEMAS[0])
    step = made.processor([], opened=False, skip=0)
    logits = mx.zeros((1, demo_model.vocabulary))
    written = mx.array([], mx.int32)
    for _ in range(40):
        left = step(written, logits)
        assert int(mx.isfinite(left).sum()) > 0
        token = mx.argmax(left, axis=-1).astype(mx.int32)
        if int(token) in demo_model.tokenizer.eos_token_ids:
            break
        written = mx.concatenate([written, token])
