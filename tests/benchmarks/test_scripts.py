"""The benchmarks outside the wheel, on the demo model with the smallest sizes, each by itself.

Nothing here looks at how fast anything is.
"""

import json
import math
import random
import runpy
import subprocess
import sys
from dataclasses import replace

import calibrate
import mlx.core as mx
import numpy as np
import pytest
import resteer
import script
import speculative
import startup
import sweep
import texts
import train
import turns
from helpers import ROOT

from mlx_densesteer import generate, load, make_cache, resolve
from mlx_densesteer.bench.figures import Measurement
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.generation.sampling import GREEDY
from mlx_densesteer.generation.speculation import Draft
from mlx_densesteer.model.model import Model
from mlx_densesteer.model.prompt import encode_prompt

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "main(run)" in path.read_text("utf-8")
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.load("demo")


def figures_of(made: Measurement) -> tuple[dict, dict]:
    """Return the figures by key, and the lines of the table by name."""
    document = json.loads(json.dumps(made.document(), allow_nan=False))
    table = {row["name"]: row for row in document.pop("details")["table"]}
    for key, value in document.items():
        assert isinstance(value, bool) or math.isfinite(value), key
        assert value >= 0 or key == "resteer_excess"
    return document, table


def test_resteering_gives_the_bits_of_a_full_prefill(subject):
    made = resteer.run(subject, prefix_tokens=24, rounds=1)
    figures, _ = figures_of(made)
    assert set(figures) == {"resteer_ratio", "resteer_excess", "resteer_identical"}
    depths = made.details["depths"]
    assert figures["resteer_identical"] is True
    assert [one["layer"] for one in depths] == [1, 3, 4]
    for one in depths:
        assert one["identical"] is True
        assert one["share_of_block_tokens"] == pytest.approx(one["expected"])
    assert figures["resteer_ratio"] == depths[1]["ratio"]["median"] > 0
    assert figures["resteer_excess"] == max(one["excess"] for one in depths)


def test_a_draft_changes_no_token(subject):
    figures, table = figures_of(speculative.run(subject, questions=1, tokens=6, rounds=1))
    assert figures["speculative_equal"] is True and figures["speculative_ratio"] > 0
    accepted, proposed = map(
        int, table["drafted tokens accepted"]["remark"].split(";")[0].split(" of ")
    )
    assert figures["speculative_acceptance"] == accepted / proposed <= 1


@pytest.mark.parametrize("blocks", [2, 5])
def test_passes_worked_out_are_those_that_a_draft_takes(subject, blocks):
    """Of greedy answers exactly; of drawn ones it is a mean."""
    model = subject.model
    small = Model(speculative.truncated(model.network, blocks), model.tokenizer)
    for problem in held_out(2):
        prompt = encode_prompt(model.tokenizer, problem.question)
        for drafted in (1, 3):
            helper = Draft(small, drafted)
            for tokens, reason in ((30, "length"), (300, "stop")):
                one = generate(model, prompt, max_tokens=tokens, draft=helper)
                assert one.finish_reason == reason
                answer = speculative.whole(model, prompt, one)
                known = speculative.chances(helper, model.vocabulary, prompt, answer, GREEDY)
                assert speculative.passes(known, drafted) == one.draft_proposed / drafted
    half = np.full(30, 0.5)
    rng = random.Random(0)
    drawn = [speculative.passes([float(rng.random() < 0.5) for _ in half], 2) for _ in range(3000)]
    assert speculative.passes(half, 2) == pytest.approx(np.mean(drawn), rel=0.02)
    warm = speculative.chances(helper, model.vocabulary, prompt, answer, speculative.WARM)
    assert ((warm > 0) & (warm <= 1)).all()


def test_tokens_a_pass_are_told_for_each_way(subject):
    figures, table = figures_of(
        speculative.run(subject, questions=1, tokens=6, rounds=1, answers=2)
    )
    for way in ("greedy_unsteered", "greedy_steered", "sampled_unsteered", "sampled_steered"):
        assert 1 <= figures[f"speculative_tokens_{way}"] <= 4
    remark = table["tokens a pass of the model, greedy, steered"]["remark"]
    assert remark.endswith("2 answers, 12 tokens")


def test_texts_that_are_equal_and_one_that_is_not(subject, monkeypatch):
    figures, table = figures_of(texts.run(subject, questions=2, tokens=6))
    assert figures == dict.fromkeys(
        ["texts_stock_equal", "texts_batch_equal", "texts_draft_equal"], True
    )
    assert table["unsteered answers are mlx-lm's"]["remark"] == "2 of 2, 12 tokens"
    batched = texts.generate_batch

    def other(*arguments, **options):
        for number, answer in batched(*arguments, **options):
            *ids, last = answer.token_ids
            yield number, replace(answer, token_ids=(*ids, last + number))

    monkeypatch.setattr(texts, "generate_batch", other)
    made = texts.run(subject, questions=2, tokens=6)
    (found,) = made.details["differences"]["batch"]
    model, prompt = subject.model, encode_prompt(subject.model.tokenizer, held_out(2)[1].question)
    steering = resolve(model, subject.vector, "10%", [3])
    ids = generate(model, prompt, steering=steering, max_tokens=6).token_ids
    logits = model.network(
        mx.array([[*prompt, *ids[:5]]]), cache=make_cache(model.network, steering)
    )
    second, best = mx.sort(logits[0, -1])[-2:].tolist()
    assert found["token"] == 5 and found["margin"] == pytest.approx(best - second, abs=0.01)
    assert found["step"] == pytest.approx(mx.finfo(logits.dtype).eps * best, rel=0.01)
    assert made.document()["texts_batch_equal"] is False


