import importlib
import json
import math
import random
import re
import sys
import time

import mlx.core as mx
import pytest
from chat_server import ChatServer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_densesteer.demo.problems import calibration, draw_solution
from mlx_densesteer.errors import InputError, install_command
from mlx_densesteer.evaluation.tasks import Problem
from mlx_densesteer.extraction import verification
from mlx_densesteer.extraction.rewriting import (
    SYSTEM,
    Original,
    Rewrite,
    notation,
    read_answer,
    request,
)
from mlx_densesteer.extraction.rewriting.file import FileRewriter
from mlx_densesteer.extraction.rewriting.openai import OpenAIRewriter
from mlx_densesteer.extraction.rewriting.rules import (
    BriefRewriter,
    RulesRewriter,
    merge_steps,
    shorten,
)
from mlx_densesteer.extraction.verification import Response, verify
from mlx_densesteer.generation.answer import split_steps

NUMBERED = r"""To determine the change, we need to follow these steps:

1. Calculate the cost of printing.
2. Calculate the cost of the pens.
3. Subtract both from the amount paid.

First, let's calculate the cost of printing. The essay has 25 pages:
\[
25 \times \$0.10 = \$2.50
\]
So, printing costs $2.50.

Next, let's calculate the cost of the pens:
\[
7 \times \$1.50 = \$10.50
\]

Therefore, the change is \(\boxed{9}\)."""

MERGED = r"""First, let's calculate the cost of printing. The essay has 25 pages:
\[
25 \times \$0.10 = \$2.50
\]
Next, let's calculate the cost of the pens:
\[
7 \times \$1.50 = \$10.50
\]
Therefore, the change is \(\boxed{9}\)."""


def originals(count=3, steps=3):
    return [
        Original(
            f"t-{i}",
            f"Question {i}?",
            "\n\n".join(f"{c}{i}." for c in "ABCDEFGHI"[:steps]),
            9,
            f"Question {i}?\n\nUse a box.",
        )
        for i in range(count)
    ]


# rules


def test_a_numbered_solution_with_displays():
    assert merge_steps(NUMBERED) == MERGED


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Tom buys 4.\n\n29+4=33.\n\nThat makes 33.\n\nHalf.\n\n32/2=16.\n#### 16",
         "Tom buys 4: 29+4=33. Half: 32/2=16.\n#### 16"),
        ("5+4=9.\n\nThat makes 9.\n#### 9", "5+4=9.\n#### 9"),
        ("5+4=9.\n\nSo the answer is 9.", "5+4=9. So the answer is 9."),
        ("### Step 1: The eggs\nHe has 3*4=12 eggs.\n\n### Step 2: The rest\nHe eats 2: 12-2=10.\n\n#### 10",
         "He has 3*4=12 eggs. He eats 2: 12-2=10.\n#### 10"),
        ("Step 1: He has 3*4=12 eggs.\n\n**Step 2:** He eats 2, so 12-2=10.",
         "He has 3*4=12 eggs. He eats 2, so 12-2=10."),
        ("1. **The eggs:**\n   There are 12.\n\n2. **The rest:**\n   12-2=10 are left.",
         "There are 12. 12-2=10 are left."),
        ("We need these steps:\n\n1. Take 7 eggs.\n2. Add.\n\n5+1=6",
         "Take 7 eggs.\nAdd: 5+1=6"),
        ("1. Find a.\n\n2. From step 1, 2+2=4.\n\n3. The answer is 4.",
         "1. Find a. 2. From step 1, 2+2=4. 3. The answer is 4."),
        ("Here is code:\n\n```python\nx = 1\n\nprint(x)\n```\n\nIt prints 1.",
         "Here is code:\n```python\nx = 1\n\nprint(x)\n```\nIt prints 1."),
        ("- 1+1=2\n\n- 2+2=4", "- 1+1=2\n- 2+2=4"),
        ("One step only.", "One step only."),
        ("", ""),
        ("# Title\n\n## Another", "# Title\n\n## Another"),
    ],
)  # fmt: skip
def test_what_goes_and_what_stays(before, after):
    assert merge_steps(before) == after


