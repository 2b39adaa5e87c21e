"""lm-eval's own command and tasks run steered. Needs the extra `lm-eval`; no network."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_densesteer as ds
from mlx_densesteer.errors import (
    InputError,
    ModelError,
    SteeringError,
    VectorFormatError,
    VectorMismatchError,
)
from mlx_densesteer.model.block import make_cache
from mlx_densesteer.model.prompt import encode_prompt
from mlx_densesteer.steering import request

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mlx_densesteer.evaluation.harness import DenseSteerLM, main, register

QUESTIONS = ["2 + 2?", "Tom has 3 apples and eats one.", "hello", "a", "Why is the sky blue?"]
CHOICES = [" red", " blue", " green as grass"]
LETTERS = [f" {letter}" for letter in "abcdefgh"]  # of one length, so that no choice always wins
MAX_TOKENS, STOPS = 8, ["\0never", "e"]


@pytest.fixture(scope="module")
def folder(hf_folder, tmp_path_factory):
    """The tiny model in float32: batches and single sequences then agree token for token."""
    return ds.convert(hf_folder, tmp_path_factory.mktemp("f32") / "f32", bits=None, dtype="float32")


@pytest.fixture(scope="module")
def plain(folder):
    return DenseSteerLM(pretrained=str(folder), batch_size=4)


@pytest.fixture
def vector(make_vector, tmp_path):
    return make_vector(size=3.0).save(tmp_path / "dense.npz")


@pytest.fixture
def steered(folder, vector):
    """Return a function that makes a steered model with more ``model_args``."""

    def make(**more):
        return DenseSteerLM(**{"pretrained": str(folder), "vector": str(vector), "layer": 1} | more)

    return make


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def pairs():
    return [(question, choice) for question in QUESTIONS for choice in CHOICES]


def naive(lm, context, continuation):
    """Likelihood of the text after the context: one sequence, all of its logits."""
    tokens = lm.tokenizer.encode(context + continuation)
    length = len(lm.tokenizer.encode(context))
    cache = make_cache(lm.model, lm.steering, prompt=range(length))
    logits = lm.model.network(mx.array([tokens]), cache=cache)[0, length - 1 : -1]
    logp = nn.log_softmax(logits, axis=-1)
    greedy = mx.argmax(logits, axis=-1).tolist() == tokens[length:]
    return sum(logp[t, token].item() for t, token in enumerate(tokens[length:])), greedy


def cut(text):
    return text.split(STOPS[1])[0]


def likelihoods(lm, arguments):
    return lm.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)


def responses(lm, contexts, **options):
    options = {"until": STOPS, "max_gen_toks": MAX_TOKENS} | options
    requests = instances("generate_until", [(context, options) for context in contexts])
    return lm.generate_until(requests, disable_tqdm=True)


def test_likelihoods_are_those_of_mlx_lms_own_class_and_of_the_sum_by_hand(folder, plain):
    from mlx_lm.evaluate import MLXLM

    found = likelihoods(plain, pairs())
    stock = MLXLM(str(folder), batch_size=4)
    expected = stock.loglikelihood(instances("loglikelihood", pairs()))
    by_hand = [naive(plain, *pair) for pair in pairs()]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=2e-5)
    assert [s for s, _ in found] == pytest.approx([s for s, _ in by_hand], abs=2e-5)
    assert [g for _, g in found] == [g for _, g in expected] == [g for _, g in by_hand]


def test_responses_are_those_of_mlx_lms_own_class(folder, plain):
    from mlx_lm.evaluate import MLXLM

    options = {"until": STOPS, "max_gen_toks": MAX_TOKENS, "do_sample": False, "temperature": 0}
    stock = MLXLM(str(folder), batch_size=4)
    expected = stock.generate_until(
        instances("generate_until", [(context, options) for context in QUESTIONS])
    )
    assert responses(plain, QUESTIONS, do_sample=False, temperature=0) == expected
    assert any(expected)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_steered_likelihoods(plain, steered, positions):
    lm = steered(positions=positions, strength=2)
    found = likelihoods(lm, pairs())
    by_hand = [naive(lm, *pair) for pair in pairs()]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in by_hand], abs=2e-5)
    unsteered = likelihoods(plain, pairs())
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, unsteered, strict=True)) > 0.1


def test_a_random_direction_takes_the_vectors_place(steered):
    theirs, drawn, other = (
        steered(**more).steering for more in ({}, {"random": 0}, {"random": "1"})
    )
    assert drawn.layers == theirs.layers and drawn.strength == theirs.strength
    assert drawn.vector.norms() == pytest.approx(theirs.vector.norms(), rel=1e-6)
    assert len({one.fingerprint for one in (theirs, drawn, other)}) == 3


def test_positions_that_the_tokenizer_cannot_tell_are_refused_at_once(steered):
    with pytest.raises(ModelError, match="writes a blank line as several tokens"):
        steered(positions="steps")


def test_what_the_model_writes_is_greedy(steered):
    lm = steered(positions="generated")
    (text,) = responses(lm, ["hello"], until=[])
    assert text
    texts = [("hello", text), ("hello", text + "x"), ("hello", "x" + text)]
    # a random model writes half characters, which do not survive the way through text
    if lm.tok_encode("hello" + text)[5:] == list(
        ds.generate(lm.model, lm.tok_encode("hello"), steering=lm.steering,
                    max_tokens=MAX_TOKENS).token_ids
    ):  # fmt: skip
        assert [g for _, g in likelihoods(lm, texts)] == [True, False, False]
    else:
        assert not any(g for _, g in likelihoods(lm, texts[1:]))


def test_strength_zero_is_no_steering(plain, steered):
    zero = steered(strength=0)
    zero.rows = plain.rows
    assert likelihoods(zero, pairs()) == likelihoods(plain, pairs())
    assert responses(zero, QUESTIONS) == responses(plain, QUESTIONS)
    rolling = instances("loglikelihood_rolling", [("the sky is blue",)])
    assert zero.loglikelihood_rolling(rolling) == plain.loglikelihood_rolling(rolling)


def test_responses_are_those_of_generate(plain, steered):
    lm = steered(positions="generated", batch_size=3)
    expected = [
        cut(ds.generate(lm.model, lm.tok_encode(question), steering=lm.steering,
                        max_tokens=MAX_TOKENS).text)
        for question in QUESTIONS
    ]  # fmt: skip
    assert responses(lm, QUESTIONS) == expected != responses(plain, QUESTIONS)


def test_requests_of_different_kinds_keep_their_order(plain):
    options = [{"until": [], "max_gen_toks": 2 + i % 2, "temperature": i % 2} for i in range(6)]
    arguments = [(QUESTIONS[i % 3], options[i]) for i in range(6)]
    together = plain.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    for i in (0, 2, 4):
        alone = plain.generate_until(instances("generate_until", [arguments[i]]), True)
        assert together[i] == alone[0]


def test_sampling_repeats_with_the_seed(folder):
    def sample(seed):
        lm = DenseSteerLM(pretrained=str(folder), seed=seed)
        return responses(lm, QUESTIONS, do_sample=True, temperature=1.0, top_p=0.9)

    assert sample(1) == sample(1) != sample(2)


def test_rolling_reads_a_long_text_in_windows(folder, steered):
    text = "the sky is blue and the grass is green"
    lm = steered(strength=2, max_length=7)
    tokens = lm.tok_encode(text)
    expected, read = 0.0, lm.prefix_token_id
    for start in range(0, len(tokens), 7):
        window = tokens[start : start + 7]
        begin = max(0, start + len(window) - 8)  # the last window takes all the context there is
        seen = [lm.prefix_token_id, *tokens] if not start else tokens
        context = [read] if not start else seen[begin:start]
        cache = make_cache(lm.model, lm.steering, prompt=context)
        logits = lm.model.network(mx.array([[*context, *window]]), cache=cache)[
            0, len(context) - 1 : -1
        ]
        logp = nn.log_softmax(logits, axis=-1)
        expected += sum(logp[t, token].item() for t, token in enumerate(window))
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning(folder, caplog):
    lm = DenseSteerLM(pretrained=str(folder), max_length=12)
    long = "x" * 30 + "hello"
    assert likelihoods(lm, [(long, " red")]) == likelihoods(lm, [("xxxxhello", " red")])
    assert "loses its first" in caplog.text
    assert responses(lm, [long]) == responses(lm, [long[-4:]])
    with pytest.raises(InputError, match="13 tokens, but max_length is 12"):
        likelihoods(lm, [("a", "x" * 13)])
    with pytest.raises(InputError, match="leaves no room"):
        responses(lm, ["a"], max_gen_toks=12)


def test_an_empty_context_is_the_end_of_text_token(plain):
    (found,) = likelihoods(plain, [("", "red")])
    eos = plain.tokenizer.eos_token
    assert found == pytest.approx(naive(plain, eos, "red"), abs=2e-5)
    assert likelihoods(plain, [(" ", "red")])[0][0] == pytest.approx(
        naive(plain, eos, " red")[0], abs=2e-5
    )
    assert responses(plain, [""]) == responses(plain, [eos])


def test_chat_template(plain):
    messages = [{"role": "user", "content": "Hi"}]
    text = plain.apply_chat_template(messages)
    assert plain.tok_encode(text) == encode_prompt(plain.tokenizer, "Hi")
    assert plain.chat_template(True) == plain.tokenizer.chat_template
    begun = [*messages, {"role": "assistant", "content": "The"}]
    assert plain.apply_chat_template(begun, add_generation_prompt=False).endswith("The")
    assert plain.tokenizer_name and "/" not in plain.tokenizer_name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": None}, "no model: expected"),
        ({"vector": None}, "model_args layer: need a vector"),
        ({"vector": None, "layer": None, "strength": 2.0, "positions": "all"}, "strength, positio"),
        ({"strength": "strong"}, "strength 'strong': expected a number"),
        ({"strength": float("nan")}, "strength 'nan'"),
        ({"vector": None, "layer": None, "random": 1}, "model_args random: need a vector"),
        ({"random": "x"}, "baseline random:x: expected"),
        ({"lambda": 2, "dtype": "float32"}, "model_args dtype, lambda: unknown"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"max_length": "long"}, "max_length 'long'"),
    ],
)
def test_arguments_that_cannot_be_used(steered, options, message):
    with pytest.raises(InputError, match=message):
        steered(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 9}, VectorMismatchError, "no vector for layer 9; it holds 0-3"),
        ({"vector": "missing.npz"}, VectorFormatError, "missing.npz: no such file"),
        ({"layer": "x"}, SteeringError, "layer 'x'"),
        ({"positions": "some"}, SteeringError, "positions 'some'"),
    ],
)
def test_steerings_that_cannot_be_applied(steered, options, error, message):
    with pytest.raises(error, match=message):
        steered(**options)


def test_a_vector_of_another_model(steered, make_vector, tmp_path):
    other = make_vector(hidden=32).save(tmp_path / "other.npz")
    with pytest.raises(VectorMismatchError, match="width 32"):
        steered(vector=str(other))


def test_ways_to_name_layers(steered, vector, make_vector, tmp_path):
    for layer, expected in [([0, 2], (0, 2)), ("1-3", (1, 2, 3)), ("all", (0, 1, 2, 3)), (3, (3,))]:
        assert steered(layer=layer).steering.layers == expected
    single = make_vector(layers=[2]).save(tmp_path / "single.npz")
    assert steered(vector=str(single), layer=None).steering.layers == (2,)


def test_what_a_sweep_recommended_is_the_default(steered, make_vector, tmp_path):
    vector = make_vector()
    best = {"layers": [2], "strength": -0.5, "positions": "prompt"}
    vector = ds.SteeringVector(vector.layers, replace(vector.meta, recommended=best))
    path = str(vector.save(tmp_path / "best.npz"))

    def setting(**options):
        made = steered(vector=path, **{"layer": None} | options).steering
        return made.layers, made.strength, made.positions

    assert setting() == ((2,), -0.5, "prompt")
    assert setting(layer=2, positions="all") == ((2,), -0.5, "all")
    assert setting(strength=3) == ((2,), 3.0, "prompt")


def test_doses_and_defaults_are_those_of_every_door(steered, vector):
    lm = steered(layer=None, strength=None)
    asked = request.resolve(lm.model, vector)
    assert lm.steering.fingerprint == asked.fingerprint and lm.steering.layers == (2,)
    assert lm.get_model_info()["steering"]["dose"] == pytest.approx(request.DEFAULT_DOSE)
    lm = steered(layer="1-2", strength="-30%")
    assert lm.steering.strength < 0
    assert lm.get_model_info()["steering"]["dose"] == pytest.approx(0.3)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"temperature": 1.0, "top_k": 5}])
def test_generation_that_is_not_supported(plain, options):
    with pytest.raises(InputError, match="not supported"):
        responses(plain, ["hello"], **options)


def test_lm_evals_cache_is_refused(plain):
    from lm_eval.api.model import CacheHook

    with pytest.raises(InputError, match="another steering"):
        plain.set_cache_hook(CacheHook(None))


def test_registered_beside_lm_evals_own_models():
    from lm_eval.api.registry import get_model, model_registry

    register()
    register()
    assert get_model("densesteer") is DenseSteerLM
    assert "hf" in model_registry and "local-completions" in model_registry


def test_the_entry_point_that_newer_versions_of_lm_eval_look_for():
    """As they do it: a placeholder in the registry, loaded when the model is asked for."""
    from importlib.metadata import EntryPoint

    from lm_eval.api.registry import Registry

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    group, line = '[project.entry-points."lm_eval.models"]', r'\n(\S+) = "(\S+)"\n'
    name, value = re.search(re.escape(group) + line, project).groups()
    registry = Registry("model")
    registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert registry.get("densesteer") is DenseSteerLM


# The real command, with real tasks, on local files

# As `python -m mlx_densesteer.evaluation.harness`, without lm-eval's own tasks: listing them takes 10 s.
COMMAND = """
import runpy
from lm_eval.tasks import TaskManager
init = TaskManager.__init__
TaskManager.__init__ = lambda *a, **options: init(*a, **options | {"include_defaults": False})
runpy.run_module("mlx_densesteer.evaluation.harness", run_name="__main__", alter_sys=True)
"""


def write_tasks(path, documents):
    """Two tasks for each of ``plain`` and ``steered``: whose answers are the right ones."""
    (path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents), "utf-8")
    for whose in ("plain", "steered"):
        common = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / "data.jsonl")}},
            "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 1},
        }  # fmt: skip
        written = common | {
            "task": f"written_{whose}", "output_type": "generate_until",
            "doc_to_target": f"{{{{written_{whose}}}}}",
            "generation_kwargs": {"until": STOPS, "max_gen_toks": MAX_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean",
                             "higher_is_better": True}],
        }  # fmt: skip
        chosen = common | {
            "task": f"chosen_{whose}", "output_type": "multiple_choice",
            "doc_to_choice": LETTERS, "doc_to_target": f"chosen_{whose}", "target_delimiter": "",
        }  # fmt: skip
        for task in (written, chosen):
            (path / f"{task['task']}.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML


def answers(lm):
    """What the model writes and chooses, by our own ``generate`` and by hand."""
    for question in QUESTIONS:
        prompt = encode_prompt(lm.tokenizer, question)
        response = ds.generate(lm.model, prompt, steering=lm.steering, max_tokens=MAX_TOKENS)
        context = lm.tokenizer.decode(prompt)
        scores = [naive(lm, context, choice)[0] for choice in LETTERS]
        yield cut(response.text), scores.index(max(scores))


@pytest.mark.slow
def test_tasks_run_steered_from_the_command_and_from_python(
    folder, vector, steered, plain, tmp_path, monkeypatch
):
    lm = steered(positions="generated", strength=2)
    documents = [
        {"question": question, "written_plain": w, "chosen_plain": c, "written_steered": ws,
         "chosen_steered": cs}
        for question, (w, c), (ws, cs) in zip(QUESTIONS, answers(plain), answers(lm), strict=True)
    ]  # fmt: skip
    write_tasks(tmp_path, documents)
    tasks = ["written_plain", "written_steered", "chosen_plain", "chosen_steered"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "run", "--model", "densesteer",
         "--model_args", f"pretrained={folder},vector={vector},strength=2,layer=1,positions=generated",
         "--tasks", ",".join(tasks), "--include_path", str(tmp_path), "--batch_size", "4",
         "--apply_chat_template", "--output_path", "results.json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("results_*.json")
    document = json.loads(file.read_text("utf-8"))
    assert document["config"]["steering"]["strength"] == 2

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf/datasets"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    unsteered = lm_eval.simple_evaluate(
        plain, tasks=tasks, task_manager=manager, apply_chat_template=True
    )

    def found(results):
        return [
            results[task]["exact_match,none" if "written" in task else "acc,none"] for task in tasks
        ]

    same = {
        key: sum(d[f"{key}_plain"] == d[f"{key}_steered"] for d in documents) / len(documents)
        for key in ("written", "chosen")
    }
    assert found(unsteered["results"]) == [1.0, same["written"], 1.0, same["chosen"]]
    assert found(document["results"]) == [same["written"], 1.0, same["chosen"], 1.0]
    assert max(same.values()) < 1  # the steering changed answers of both kinds


def test_the_command_says_what_is_wrong(folder, monkeypatch):
    wrong = {"pretrained": str(folder), "strength": "20%"}
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: DenseSteerLM(**wrong))
    with pytest.raises(SystemExit) as refused:
        main()
    assert str(refused.value) == "densesteer: model_args strength: need a vector; add vector=FILE."