@pytest.mark.slow
def test_a_grid_gives_the_answers_of_separate_runs(subject):
    made = sweep.run(subject, problems=1, settings=2, max_tokens=3, rounds=1)
    figures, _ = figures_of(made)
    assert set(figures) == {"sweep_speedup_vs_separate", "sweep_speedup_vs_processes"}
    assert min(figures.values()) > 0
    assert made.details["equal_answers"] == made.details["answers"] == 2


@pytest.mark.slow
def test_the_first_token_of_both_programs(subject):
    figures, table = figures_of(startup.run(subject, rounds=1))
    assert set(figures) == {
        "first_token_ratio", "first_token_steered_ratio", "import_seconds", "help_seconds",
    }  # fmt: skip
    assert min(figures.values()) > 0
    assert table["unsteered: the text is mlx_lm's"]["value"] is True


def test_a_calibration_is_timed_against_its_grid(subject):
    made = calibrate.run(subject, pairs=1, problems=1, layers=2, best=1, max_tokens=3)
    figures, table = figures_of(made)
    assert set(figures) == {"calibrate_speedup", "calibrate_problems"}
    assert set(made.details["seconds"]) == {"calibrating", "best", "grid"}
    speedup = table["seconds, grid / calibration and best"]
    assert speedup["remark"] == "6 settings against 1, 1 problems of 3 tokens at most"


@pytest.mark.slow
def test_the_next_turn_is_timed_on_both_sides(subject):
    figures, _ = figures_of(turns.run(subject, turns=2, tokens=4, rounds=1))
    assert set(figures) == {"turn_serve_ratio", "turn_session_ratio"}
    assert min(figures.values()) > 0


def test_a_process_that_fails_gives_its_own_last_words():
    failing = startup._Command([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    with pytest.raises(subprocess.CalledProcessError) as caught:
        failing.first_token()
    assert "exit code 1: no such thing" in script.reason(caught.value)


def test_the_rule_that_mlx_lm_prints_first_is_no_token():
    code = "print('=' * 10, flush=True); import time; time.sleep(0.3); print('word', flush=True); print('=' * 10)"
    command = startup._Command([sys.executable, "-c", code])
    assert command.first_token() >= 0.3
    assert command.text == "word"


def test_a_truncated_copy_shares_the_weights_and_is_the_lower_part(subject):
    network = subject.model.network
    small = speculative.truncated(network, 2)
    assert small.model.layers[1] is network.model.layers[1]
    assert small(mx.array([[1, 2, 3]])).shape == (1, 3, network.args.vocab_size)


def test_a_gpt_like_head_is_shared_too(tiny):
    tiny.args.tie_word_embeddings = False
    tiny.lm_head = tiny.model.embed_tokens.as_linear
    assert speculative.truncated(tiny, 1).lm_head == tiny.lm_head


def test_the_model_is_as_it_was_after_a_draft_of_its_own_blocks(demo_model):
    """The copy shares its blocks with the model."""
    other = Subject("demo", load("demo"))
    speculative.run(other, questions=1, tokens=2, rounds=1)
    resteer.run(other, prefix_tokens=8, rounds=1)
    steering = resolve(demo_model, other.vector, "10%", [3])
    question = held_out(1)[0].question
    answers = [
        generate(model, question, max_tokens=8, steering=steering).token_ids
        for model in (other.model, demo_model)
    ]
    assert answers[0] == answers[1]


def run_script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *words],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_vector_and_lora_are_trained_on_the_same_texts(subject):
    made = train.run(subject, examples=2, rounds=1)
    figures, _ = figures_of(made)
    assert set(figures) == {"train_ratio", "train_memory_ratio"}
    assert made.details["tokens"] > 0


def test_the_scripts_are_those_of_the_documentation():
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert len(SCRIPTS) == 13
    assert not [name for name in SCRIPTS if f"`{name}`" not in page]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_is_a_script_with_help(name, monkeypatch, capsys):
    """In this process, which has mlx already; the tests below start some of them."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert not end.value.code and "usage:" in shown and "--json" in shown


@pytest.mark.slow
def test_a_script_runs_by_itself():
    words = "demo --problems 1 --settings 1 --max-tokens 2 --rounds 1 --no-processes --json"
    done = run_script("sweep", *words.split())
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(made) == {"sweep_speedup_vs_separate", "details", "header"}
    assert made["details"]["options"]["processes"] is False
    assert made["header"]["command"].endswith(" ".join(words.split()))


@pytest.mark.slow
def test_the_dose_script_shows_a_row_for_each_setting():
    done = run_script(
        "dose", "demo", "demo", "--layers", "5", "--doses", "10%,100%", "--max-tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.strip()]) >= 3


@pytest.mark.slow
def test_the_function_script_measures_a_file():
    words = ["demo", "--capacity", "32", "--prompt-tokens", "8", "--steps", "3", "--json"]
    made = json.loads(run_script("function", *words).stdout)
    assert made["function_ratio"] > 0


def test_an_error_is_a_line_and_no_traceback():
    done = run_script("resteer", "/nowhere")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
