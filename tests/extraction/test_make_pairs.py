import json
import os
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from chat_server import ChatServer
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_densesteer.cli import main
from mlx_densesteer.errors import DenseSteerError, InputError
from mlx_densesteer.evaluation.answers import Answer
from mlx_densesteer.evaluation.tasks import load_task
from mlx_densesteer.extraction import make_pairs as make_pairs_module
from mlx_densesteer.extraction.make_pairs import PairsProgress, make_pairs
from mlx_densesteer.extraction.pairs import read_pairs
from mlx_densesteer.extraction.rewriting import (
    SYSTEM,
    Original,
    Rewrite,
    Rewriter,
    read_answer,
    request,
)
from mlx_densesteer.extraction.rewriting.file import FileRewriter
from mlx_densesteer.extraction.rewriting.model import InstructionRewriter, ModelRewriter
from mlx_densesteer.extraction.rewriting.rules import RulesRewriter, merge_steps
from mlx_densesteer.extraction.verification import most_tokens
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.generation.sampling import Sampling
from mlx_densesteer.generation.stream import generate
from mlx_densesteer.model.likelihood import nll
from mlx_densesteer.model.model import load
from mlx_densesteer.model.prompt import encode_prompt

SOLUTIONS = [
    "8+1=9.\n\nThat makes 9.\n\n9*2=18.\n#### 18",
    "3*3=9.\n\n9-4=5.\n\nThat makes 5.\n#### 5",
    "7-2=5.\n\n5+5=10.\n\n10/2=5.\n\nThat makes 5.\n#### 5",
    "4+4=8.\n#### 8",  # a single step
    "6/2=3.\n\n3+1=4.\n#### 4",
    "We will add.\n\n2*2=4.\n\n4*2=8.\n\nThat makes 8.\n#### 8",  # begins with a plan
    "9-1=8.\n\n8-3=5.\n#### 5",
]
WRONG = 4  # the answer that the file of problems wants is another one


@pytest.fixture(scope="module")
def solver(hf_folder, tmp_path_factory):
    """A tiny model that was trained to solve seven problems by heart, as a folder."""
    import shutil

    folder = tmp_path_factory.mktemp("solver") / "Solver"
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = (
        2048  # a token is a byte here, and a rewriter's request has 1,100
    )
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = load(hf_folder)
    model.set_dtype(mx.float32)
    end = tokenizer.eos_token_id
    rows = [
        (encode_prompt(tokenizer, f"{chr(65 + i)}?"), [*tokenizer.encode(text), end])
        for i, text in enumerate(SOLUTIONS)
    ]
    width = max(len(prompt) + len(text) for prompt, text in rows)
    tokens = mx.array([[*p, *t, *[0] * (width - len(p) - len(t))] for p, t in rows])
    places = mx.arange(1, width)
    first = mx.array([[len(p)] for p, _ in rows])
    last = mx.array([[len(p) + len(t)] for p, t in rows])
    asked = (places >= first) & (places < last)

    def loss(model):
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (losses * asked).sum() / asked.sum()

    optimizer, step = optim.Adam(learning_rate=3e-3), nn.value_and_grad(model, loss)
    for _ in range(400):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
        if value.item() < 0.004:
            break
    assert value.item() < 0.02, "the solver did not learn its problems"
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "task.jsonl"
    lines = []
    for i, text in enumerate(SOLUTIONS):
        gold = "77" if i == WRONG else text.rpartition("#### ")[2]
        lines.append(json.dumps({"question": f"{chr(65 + i)}?", "answer": f"#### {gold}"}))
    file.write_text("\n".join(lines))
    return file


