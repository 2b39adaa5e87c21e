"""`densesteer bench` on the demo model, `--quick`: what it says is whole and consistent.

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
from click.testing import CliRunner

from mlx_densesteer import generate, resolve
from mlx_densesteer.bench import batch, decode, figures, suite
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.cli import main
from mlx_densesteer.cli.bench import NAMES
from mlx_densesteer.demo.problems import held_out


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.load("demo")


@pytest.fixture(scope="module")
def found(subject) -> dict[str, figures.Measurement]:
    return dict(suite.measure(subject, quick=True))


@pytest.fixture(scope="module")
def document(subject, found) -> dict:
    made = suite.document(found, suite.header(subject, "a command"), "not asked for")
    return json.loads(json.dumps(made, allow_nan=False))


def test_every_figure_is_there_and_a_number(document):
    names = {name for module in suite.BENCHMARKS.values() for name in module.FIGURES}
    assert names >= {"decode_ratio", "prefill_ratio", "extra_primitives", "peak_memory_ratio"}
    assert set(document) == names | {"header", "details"}
    for name in names:
        assert type(document[name]) in (int, float), name
        assert math.isfinite(document[name])
        assert document[name] > 0 or name == "extra_primitives"
    assert set(document["details"]) == set(suite.BENCHMARKS) == set(NAMES)
    assert not [name for name, one in document["details"].items() if "reason" in one]


def test_the_suite_asks_for_what_the_benchmarks_know():
    for name, module in suite.BENCHMARKS.items():
        known = module.run.__kwdefaults__
        assert set(module.QUICK) <= set(known), name
        assert all(type(value) is type(known[key]) for key, value in module.QUICK.items()), name


def test_figures_agree_with_their_details(document, subject):
    tables = {
        name: {row["key"]: row for row in of["table"]} for name, of in document["details"].items()
    }
    for name, rows in tables.items():
        for key in suite.BENCHMARKS[name].FIGURES:
            row = rows[key]
            assert document[key] == row["value"]
            assert row["spread"] is None or document[key] == row["spread"]["median"]
    assert document["extra_primitives"] == 0  # positions all
    stock = decode.primitives(subject, None)
    assert decode.primitives(subject, subject.steering()) == stock > 100
    assert tables["decode"]["extra_primitives"]["remark"] == f"stock {stock}, steered {stock}"
    assert 1 <= tables["decode"]["decode_ratio"]["spread"]["count"] <= decode.QUICK["steps"]
    shown = [row["name"] for row in document["details"]["batch"]["table"]]
    assert shown == [
        *(f"throughput of {size} rows, steered / stock" for size in (1, 4, 16)),
        "throughput, 16 rows / 1",
    ]


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
    assert max(map(len, text)) < 130


def test_the_model_is_as_it_was_afterwards(subject, found, demo_model):
    steering = resolve(demo_model, subject.vector, "10%", [3])
    question = held_out(1)[0].question
    answers = [
        generate(model, question, max_tokens=8, steering=steering).token_ids
        for model in (subject.model, demo_model)
    ]
    assert answers[0] == answers[1]


def test_what_cannot_run_is_null_with_its_reason(subject, monkeypatch):
    monkeypatch.setattr(batch, "QUICK", {"sizes": (2,), "tokens": 1, "rounds": 1})
    found = dict(suite.measure(subject, ["batch"], quick=True))
    made = suite.document(found, {}, "not asked for")
    assert made["batch_ratio"] is None and made["decode_ratio"] is None
    assert "ask for more tokens" in made["details"]["batch"]["reason"]
    assert made["details"]["decode"]["reason"] == "not asked for"
    text = suite.report(found, suite.header(subject, "a command"))
    assert sum("not measured" in line for line in text) == 1
    assert sum("ask for more tokens" in line for line in text) == 1


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
    assert batch.seconds_of_full_steps(lambda: next(counts), 2) > 0
    counts = iter([1, 2, 1, None])
    with pytest.raises(RuntimeError, match="1 steps gave all 2 rows a token"):
        batch.seconds_of_full_steps(lambda: next(counts), 2)


def test_an_unknown_name_is_refused_with_those_there_are():
    done = CliRunner().invoke(main, ["bench", "speed"])
    assert done.exit_code == 2
    assert "'speed' is not one of 'decode', 'generation', 'batch'" in done.output


BENCH = (sys.executable, "-m", "mlx_densesteer", "bench")


def test_the_command_prints_one_table():
    made = subprocess.run(
        [*BENCH, "--quick", "generation"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "\ngeneration\n" in made.stdout and "peak memory, steered / stock" in made.stdout
    assert "\ndecode\n" not in made.stdout
    assert "generation done" in made.stderr and "(1 of 1)" in made.stderr
    assert "generation done" not in made.stdout


def test_ctrl_c_prints_what_was_measured_so_far():
    process = subprocess.Popen(
        [*BENCH, "generation", "decode", "--quick", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with process:
        for line in process.stderr:
            if "decode done" in line:  # the suite's order, not that of the words
                process.send_signal(signal.SIGINT)
                break
        out, _ = process.communicate(timeout=120)
    made = json.loads(out)
    assert process.returncode == 130
    assert made["decode_ratio"] > 0 and made["generation_ratio"] is None
    assert made["details"]["generation"]["reason"] == "interrupted"