def test_the_demo_models_solutions_become_one_verified_step():
    rng = random.Random(0)
    for problem in calibration(100):
        text = draw_solution(problem, rng)
        dense = merge_steps(text)
        assert len(split_steps(dense)) == 1
        for clause in problem.clauses:
            assert f"{clause.event}: {clause.sum}." in dense
        if len(split_steps(text)) > 1:
            task = Problem(
                problem.id, problem.question, problem.question, str(problem.answer), "number"
            )
            sizes = [len(one.split()) for one in (text, dense)]
            found = verify(task, Response(text, sizes[0]), Response(dense, sizes[1]))
            assert found == ()


PLAIN = r"""First, let's calculate the cost of printing. The essay has 25 pages: 25 × $0.10 = $2.50
Next, let's calculate the cost of the pens: 7 × $1.50 = $10.50
Therefore, the change is \boxed{9}."""


SAYABLE = {
    r"\( \frac{a + b}{2} \)": "(a + b) / 2",
    r"\( \frac{1}{2x} \)": "1 / (2x)",
    r"\( \frac{-b}{2a} \)": "(-b) / (2a)",
    r"\( \frac{12}{(3)(4)} = 1 \)": "12 / ((3)(4)) = 1",
    r"\( \frac{a−b}{2} \)": "(a−b) / 2",
    r"\( 8 \div \frac{1}{2} \)": "8 ÷ (1 / 2)",
    r"\( \frac{\frac{1}{2}}{3} \)": "(1 / 2) / 3",
    r"\( \left(\frac{10,000}{100,000}\right) \times 200{,}000 \)": "(10,000 / 100,000) × 200,000",
    r"\( \frac{35 \text{ hours}}{5 \text{ days}} = 7 \)": "(35 hours) / (5 days) = 7",
    r"\( \frac{\text{Way}}{\text{Time}} \)": "Way / Time",
    r"It is \( \frac{3}{4} \text{ km} \), so": "It is 3 / 4 km, so",
    r"\( 10\,000 + 5\% \)": "10,000 + 5%",
    r"\( 12 \text{ cm}^2 \)": "12 cm^2",
    r"\( 3~\text{km} \)": "3 km",
    r"\( 2 : 3 \)": "2 : 3",
    r"\( \boxed{\frac{3}{4}} \)": r"\boxed{3/4}",
    r"\( \boxed{14} \) years": r"\boxed{14} years",
    "so:\n\n\\[\n2x = 4\n\\]\n\nNext": "so: 2x = 4\n\nNext",
    "so\n\\[ 2x = 4 \\]": "so\n2x = 4",
}  # fmt: skip
# To say these without LaTeX would say something else, or they are no formulas.
UNSAYABLE = [
    r"\( 2\frac{1}{2} \)", r"2\(\frac{1}{2}\)", r"2 \( \frac{1}{2} \)", r"\( \frac{1}{2}x \)", r"\(\frac{1}{2}\)x",
    r"\(3\)\(4\)", r"\(\frac{1}{2}\left[3+4\right]\)", r"\(\frac{n}{2}!\)", r"\(\frac{1}{2}\%\)", r"\(\frac{1}{2} \$40\)",
    r"\(\frac{1}{2} \text{base} \times \text{height}\)", r"\(3 \text{ feet } \frac{1}{2} \text{ inch}\)",
    r"\( \frac{1}{2} : \frac{1}{3} \)", r"\( \mathbf{a} \cdot \mathbf{b} \)", r"\( \left. x^2 \right| \)", r"\( \sqrt{2} \)",
    r"\( x^{2} \)", "\\[ a &= b \\\\ c &= d \\]", r"\( x \]", r"$$ a \\[4pt] b = 2 $$ so \] c", "It costs $5, or $6.",
    r"Run `find . \( -name a -o -name b \)`.", "```\n~~~\n\\( x \\)\n```", "````\n```\n\\( x \\)\n````",
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"), [*SAYABLE.items(), *zip(UNSAYABLE, UNSAYABLE, strict=True)]
)
def test_formulas_become_plain_text_where_that_says_the_same(before, after):
    assert notation.plain(before) == after
    assert notation.plain(after) == after


PARTS = st.sampled_from([
    r"\(", r"\)", r"\[", r"\]", r"\frac{1}{2}", r"\frac{", "}{", "}", r"\text{ km}", r"\times", "7", " ", "\n", ":", "x", "=",
    r"\boxed{3}", "`", "```", r"\\", "$", r"\,", "|",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=14).map("".join))
def test_plain_text_stays_as_it_is(text):
    once = notation.plain(text)
    assert "\0" not in once
    if "\\" not in once:
        assert notation.plain(once) == once


