"""The benchmarks, on the demo model with the smallest sizes: what they say is whole and consistent.

Nothing here looks at how fast anything is.
"""

import json
import math
import os
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from helpers import ROOT

from mlx_densesteer import generate
from mlx_densesteer.bench import batch, figures, startup, suite
from mlx_densesteer.bench.extract import drawn_pairs
from mlx_densesteer.bench.speculative import truncated
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.errors import InputError
from mlx_densesteer.generation.answer import split_steps

SMALL = {
    "decode": {"steps": 3, "prefills": 2, "prompt_tokens": 8},
    "generation": {"prompt_tokens": 8, "tokens": 3, "rounds": 2},
    "startup": {"rounds": 1},
    "batch": {"rows": "1,3", "tokens": 4, "rounds": 1},
    "resteer": {"prefix_tokens": 24, "rounds": 1},
    "speculative": {"questions": 1, "tokens": 6, "rounds": 1},
    "extract": {"limit": 2, "rounds": 1},
    "sweep": {"problems": 1, "settings": 2, "max_tokens": 3, "rounds": 1},
}
FIGURES = {
    "decode_ratio", "prefill_ratio", "extra_primitives", "peak_memory_ratio", "resteer_ratio",
    "sweep_speedup_vs_separate", "sweep_speedup_vs_processes", "extract_token_ratio",
}  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.load("demo")


@pytest.fixture(scope="module")
def found(subject) -> dict[str, figures.Measurement]:
    return dict(suite.measure(subject, quick=True, options=SMALL))


@pytest.fixture(scope="module")
def document(subject, found) -> dict:
    made = suite.document(found, suite.header(subject, "a command"), "not asked for")
    return json.loads(json.dumps(made, allow_nan=False))


def test_every_figure_is_there_and_a_number(document):
    for name in FIGURES:
        assert type(document[name]) in (int, float), name
        assert math.isfinite(document[name])
    ratios = [
        name for name in document if name.endswith(("_ratio", "_seconds")) or "speedup" in name
    ]
    assert all(document[name] > 0 for name in ratios)
    assert set(document["details"]) == set(suite.BENCHMARKS)
    assert not [name for name, one in document["details"].items() if "reason" in one]


def test_the_suite_asks_for_what_the_benchmarks_know():
    assert set(SMALL) == set(suite.BENCHMARKS)
    for name, module in suite.BENCHMARKS.items():
        known = module.run.__kwdefaults__
        for options in (module.SUITE, module.QUICK):
            assert set(options) <= set(known), name
            assert all(type(options[key]) is type(known[key]) for key in options), name


def test_figures_agree_with_their_details(document):
    details = document["details"]
    assert document["extra_primitives"] == 0  # positions all
    primitives = details["decode"]["primitives"]
    assert primitives["steered"] == primitives["stock"] > 100
    assert details["decode"]["decode"]["ratio"]["count"] == 3
    tokens = details["extract"]["tokens"]
    assert document["extract_token_ratio"] == tokens["apart"] / tokens["ours"] > 1
    shares = details["extract"]["shares"]
    assert shares["apart"] > shares["responses"] > shares["common_beginnings"]
    assert details["sweep"]["equal_answers"] == details["sweep"]["answers"] == 2
    assert set(details["batch"]["rows"]) == {"1", "3"}
    assert details["startup"]["same_text"] is True
    assert details["speculative"]["proposed"] >= details["speculative"]["accepted"]


def test_resteering_gives_the_bits_of_a_full_prefill(document):
    assert document["resteer_identical"] is True
    depths = document["details"]["resteer"]["depths"]
    assert [one["layer"] for one in depths.values()] == [1, 3, 4]
    for one in depths.values():
        assert one["identical"] is True
        assert one["share_of_block_tokens"] == pytest.approx(one["expected"])
    assert document["resteer_ratio"] == depths["0.5"]["ratio"]["median"]


def test_a_draft_changes_no_token(document):
    assert document["speculative_equal"] is True
    assert 0 <= document["speculative_acceptance"] <= 1


def test_the_header_says_where_and_when(document):
    head = document["header"]
    assert head["model"] == "demo" and head["command"] == "a command"
    assert head["mlx"] == mx.__version__
    assert all(
        head[key] for key in ("chip", "cores", "memory_gib", "os", "python", "date", "dtype")
    )
    assert any("a command" in line for line in suite.heading(head))


def test_the_table_names_every_benchmark(found):
    text = figures.lines((name, one.lines) for name, one in found.items())
    assert [line for line in text if line in suite.BENCHMARKS] == list(suite.BENCHMARKS)
    assert "DIFFER" not in "\n".join(text)
    assert max(map(len, text)) < 130


def test_the_model_is_as_it_was_afterwards(subject, found):
    before = Subject.load("demo")
    prompt = subject.questions(1)[0]
    answers = [
        generate(s.model, prompt, max_tokens=8, steering=s.dosed(3)).token_ids
        for s in (subject, before)
    ]
    assert answers[0] == answers[1]