def run(solver, problems, out, rewriter=None, **options):
    model, tokenizer = load(solver)
    options = {"max_tokens": 80, "rows": 3, "nll_margin": 50.0} | options
    rewriter = rewriter or RulesRewriter()
    return make_pairs(model, tokenizer, load_task(problems), rewriter, out, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_of_the_models_own_solutions(solver, problems, tmp_path):
    states: list[PairsProgress] = []
    out = tmp_path / "pairs.jsonl"
    summary = run(solver, problems, out, progress=states.append)
    made, rejected = lines(out), lines(tmp_path / "pairs.rejected.jsonl")
    kept = [i for i in range(7) if i not in (3, WRONG)]
    assert [m["prompt"] for m in made] == [f"{chr(65 + i)}?" for i in kept]
    assert [m["negative"] for m in made] == [SOLUTIONS[i] for i in kept]
    assert [m["positive"] for m in made] == [merge_steps(SOLUTIONS[i]) for i in kept]
    assert [(r["prompt"], r["reasons"], r["positive"]) for r in rejected] == [
        ("D?", ["single step"], None)
    ]
    assert [p.prompt for p in read_pairs(out)] == [m["prompt"] for m in made]
    assert (summary.problems, summary.wrong, summary.truncated) == (7, 1, 0)
    assert (summary.accepted, summary.rejected) == (5, {"single step": 1})
    assert summary.after["steps"] == 1.0 < summary.before["steps"]
    assert states[-1] == PairsProgress(7, 7, 6, 5, 6, 5, states[-1].tokens)


def test_of_several_samples_two_that_differ_are_rewritten(solver, problems, tmp_path, monkeypatch):
    right = SOLUTIONS[0]
    other, third = right.replace("That makes 9.\n\n", ""), right.replace("That", "Which")
    drawn = {"A?": ["No.\n#### 1", right, right, other, third], "B?": [SOLUTIONS[3]] * 5}

    def give(model, problems, conditions, journal, **options):
        assert journal.path.name == "pairs.jsonl.samples.jsonl"
        assert [one.sampling for one in conditions] == [Sampling(0.7, seed=3)] * 5
        return [
            Answer(
                problem.id, "", one.fingerprint, text, (1,), 1, "stop",
                text.endswith(problem.answer), None, False, None, 1.0,
            )
            for problem in problems
            for one, text in zip(conditions, drawn[problem.prompt], strict=True)
        ]  # fmt: skip

    monkeypatch.setattr(make_pairs_module, "answer", give)
    model, tokenizer = load(solver)
    out, two = tmp_path / "pairs.jsonl", load_task(problems)[:2]
    options = {"samples": 5, "sampling": Sampling(0.7, seed=3), "nll_margin": 50.0}
    summary = make_pairs(model, tokenizer, two, RulesRewriter(), out, **options)
    made = lines(out)
    assert [one["negative"] for one in made] == [right, other]
    assert [one["sampling"]["negative"] for one in made] == [1, 3]
    assert made[0]["sampling"] == {"temp": 0.7, "top_p": 1.0, "seed": 3, "negative": 1}
    assert (summary.problems, summary.wrong, summary.accepted) == (2, 6, 2)


def test_samples_that_are_rewritten_go_on_and_are_the_same_bytes(solver, problems, tmp_path):
    sampling = {"samples": 2, "sampling": Sampling(0.3, seed=1)}
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    summary = run(solver, problems, whole, **sampling)
    assert summary.problems == 7 and summary.accepted >= 5
    run(solver, problems, parts, count=2, **sampling)
    run(solver, problems, parts, **sampling)
    assert parts.read_bytes() == whole.read_bytes()
    with pytest.raises(InputError, match="1 samples of a problem: expected at least 2"):
        run(solver, problems, tmp_path / "one.jsonl", samples=1)


def test_the_figures_are_those_of_the_texts(solver, problems, tmp_path):
    run(solver, problems, tmp_path / "pairs.jsonl")
    model, tokenizer = load(solver)
    for record in lines(tmp_path / "pairs.jsonl"):
        for side in ("positive", "negative"):
            tokens, figures = tokenizer.encode(record[side]), record["figures"][side]
            prompt = encode_prompt(tokenizer, record["prompt"])
            assert figures["tokens"] == len(tokens)
            assert figures["steps"] == len(split_steps(record[side]))
            assert figures["nll"] == pytest.approx(nll(model, [prompt], [tokens])[0], abs=1e-4)


class Asked(Rewriter):
    """The rules, and a count of what was asked for."""

    name = "counting"

    def __init__(self, fail_at=None):
        self.drafts, self.fail_at = [], fail_at

    def rewrite(self, drafts):
        for index, draft in enumerate(drafts):
            if len(self.drafts) == self.fail_at:
                raise InputError("the endpoint is down")
            self.drafts.append(draft)
            yield index, Rewrite(merge_steps(draft.response))


def test_what_is_done_is_not_done_again(solver, problems, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(solver, problems, whole, Asked())
    with pytest.raises(InputError, match="down"):
        run(solver, problems, broken, Asked(fail_at=2))
    assert not broken.exists()
    monkeypatch.setattr("mlx_densesteer.evaluation.answers.generate_batch", refuse_work)
    again = Asked()
    run(solver, problems, broken, again)
    assert len(again.drafts) == 3
    assert broken.read_bytes() == whole.read_bytes()
    monkeypatch.setattr("mlx_densesteer.extraction.make_pairs.nll", None)
    run(solver, problems, broken, Asked(fail_at=0))
    assert broken.read_bytes() == whole.read_bytes()


def refuse_work(model, prompts, **options):
    assert not prompts, f"{len(prompts)} problems are solved again"
    return iter(())


def test_another_rewriter_and_margin_use_the_same_solutions(
    solver, problems, tmp_path, monkeypatch
):
    out = tmp_path / "pairs.jsonl"
    run(solver, problems, out, Asked())
    monkeypatch.setattr("mlx_densesteer.evaluation.answers.generate_batch", refuse_work)
    summary = run(solver, problems, out, nll_margin=0.0)
    assert summary.rejected["unlikely"] == 5 and not out.read_text()
    rejected = lines(tmp_path / "pairs.rejected.jsonl")
    assert {r["rewriter"] for r in rejected} == {RulesRewriter().name}
    assert all(r["figures"]["positive"]["nll"] for r in rejected if r["positive"])


def test_other_settings_are_refused(solver, problems, tmp_path):
    out = tmp_path / "pairs.jsonl"
    run(solver, problems, out)
    for options in ({"system": "Be brief."}, {"max_tokens": 81}):
        with pytest.raises(InputError, match="belongs to another run"):
            run(solver, problems, out, **options)
    (tmp_path / "other.jsonl").write_text("mine")
    with pytest.raises(InputError, match="is there already, without the journal"):
        run(solver, problems, tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_text() == "mine"
    with pytest.raises(DenseSteerError, match="no folder"):
        run(solver, problems, tmp_path / "no" / "p.jsonl")


def test_a_count_takes_the_first_pairs_however_the_work_is_cut(solver, problems, tmp_path):
    files = []
    for rows in (1, 2, 7):
        out = tmp_path / f"{rows}.jsonl"
        summary = run(solver, problems, out, count=2, rows=rows)
        assert (summary.accepted, summary.problems) == (2, 2)
        files.append(out.read_bytes())
    assert len(set(files)) == 1 and len(lines(out)) == 2
    run(solver, problems, tmp_path / "1.jsonl", count=4, rows=1)
    assert (tmp_path / "1.jsonl").read_bytes().startswith(files[0])
    assert run(solver, problems, tmp_path / "all.jsonl", count=50).accepted == 5


def test_a_response_that_is_cut_off_is_no_negative(solver, problems, tmp_path):
    summary = run(solver, problems, tmp_path / "pairs.jsonl", max_tokens=30)
    assert summary.wrong + summary.truncated >= 2
    assert summary.accepted + sum(summary.rejected.values()) < 6
    for record in lines(tmp_path / "pairs.jsonl"):
        assert "####" in record["negative"]


def test_a_system_message_is_kept_with_the_pair(solver, problems, tmp_path):
    run(solver, problems, tmp_path / "pairs.jsonl", system="You are a solver.")
    run(solver, problems, tmp_path / "plain.jsonl")
    files = [tmp_path / "pairs.jsonl", tmp_path / "pairs.rejected.jsonl"]
    assert {r["system"] for file in files for r in lines(file)} <= {"You are a solver."}
    header = lines(tmp_path / "pairs.jsonl.solved.jsonl")[0]
    assert header["system"] == "You are a solver."
    assert {pair.system for pair in read_pairs(tmp_path / "plain.jsonl")} == {None}


# the command


def command(solver, problems, out, *more):
    return ["pairs", "-m", str(solver), str(problems), "-o", str(out), "-n", "80", "--rows", "2",
            "--nll-margin", "50", *more]  # fmt: skip


def call(*args, **env):
    return CliRunner(env=env).invoke(main, command(*args), catch_exceptions=False)


def test_the_command(solver, problems, tmp_path):
    out = tmp_path / "pairs.jsonl"
    result = call(solver, problems, out)
    assert result.exit_code == 0 and result.stdout == f"{out}\n"
    assert "7 problems: 5 accepted, 1 rejected, 1 solved wrongly, 0 cut off" in result.stderr
    assert "1 single step" in result.stderr and "mean of the accepted" in result.stderr
    result = call(solver, problems, out, "--json", "--count", "9")
    document = json.loads(result.stdout)
    assert document["accepted"] == 5 and document["pairs"] == str(out)
    assert "only 5 of 9 pairs" in result.stderr
    solved = (tmp_path / "pairs.jsonl.solved.jsonl").read_bytes()
    document = json.loads(call(solver, problems, out, "--json", "--rewriter", "plain").stdout)
    assert document["accepted"] == 5  # no answer has a formula
    assert document["rewriter"] == RulesRewriter(plain=True).name != RulesRewriter().name
    assert {record["rewriter"] for record in lines(out)} == {document["rewriter"]}
    assert (tmp_path / "pairs.jsonl.solved.jsonl").read_bytes() == solved
    result = call(solver, problems, out, "--rewriter", "brief")
    assert "7 problems: 1 accepted, 5 rejected" in result.stderr
    assert "5 not shorter: it has as many tokens as the original" in result.stderr
    assert [(r["negative"], r["positive"]) for r in lines(out)] == [
        (SOLUTIONS[5], SOLUTIONS[5].removeprefix("We will add.\n\n"))
    ]


def test_no_more_pairs_are_told_than_were_asked_for(solver, problems, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_densesteer.text.Live.ELSEWHERE", 0.0)  # every step
    told = call(solver, problems, tmp_path / "pairs.jsonl", "--count", "1").stderr
    shown = re.findall(r"(\d+) of 1 accepted", told)
    assert set(shown) == {"0", "1"} and re.search(r"problems?: 1 of 1 accepted, ", told)


def test_the_target_may_rewrite_its_own_solutions(solver, problems, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "mlx_densesteer.model.model.load", lambda path: loaded.append(path) or load(path)
    )
    result = call(solver, problems, tmp_path / "p.jsonl", "--rewriter", f"mlx:{solver}", "--json")
    assert len(loaded) == 1  # the target is not loaded a second time
    document = json.loads(result.stdout)
    model, tokenizer = load(solver)
    assert document["rewriter"] == ModelRewriter(model, tokenizer, str(solver)).name
    assert document["rejected"].pop("single step") == 1
    assert document["accepted"] + sum(document["rejected"].values()) == 5
    made = {r["problem"]: r for r in lines(tmp_path / "p.jsonl.rewrites.jsonl") if "key" in r}
    for i, problem in enumerate(load_task(problems)):
        if i in (3, WRONG):
            assert problem.id not in made
            continue
        draft = Original(problem.id, problem.question, SOLUTIONS[i], 0, problem.prompt)
        alone = generate(
            model, tokenizer, request(draft), system=SYSTEM,
            max_tokens=most_tokens(len(tokenizer.encode(SOLUTIONS[i]))),
        )  # fmt: skip
        assert made[problem.id]["text"] == read_answer(alone.text) != ""
        assert made[problem.id]["truncated"] == (alone.finish_reason == "length")


def test_the_model_itself_answers_again(solver, problems, tmp_path):
    words = ("--rewriter", "instruction:Be brief.", "--json")
    document = json.loads(call(solver, problems, tmp_path / "p.jsonl", *words).stdout)
    model = load(solver)
    rewriter = InstructionRewriter(model, "Be brief.")
    assert document["rewriter"] == rewriter.name
    made = [r for r in lines(tmp_path / "p.jsonl.rewrites.jsonl") if "key" in r]
    assert made
    found = {problem.id: (i, problem) for i, problem in enumerate(load_task(problems))}
    for record in made:
        i, problem = found[record["problem"]]
        alone = generate(
            model, problem.prompt, system="Be brief.",
            max_tokens=most_tokens(len(model.tokenizer.encode(SOLUTIONS[i]))),
        )  # fmt: skip
        assert record["text"] == alone.text


def test_rewrites_from_a_file(solver, problems, tmp_path):
    rewrites = tmp_path / "r.jsonl"
    rewrites.write_text(json.dumps({"question": "A?", "rewrite": merge_steps(SOLUTIONS[0])}))
    result = call(
        solver, problems, tmp_path / "p.jsonl", "--rewriter", f"file:{rewrites}", "--json"
    )
    assert json.loads(result.stdout)["rejected"] == {"no rewrite": 4, "single step": 1}
    more = [{"question": "B?", "rewrite": merge_steps(SOLUTIONS[1])}]
    rewrites.write_text(rewrites.read_text() + "\n" + json.dumps(more[0]))
    result = call(
        solver, problems, tmp_path / "p.jsonl", "--rewriter", f"file:{rewrites}", "--json"
    )
    assert json.loads(result.stdout)["accepted"] == 2


def test_a_corrected_file_is_read_and_another_of_its_name_does_not_mix_in(
    solver, problems, tmp_path, monkeypatch
):
    def once(folder, text):
        (tmp_path / folder).mkdir(exist_ok=True)
        rewrites = tmp_path / folder / "r.jsonl"
        rewrites.write_text(json.dumps({"question": "A?", "rewrite": text}))
        run(solver, problems, tmp_path / "p.jsonl", FileRewriter(rewrites))
        return [
            record["positive"]
            for file in ("p.jsonl", "p.rejected.jsonl") for record in lines(tmp_path / file)
            if record["positive"]
        ]  # fmt: skip

    right = merge_steps(SOLUTIONS[0])
    assert once("a", "wrong: 19") == ["wrong: 19"]
    assert once("a", right) == [right]
    assert once("b", "wrong: 20") == ["wrong: 20"]
    monkeypatch.setattr("mlx_densesteer.extraction.make_pairs.nll", None)
    assert once("a", right) == [right]  # its NLL is known


HOSTILE = ["1 2 " * 6000, "9" * 100_000, "8+1=9. " * 300 + "9*2=18.\n#### 18"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("most", [5000, 700])
def test_a_rewrite_that_is_too_long_costs_nothing(
    solver, problems, tmp_path, monkeypatch, text, most
):
    """Neither a pass of the model nor, beyond what could be accepted, a tokenizer."""
    model, tokenizer = load(solver)
    model.args.max_position_embeddings = most
    measured = []
    monkeypatch.setattr(
        "mlx_densesteer.extraction.make_pairs.nll",
        lambda model, prompts, responses: measured.extend(map(len, responses)) or [1.0, 1.0],
    )
    rewriter = Asked()
    rewriter.rewrite = lambda drafts: ((i, Rewrite(text)) for i, _ in enumerate(drafts))
    for _ in range(2):  # the second time from the journal
        summary = make_pairs(
            model, tokenizer, load_task(problems), rewriter, tmp_path / "p.jsonl", max_tokens=80
        )
        assert summary.rejected == {"too long": 5, "single step": 1}
    assert not measured
    for record in lines(tmp_path / "p.rejected.jsonl"):
        if record["positive"]:
            assert text.startswith(record["positive"])
            assert record["figures"]["positive"]["tokens"] > most_tokens(
                record["figures"]["negative"]["tokens"]
            )


def test_a_solution_ends_where_the_context_does(solver, problems, tmp_path):
    model, tokenizer = load(solver)
    problem = load_task(problems)[0]
    solution = len(tokenizer.encode(SOLUTIONS[0]))
    for room, accepted in ((solution + 1, 1), (solution - 1, 0)):  # the end of turn is a token
        prompt = encode_prompt(tokenizer, problem.prompt)
        model.args.max_position_embeddings = len(prompt) + room
        summary = make_pairs(
            model, tokenizer, [problem], RulesRewriter(), tmp_path / f"{room}.jsonl",
            max_tokens=80, nll_margin=50.0,
        )  # fmt: skip
        assert summary.accepted == accepted
        assert summary.truncated == 1 - accepted


def test_only_a_rewrite_without_another_fault_is_measured(solver, problems, tmp_path):
    rewriter = Asked()
    rewriter.rewrite = lambda drafts: (
        (i, Rewrite("No answer." if i else merge_steps(draft.response)))
        for i, draft in enumerate(drafts)
    )
    summary = run(solver, problems, tmp_path / "p.jsonl", rewriter)
    assert summary.accepted == 1 and summary.rejected["other answer"] == 4
    journal = lines(tmp_path / "p.jsonl.rewrites.jsonl")
    assert sum("nll_of" in record for record in journal) == 1
    for record in lines(tmp_path / "p.rejected.jsonl"):
        assert record["figures"]["negative"]["nll"] is None


def test_half_a_surrogate_pair_in_a_rewrite_or_in_the_journal_is_repaired(
    solver, problems, tmp_path
):
    out, journal = tmp_path / "p.jsonl", tmp_path / "p.jsonl.rewrites.jsonl"
    with ChatServer(lambda text: "abc \ud83d = 3") as server:
        options = ("--rewriter", f"openai:{server.url}#m", "--json")
        for _ in range(2):
            result = call(solver, problems, out, *options)
            assert json.loads(result.stdout)["rejected"]["other answer"] == 5
            texts = {r["positive"] for r in lines(tmp_path / "p.rejected.jsonl")}
            assert texts == {None, "abc \ufffd = 3"}
            # as an earlier version wrote it
            journal.write_text(journal.read_text().replace("\ufffd", r"\ud83d"))
            assert r"\ud83d" in journal.read_text()
        assert len(server.bodies) == 5


def test_a_damaged_record_of_the_rewrites_is_named(solver, problems, tmp_path):
    out, journal = tmp_path / "p.jsonl", tmp_path / "p.jsonl.rewrites.jsonl"
    run(solver, problems, out)
    header, *_ = journal.read_text().splitlines()
    for record in (
        {"nll_of": "x"}, {"nll_of": ["x"], "nll": [1, 2]}, {"nll_of": "x", "nll": [1]}, {},
        {"nll_of": "x", "nll": [None, 1]}, {"key": "x", "text": "y"}, {"key": ["x"], "text": "y", "truncated": False},
        {"key": "x", "text": 5, "truncated": False}, {"key": "x", "text": "y", "truncated": 0},
    ):  # fmt: skip
        journal.write_text(f"{header}\n{json.dumps(record)}\n")
        with pytest.raises(InputError, match=r"rewrites\.jsonl: line 2 is no rewrite"):
            run(solver, problems, out)


def test_what_endpoint_fields_hold_is_in_no_file(solver, problems, tmp_path):
    with ChatServer(dense_reply) as server:
        result = call(
            solver, problems, tmp_path / "p.jsonl", "--rewriter",
            f"openai:{server.url}?key=sk-query#m", "--rewriter-fields", '{"api_key": "sk-field"}',
            "--json",
        )  # fmt: skip
        assert server.bodies[0]["api_key"] == "sk-field"
    assert json.loads(result.stdout)["accepted"] == 5
    for text in (result.output, *(path.read_text() for path in tmp_path.glob("p.*"))):
        assert "sk-field" not in text and "sk-query" not in text
    assert "fields api_key" in (tmp_path / "p.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rewriter", "magic"], "expected rules, plain, brief, instruction:TEXT"),
        (["--rewriter", "instruction: "], "expected rules, plain, brief, instruction:TEXT"),
        (["--rewriter", "mlx:"], "expected rules, plain, brief, instruction:TEXT"),
        (["--rewriter", "plain:x"], "expected rules, plain, brief, instruction:TEXT"),
        (["--rewriter", "openai:nowhere"], "expected openai:URL#model"),
        (["--rewriter", "openai:http://x#m", "--rewriter-fields", "["], "is not JSON"),
        (["--rewriter", "openai:http://x#m", "--rewriter-fields", "[" * 99999], "is not JSON"),
        (["--rewriter", "openai:http://x#m", "--timeout", "inf"], "a time-out of inf s"),
        (["--rewriter", "openai:http://x#m", "--timeout", "nan"], "a time-out of nan s"),
        (["--rewriter", "openai:http://x#m", "--requests-per-minute", "nan"], "nan requests"),
        (["--nll-margin", "nan"], "an NLL margin of nan"),
        (["--rewriter", "file:/nowhere"], "cannot be read"),
    ],
)
def test_what_the_command_refuses(solver, problems, tmp_path, more, message):
    result = call(solver, problems, tmp_path / "p.jsonl", *more)
    assert result.exit_code != 0 and message in result.stderr
    assert not list(tmp_path.glob("p.jsonl*"))


# killed


def start(*args):
    env = {**os.environ, "OPENAI_API_KEY": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_densesteer", *command(*args)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def dense_reply(text):
    return merge_steps(text.partition("Solution:\n")[2])


def test_killed_at_any_point_it_loses_nothing_and_repeats_nothing(solver, problems, tmp_path):
    """SIGKILL while solving, then at the second and the third request; then it may finish."""
    out, whole = tmp_path / "pairs.jsonl", tmp_path / "whole.jsonl"
    solved = tmp_path / "pairs.jsonl.solved.jsonl"
    with ChatServer(dense_reply) as server:
        rewriter = ("--rewriter", f"openai:{server.url}#m", "--at-once", "1")
        assert call(solver, problems, whole, *rewriter).exit_code == 0
        asked = len(server.bodies)
        process = start(solver, problems, out, *rewriter)
        while not solved.exists() or solved.read_bytes().count(b"\n") < 3:  # header, two answers
            time.sleep(0.002)
            assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
        before = server.bodies[asked:]
        for number in (2, 3):
            server.plan = [200] * (number - 1) + ["hang"]
            process = start(solver, problems, out, *rewriter)
            while server.plan:
                time.sleep(0.002)
                assert process.poll() is None, process.stderr.read()
            process.kill()
            process.communicate()
        process = start(solver, problems, out, *rewriter)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and stdout == f"{out}\n", stderr
    assert out.read_bytes() == whole.read_bytes() != b""
    rejected = [path.with_name(f"{path.stem}.rejected.jsonl") for path in (out, whole)]
    assert rejected[0].read_bytes() == rejected[1].read_bytes() != b""
    problems_solved = [line["problem"] for line in lines(solved)[1:]]
    assert len(problems_solved) == len(set(problems_solved)) == 7
    texts = [body["messages"][-1]["content"] for body in server.bodies[asked:]]
    assert len(before) <= 1  # the kill came while the last problems were solved, or just after
    assert len(texts) - len(set(texts)) <= 2 + len(before)  # asked again: what was under way


def test_an_interrupted_run_says_where_its_work_is(solver, problems, tmp_path):
    out = tmp_path / "pairs.jsonl"
    with ChatServer(dense_reply) as server:
        server.plan = [200, "hang"]
        rewriter = ("--rewriter", f"openai:{server.url}#m", "--at-once", "1")
        process = start(solver, problems, out, *rewriter)
        while server.plan:
            time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stdout == ""
    assert re.search(r"interrupted; what is done is in .*solved.jsonl and .*rewrites.jsonl", stderr)
    assert len([r for r in lines(tmp_path / "pairs.jsonl.rewrites.jsonl") if "key" in r]) == 1
    assert not out.exists()