def test_the_plain_rewriter():
    draft = Original("t-1", "What is the change?", NUMBERED, 150, "What is the change?")
    [(_, rewrite)] = RulesRewriter(plain=True).rewrite([draft])
    assert rewrite.text == PLAIN
    assert verification.written(PLAIN) == verification.written(MERGED)


PLANNED = r"""To find the cost, we need to follow these steps:

1. Calculate the cost of the pens.
2. Add the cost of the paper.

First, we calculate the cost of the 7 pens:
\[
\text{Cost of pens} = \text{Number} \times \text{Price} = 7 \times 2 = 14
\]

Next, we add the paper:
\[ \text{Total} = 14 + 6 \]
So the total is \(\text{Total} = 14 + 6 = 20\), \(\boxed{20}\)."""

BRIEF = r"""First, we calculate the cost of the 7 pens:
\[ 7 \times 2 = 14 \]

Next, we add the paper:
\[ \text{Total} = 14 + 6 \]
So the total is \(\text{Total} = 14 + 6 = 20\), \(\boxed{20}\)."""


def test_the_plan_and_the_words_of_equations_go_and_the_rest_stays():
    assert shorten(PLANNED) == BRIEF == shorten(BRIEF)
    [(index, rewrite)] = BriefRewriter().rewrite([Original("p", "q", PLANNED, 99, "q")])
    assert (index, rewrite.text, rewrite.truncated) == (0, BRIEF, False)


@pytest.mark.parametrize(
    "text",
    [
        "To be quick, we use 5.\n\nWith it 2 + 2 = 4.",  # the only place of a number
        "To begin, we say 1 + 1 = 2.\n\nWith it 2 + 2 = 4.",
        "Given:\n- 3 pens\n\nFrom it 3 + 3 = 6.",
        "To begin with, Tom gives half of his 8 apples away.\n\nHe has 8 / 2 = 4.",
        "- Tom has 3 apples.\n- Ann has 4.\n\nTogether they have 3 + 4 = 7.",
        "Let's denote Ela's pounds as \\( x \\).\n\n\\[ 10 + x = 35 \\]",
        "We need a day, because there are 24 hours.\n\nThat is 24 = 24.",
        "To sum up, we say nothing.\n\nThe end.",
        "To solve it, we go on.\n\nNext, 2 + 2 = 4.",
        "To solve it, we add.\n\n\\[ 2 + 2 = 4 \\]",
        "1. Pens:\n\n   \\[ 3 = 3 \\]\n\n2. All:\n\n   \\[ 3 + 1 = 4 \\]",
        "Let's use Python:\n```python\nimport math\n\nx = 3\n```",
        "",
    ],
)
def test_what_says_more_than_a_plan_or_is_needed_stays(text):
    assert shorten(text) == text


@pytest.mark.parametrize(
    ("plan", "rest"),
    [
        ("Let's see.\n\n", "1. Take the 2.\n\n2. Add: 2 + 2 = 4."),
        ("To solve it, let’s count.\n\n", "```python\n\nx = 3\n```"),
        ("We need to follow these steps:\n\n1. Add the 7 pens.\n2. Divide it by 2.\n\n", "First, 7 / 2 = 3.5."),
        ("Here's the plan:\n\n- Add.\n\n- Divide.\n\n", "First, 7 / 2 = 3.5."),
    ],
)  # fmt: skip
def test_a_plan_goes(plan, rest):
    assert shorten(plan + rest) == rest