def test_what_cannot_run_is_null_with_its_reason(subject):
    options = {"speculative": {"draft": "/nowhere"}, "extract": {"pairs": "/nowhere.jsonl"}}
    found = dict(suite.measure(subject, ["extract", "speculative"], options=options))
    made = suite.document(found, {}, "not asked for")
    assert made["extract_token_ratio"] is None and made["speculative_ratio"] is None
    assert "/nowhere" in made["details"]["speculative"]["reason"]
    assert "/nowhere.jsonl" in made["details"]["extract"]["reason"]
    assert made["decode_ratio"] is None
    assert made["details"]["decode"] == {"reason": "not asked for"}
    text = suite.report(found, suite.header(subject, "a command"))
    assert sum("not measured" in line for line in text) == 2


def test_a_process_that_fails_gives_its_own_last_words():
    failing = startup._Process([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    with pytest.raises(subprocess.CalledProcessError) as caught:
        failing.first_token()
    assert "exit code 1: no such thing" in suite.reason(caught.value)


def test_the_rule_that_mlx_lm_prints_first_is_no_token():
    code = "print('=' * 10, flush=True); import time; time.sleep(0.3); print('word', flush=True); print('=' * 10)"
    process = startup._Process([sys.executable, "-c", code])
    assert process.first_token() >= 0.3
    assert process.text == "word"


def test_an_unknown_name_is_refused_with_those_there_are():
    assert suite.chosen(["sweep", "decode"]) == ["decode", "sweep"]
    with pytest.raises(InputError, match="no benchmark speed: expected some of decode, gen"):
        suite.chosen(["speed"])


def test_sides_take_turns_and_end_in_time():
    calls: list[str] = []

    def side(name):
        return lambda: calls.append(name) or 1.0

    taken = figures.alternate([side("a"), side("b"), side("c")], rounds=3)
    assert "".join(calls) == "abcacbcab"  # every second round backwards
    assert taken == [[1.0] * 3] * 3
    assert len(figures.alternate([side("a")], rounds=9, seconds=1e-9)[0]) == 1
    assert figures.spread([4.0, 1.0, 2.0, 3.0]) == {
        "median": 2.5,
        "low": 2.0,
        "high": 3.0,
        "count": 4,
    }
    assert figures.ratio([1.0, 4.0], [2.0, 2.0])["median"] == 1.25


def test_only_full_steps_count():
    counts = iter([0, 1, 2, 2, 2, 1, None])
    assert batch._seconds_of_full_steps(lambda: next(counts), 2) > 0
    counts = iter([1, 2, 1, None])
    with pytest.raises(RuntimeError, match="1 steps gave all 2 rows a token"):
        batch._seconds_of_full_steps(lambda: next(counts), 2)


def test_drawn_pairs_are_dense_and_sparse():
    pairs = drawn_pairs(5)
    for pair in pairs:
        assert len(split_steps(pair.positive)) < len(split_steps(pair.negative))
    assert pairs == drawn_pairs(5)


def test_a_truncated_copy_shares_the_weights_and_is_the_lower_part(subject):
    small = truncated(subject.model, 2)
    assert small.model.layers[1] is subject.model.model.layers[1]
    assert small(mx.array([[1, 2, 3]])).shape == (1, 3, subject.model.args.vocab_size)


def test_a_gpt_like_head_is_shared_too(tiny):
    tiny.args.tie_word_embeddings = False
    tiny.lm_head = tiny.model.embed_tokens.as_linear
    assert truncated(tiny, 1).lm_head == tiny.lm_head


@pytest.mark.parametrize("name", [*suite.BENCHMARKS, "dose", "function", "serve", "soak"])
def test_every_benchmark_is_a_script_with_help(name):
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--json" in done.stdout


def script(name, *words):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *words],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("words", [
    "decode demo --steps 2 --prefills 1 --prompt-tokens 4",
    "sweep demo --problems 1 --settings 1 --max-tokens 2 --rounds 1 --no-processes",
])  # fmt: skip
def test_a_script_runs_by_itself(words):
    name, *rest = words.split()
    done = script(name, *rest, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(suite.BENCHMARKS[name].FIGURES) <= set(made)
    assert {"details", "header"} <= set(made)


def test_the_dose_script_shows_a_row_for_each_setting():
    done = script(
        "dose", "demo", "demo", "--layers", "5", "--doses", "10%,100%", "--max-tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.strip()]) >= 3


def test_the_function_script_measures_a_file():
    words = ["demo", "--capacity", "32", "--prompt-tokens", "8", "--steps", "3", "--json"]
    made = json.loads(script("function", *words).stdout)
    assert made["function_ratio"] > 0


def test_an_error_is_a_line_and_no_traceback():
    done = script("decode", "/nowhere")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


COMMAND = (
    "import sys; from mlx_densesteer.cli import main; from mlx_densesteer.cli.bench import bench;"
    "main.add_command(bench); main(['bench', *sys.argv[1:]])"
)


def test_the_command_prints_one_table():
    made = subprocess.run(
        [sys.executable, "-c", COMMAND, "--quick", "resteer"], capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    assert "\nresteer\n" in made.stdout and "identical bits" in made.stdout
    assert "resteer done" in made.stderr and "resteer done" not in made.stdout


def test_ctrl_c_prints_what_was_measured_so_far():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "decode", "startup", "sweep", "--quick", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with process:
        for line in process.stderr:
            if "decode done" in line:
                process.send_signal(signal.SIGINT)
                break
        out, _ = process.communicate(timeout=120)
    made = json.loads(out)
    assert process.returncode == 130
    assert made["decode_ratio"] > 0 and made["sweep_speedup_vs_separate"] is None
    assert made["details"]["sweep"] == {"reason": "interrupted"}