def test_a_list_that_is_no_plan_keeps_what_announces_it():
    text = "We need to do this:\n\n1. Tom has 3.\n2. Ann has 4.\n\nTogether 3 + 4 = 7."
    assert shorten(text) == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"\[ \frac{\text{Cost}}{\text{Wage}} = \frac{32}{8} = 4 \]", r"\[ \frac{32}{8} = 4 \]"),
        (r"\[ \text{a} = 1{,}000 = 10,000 \]", r"\[ 1{,}000 = 10,000 \]"),
        ("\\[\nC = 5 = 5\n\\]", r"\[ C = 5 = 5 \]"),  # a variable stays
        ("\\[\n\\text{a} = x = 2y\n\\]", r"\[ \text{a} = x = 2y \]"),  # and what it is
        (r"\[ 3 = 3 = \text{a} \]", None),  # it may be the answer
        (r"\[ \text{24 eggs} = 24 = 2 \times 12 \]", None),
        (r"\[ 3 \text{ pens} \times 2 = 6 = 6 \]", None),
        (r"\[ \text{a} = 5, \text{b} = 6 = 6 \]", None),  # two equations
        (r"\[ \text{a} = 2 + 2 \quad \text{b} = 4 \]", None),
        (r"\[ \text{if a = b} = 4 = 4 \]", None),
        (r"\[ (\text{a} = 2 + 2 = 4) \]", None),
        (r"\[ \text{a} = 4 \]", None),
        ("\\[\n\\text{a} = 2 + 2 = 4 % so\n\\]", None),
        (r"\[ x==3 \]", None),
        (r"\(\text{a} = 2 + 2 = 4\)", None),
        ("\\[ \\text{a} = 2 + 2 = 4 \\]\n\\[ \\text{b} = 4 + 4 = 8 \\]", None),  # told apart by them
        ("\\[ \\text{a} = 2 + 2 = 4 \\]\nThus \\[ 4 \\times \\text{a} = 4 \\times 4 = 16 \\]", None),
        ("```\n\\[ \\text{a} = 2 + 2 = 4 \\]\n```", None),
    ],
)  # fmt: skip
def test_words_leave_an_equation_only_if_nothing_is_lost(before, after):
    made = before if after is None else after
    assert notation.without_words(before) == made == notation.without_words(made)


@pytest.mark.parametrize(
    "piece", ["To add\n\n", "To add we " + " " * 99, "\\[ \\text{a} = 2", "1. Add\n"]
)
def test_a_long_text_is_shortened_in_time(piece):
    assert shorten(piece * (200_000 // len(piece)) + "b = 3")


def test_a_title_ends_no_sentence():
    text = (
        "To find what Mrs. Smith needs, follow these steps:\n\nShe has 2+3=5.\n\nSo Mr. Poe has 5."
    )
    assert merge_steps(text).startswith("She has 2+3=5.")
    assert "Mrs. First" not in merge_steps(
        "What Mrs. Smith needs is found in the following steps:\n\nFirst, 2+3=5.\n\n6=6"
    )


LINES = st.sampled_from([
    "To find it, follow these steps:", "1. Add.", "2. 3+4=7", "So it is 7.", "x", "", "",
    "**Step 2:** go on", r"\[", r"5 \times 2 = 10", r"\]", "```", "That makes 10.", "#### 7",
    "From step 2 we get 8.", "- 12 eggs", "Then 7 is 7. Thus 3.", "---",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, max_size=12).map("\n".join))
def test_nothing_is_invented_and_no_calculation_lost(text):
    dense = merge_steps(text)
    assert len(split_steps(dense)) <= len(split_steps(text))
    assert verification.written(dense) <= verification.given(text)
    for line in text.splitlines():
        if "=" in line or "####" in line:
            assert line.removeprefix("2. ") in dense
    assert set(dense.split()) - {":"} <= {
        w.rstrip(".:") + e for w in text.split() for e in ("", ".", ":")
    }


# a file


def test_rewrites_from_a_file_by_id_then_by_question(tmp_path):
    lines = [
        {"id": "t-1", "rewrite": "by id"},
        {"question": "Question 1?", "positive": "by question"},
        {"doc": {"question": " Question 0? "}, "resp_after": ["of the reference"]},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rewriter = FileRewriter(tmp_path / "r.jsonl")
    found = list(rewriter.rewrite(originals()))
    assert found == [(0, Rewrite("of the reference")), (1, Rewrite("by id")), (2, None)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"rewrite": "x"}], "line 1: expected a field id or question"),
        ([{"id": 1}], "line 1: expected a field rewrite or positive"),
        ([{"id": 1, "rewrite": "a"}, {"id": "1", "rewrite": "b"}], "line 2: another rewrite"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, lines, message):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=message):
        FileRewriter(tmp_path / "r.jsonl")


def test_a_files_name_is_that_of_its_rewrites(tmp_path):
    lines = [{"id": "t-1", "rewrite": "a"}, {"id": "t-2", "rewrite": "b"}]
    names = []
    for folder, kept in (("0", lines), ("1", lines[::-1]), ("2", lines[:1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.jsonl").write_text("\n".join(map(json.dumps, kept)))
        names.append(FileRewriter(tmp_path / folder / "r.jsonl").name)
    assert names[0] == names[1] != names[2] and names[0].startswith("file:r.jsonl ")


def test_half_a_surrogate_pair_in_a_file_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": "t-1", "rewrite": "abc \ud83d"}))
    with pytest.raises(InputError, match="line 1: is not JSON .*surrogate pair"):
        FileRewriter(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("text", "whole"),
    [("abc \ud83d = 3", "abc \ufffd = 3"), ("\udc00\ud800", "\ufffd\ufffd"),
     ("\ud83d\ude00", "\U0001f600"), ("\ufeffä \U0001f600", "\ufeffä \U0001f600"), ("", "")],
)  # fmt: skip
def test_a_rewrite_has_whole_characters(text, whole):
    assert Rewrite(text).text == whole


# a model


def test_the_request_holds_problem_and_solution():
    original = originals(steps=9)[1]
    text = request(original)
    assert "Question 1?" in text and original.response in text and "3 paragraphs" in text
    assert "one paragraph" in request(originals()[1])


@pytest.mark.parametrize(
    ("said", "rewrite"),
    [
        ("  2+2=4. \n", "2+2=4."),
        ("Here is the denser solution:\n\n2+2=4.", "2+2=4."),
        ("Sure! Here it is:\n2+2=4.", "2+2=4."),
        ("**Here** we add: 2+2=4.", "**Here** we add: 2+2=4."),
        ("Here we add 2 and 2: 2+2=4.", "Here we add 2 and 2: 2+2=4."),
        ("```markdown\n2+2=4.\n```", "2+2=4."),
        ("<think>Let me see.\n\n5</think>\n\n2+2=4.", "2+2=4."),
    ],
)
def test_what_a_chat_model_says_around_it_goes(said, rewrite):
    assert read_answer(said) == rewrite


def test_a_local_model_is_asked_for_every_rewrite(hf_folder):
    from mlx_densesteer.extraction.rewriting.model import ModelRewriter
    from mlx_densesteer.generation.stream import generate
    from mlx_densesteer.model.model import load

    model, tokenizer = load(hf_folder)
    model.set_dtype(mx.float32)
    model.args.max_position_embeddings = 1024  # a token is a byte here
    rewriter = ModelRewriter(model, tokenizer, "tiny", rows=2)
    found = dict(rewriter.rewrite(originals()))
    assert sorted(found) == [0, 1, 2] and rewriter.name.startswith("mlx:tiny ")
    for index, original in enumerate(originals()):
        alone = generate(model, tokenizer, request(original), system=SYSTEM, max_tokens=9 + 2 + 64)
        assert found[index] == Rewrite(read_answer(alone.text), alone.finish_reason == "length")


def test_the_target_answers_again_under_an_instruction(hf_folder):
    from mlx_densesteer.extraction.rewriting.model import InstructionRewriter
    from mlx_densesteer.generation.stream import generate
    from mlx_densesteer.model.model import load

    model = load(hf_folder)
    model.network.set_dtype(mx.float32)
    names = []
    for system, whole in ((None, "Be brief."), ("Count.", "Count.\n\nBe brief.")):
        rewriter = InstructionRewriter(model, "Be brief.", system=system, rows=2)
        names.append(rewriter.name)
        found = dict(rewriter.rewrite(originals()))
        assert sorted(found) == [0, 1, 2]
        for index, original in enumerate(originals()):
            alone = generate(model, original.prompt, system=whole, max_tokens=9 + 2 + 64)
            assert found[index] == Rewrite(alone.text, alone.finish_reason == "length")
    names.append(InstructionRewriter(model, "Be short.").name)
    assert len(set(names)) == 3 and names[0].startswith("instruction:Be brief. ")
    too_long = Original("t", "?", "A.\n\nB.", 9, "word " * model.context)
    assert dict(rewriter.rewrite([too_long])) == {0: None}


def test_each_precision_of_a_model_is_another_rewriter(hf_folder):
    import mlx.nn as nn

    from mlx_densesteer.extraction.rewriting.model import ModelRewriter
    from mlx_densesteer.model.model import load

    model, tokenizer = load(hf_folder)
    names = []
    for dtype in (mx.float32, mx.bfloat16):
        model.set_dtype(dtype)
        names.append(ModelRewriter(model, tokenizer, "tiny").name)
    for bits in (8, 4):
        model, tokenizer = load(hf_folder)
        nn.quantize(model, group_size=32, bits=bits)
        names.append(ModelRewriter(model, tokenizer, "tiny").name)
    assert len(set(names)) == 4 and len({name.split()[1] for name in names}) == 1
    assert "float32" in names[0] and "4-bit" in names[3]


# an endpoint

QUICK = {"timeout": 5, "attempts": 4, "at_once": 1}


def ask(server, count=1, **options):
    return list(OpenAIRewriter(f"{server.url}#m", **QUICK | options).rewrite(originals(count)))


def test_an_endpoint_gets_the_request_and_the_key():
    with ChatServer(lambda text: "Here is it:\n\n" + text[-3:]) as server:
        found = ask(server, 3, key="sk-secret", fields={"temperature": 0})
    assert found == [(i, Rewrite(f"C{i}.")) for i in range(3)]
    body = server.bodies[0]
    assert body["model"] == "m" and body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_without_the_client_the_extra_is_named(monkeypatch):
    name = "mlx_densesteer.extraction.rewriting.openai"
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=re.escape(install_command("rewrite"))):
        importlib.import_module(name)


def test_no_key_no_header_and_a_cut_off_rewrite_is_marked():
    with ChatServer() as server:
        server.finish_reason = "length"
        assert ask(server) == [(0, Rewrite("One step.", truncated=True))]
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("fate", [429, 500, 503, 408, 409, "drop"])
def test_what_may_pass_is_tried_again(fate):
    with ChatServer() as server:
        server.plan = [fate, fate]
        assert ask(server) == [(0, Rewrite("One step."))]
        assert len(server.bodies) == 3


def test_a_server_that_hangs_is_given_up_and_asked_again():
    with ChatServer() as server:
        server.plan = ["hang"]
        assert ask(server, timeout=0.2) == [(0, Rewrite("One step."))]


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize(
    "body",
    [b"", b'{"choices": [', b"[1]", b"[" * 60000, b"{}", b'{"choices": []}',
     b'{"choices": [{"message": {"content": [1]}}]}'],
)  # fmt: skip
def test_an_answer_that_is_no_chat_completion(body, kind):
    with ChatServer() as server:
        server.plan = [(200, {"Content-Type": kind}, body)]
        with pytest.raises(InputError, match="found '.*', expected a chat completion"):
            ask(server)
        assert len(server.bodies) == 1


def test_half_a_surrogate_pair_in_an_answer_is_repaired():
    with ChatServer(lambda text: "abc \ud83d = 3") as server:
        assert ask(server) == [(0, Rewrite("abc \ufffd = 3"))]


@pytest.mark.parametrize(
    ("body", "shown"),
    [(b"[" * 60000, r"\[\[\["), (b'{"error": {"message": null}}', "None"), (b"[1]", r"\[1\]"),
     (b'{"error": "half \\ud83d"}', "half \ufffd"), (b"", "Bad Request")],
)  # fmt: skip
def test_whatever_an_error_says_it_is_told(body, shown):
    with ChatServer() as server:
        server.plan = [(400, {}, body)]
        with pytest.raises(InputError, match=f"refuses: 400.*{shown}"):
            ask(server)


@pytest.mark.parametrize(
    "limits",
    [{"timeout": math.inf}, {"timeout": math.nan}, {"timeout": 0}, {"timeout": 1e10},
     {"per_minute": math.inf}, {"per_minute": math.nan}, {"per_minute": 1e-300}, {"per_minute": -1},
     {"attempts": 0}, {"at_once": 0}],
)  # fmt: skip
def test_limits_that_cannot_be(limits):
    with pytest.raises(InputError, match="expected"):
        OpenAIRewriter("http://127.0.0.1:1/v1#m", **limits)


def test_the_last_attempt_tells_what_happened():
    with ChatServer() as server:
        server.plan = [500] * 9
        with pytest.raises(InputError, match=r"no rewrite in up to 4 attempts .*500.*no luck"):
            ask(server)
        assert len(server.bodies) == 4
    with pytest.raises(InputError, match="no rewrite in up to 2 attempts"):
        ask(server, attempts=2)  # nobody there


@pytest.mark.parametrize("retry_after", ["1", "date"])
def test_retry_after_is_honoured(retry_after):
    if retry_after == "date":
        retry_after = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    with ChatServer() as server:
        server.plan = [(429, {"Retry-After": retry_after})]
        assert ask(server) == [(0, Rewrite("One step."))]
        assert server.times[1] - server.times[0] > 0.9  # its own pause is half a second


def test_a_server_that_wants_an_hour_is_told_about():
    with ChatServer() as server:
        server.plan = [(429, {"Retry-After": "3600"})]
        with pytest.raises(InputError, match="wait for 3600 s"):
            ask(server)


@pytest.mark.parametrize("status", [400, 401, 403, 404, "redirect"])
def test_a_refusal_is_final_and_hides_the_key(status):
    with ChatServer() as server:
        server.plan = [status]
        with pytest.raises(InputError, match="refuses: (no|3|4)") as caught:
            ask(server, key="sk-secret")
        assert len(server.bodies) == 1
    assert "sk-secret" not in str(caught.value)
    if status != "redirect":
        assert "no luck, Bearer [OPENAI_API_KEY]" in str(caught.value)


def test_rewrites_that_came_before_a_refusal_are_not_lost():
    with ChatServer() as server:
        server.plan = [200, 200, 401]
        found = []
        with pytest.raises(InputError, match="401"):
            for one in OpenAIRewriter(f"{server.url}#m", **QUICK).rewrite(originals(5)):
                found.append(one)
        assert [index for index, _ in found] == [0, 1] and len(server.bodies) == 3


def test_requests_run_together_but_not_more_than_asked_for():
    with ChatServer() as server:
        server.slow = 0.1
        found = ask(server, 9, at_once=3)
        assert sorted(index for index, _ in found) == list(range(9))
        assert server.most == 3


def test_a_limit_of_requests_per_minute():
    with ChatServer() as server:
        began = time.monotonic()
        ask(server, 4, at_once=4, per_minute=600)
        # three gaps of 0.1 s; a busy machine only adds to them
        assert len(server.times) == 4 and max(server.times) - began > 0.28


@pytest.mark.parametrize(
    "address",
    ["x", "http://host/v1", "ftp://host/v1#m", "http://u:p@host/v1#m", "http://a b/v1#m",
     "http://host:port/v1#m", "#m", "http://host/v1?key=sk-query", "http://h/v1?key=sk-query \x7f#m",
     "http://h:port/?key=sk-query#m", "http://host/ä?key=sk-query#m", "ftp://h/v1?key=sk-query#m"],
)  # fmt: skip
def test_addresses_that_cannot_be(address):
    with pytest.raises(InputError, match="^openai:") as caught:
        OpenAIRewriter(address)
    assert "sk-query" not in str(caught.value)


def test_a_refusal_hides_the_query():
    with ChatServer() as server:
        rewriter = OpenAIRewriter(f"{server.url}?key=sk-query#m", **QUICK)
        for body in (b"", b"no such page: /v1/chat/completions?key=sk-query"):
            server.plan = [(404, {}, body)]
            with pytest.raises(InputError, match=f"the model: openai:{server.url}") as caught:
                list(rewriter.rewrite(originals(1)))
            assert "sk-query" not in str(caught.value)


def test_a_key_over_plain_http_to_another_host_is_warned_of():
    said = []
    OpenAIRewriter("http://example.org/v1#m", key="sk-secret", warn=said.append)
    assert len(said) == 1 and "example.org" in said[0] and "sk-secret" not in said[0]
    for address, key in [("http://127.0.0.1:1/v1#m", "k"), ("https://example.org#m", "k"),
                         ("http://example.org#m", None)]:  # fmt: skip
        OpenAIRewriter(address, key=key, warn=said.append)
    assert len(said) == 1


def test_a_key_that_cannot_be_sent_is_not_shown():
    with pytest.raises(InputError) as caught:
        OpenAIRewriter("http://127.0.0.1:1/v1#m", key="sk-se\ncret")
    assert "cret" not in str(caught.value).replace("secret", "")


def test_names_tell_rewriters_apart_and_hide_the_query():
    name = OpenAIRewriter("https://host/v1/?api-key=x#m").name
    assert name.startswith("openai:https://host/v1#m ") and "api-key" not in name
    other = OpenAIRewriter("https://host/v1#m", fields={"temperature": 1}).name
    colder = OpenAIRewriter("https://host/v1#m", fields={"temperature": 0}).name
    assert len({name, other, colder, RulesRewriter().name, BriefRewriter().name}) == 5


def test_a_name_has_no_value_of_a_field():
    fields = {"api_key": "sk-field", "extra": {"token": "sk-inner"}}
    name = OpenAIRewriter("https://host/v1#m", fields=fields).name
    assert "api_key,extra" in name and "sk-" not in name
