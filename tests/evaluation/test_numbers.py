"""The reader of numbers: what a response answers, by a table of verdicts, and hostile text."""

import random
import subprocess
import sys
from fractions import Fraction

import pytest

from mlx_densesteer.evaluation import grading
from mlx_densesteer.evaluation.grading import Grade, grade, last_boxed
from mlx_densesteer.evaluation.numbers import last_number, read_number, read_only_number, tidy
from mlx_densesteer.evaluation.tasks import Problem


def ask(rule: str, gold: str, response: str) -> Grade:
    return grade(Problem("p-0", "question", "prompt", gold, rule), response)


# Rule "number": response, gold answer, verdict.
PROSE = [
    # thousands
    ("So she has 9500.", "9500", True),
    ("So she has 9,500.", "9500", True),
    ("So she has 9{,}500.", "9500", True),
    ("So she has 9{,}500.", "500", False),
    (r"\boxed{9{,}500}", "9500", True),
    (r"\boxed{9{,}500}", "500", False),
    (r"It is \(1{,}234{,}567\).", "1234567", True),
    (r"It is 9\,500", "9500", True),
    (r"It is 9\,500", "500", False),
    (r"It is 9,\!500", "9500", True),
    (r"It is 11,\! 111,\! 100", "11111100", True),
    (r"It is 9\;500", "9500", True),
    (r"It is 9\ 500", "9500", True),
    ("It is 9~500", "9500", True),
    ("It is 9\u00a0500 stones", "9500", True),
    ("It is 9\u2009500 stones", "9500", True),
    ("It is 9\u202f500 stones", "9500", True),
    ("It is 9\u202f500 stones", "500", False),
    ("It is 9 500", "9500", True),
    ("It is 9 500", "500", False),
    ("It is 9'500", "9500", True),
    ("It is 9\u2019500.50", "9500.5", True),
    ("It is 1'234'567", "567", False),
    ("It is 12,34,567 rupees", "1234567", True),
    ("It is 1.234.567", "1234567", True),
    ("It is 1.234.567,89", "1234567.89", True),
    ("It is 1,234,567.89", "1234567.89", True),
    ("It is 1_000_000", "1000000", True),
    ("It is 10 000,50 euros", "10000.5", False),
    ("It is 10 000.50 euros", "10000.5", True),
    ("It is 0.123\u2009456", "0.123456", True),
    ("In 2023 100 people came", "100", True),
    ("In 2023 100 people came", "2023100", False),
    # decimals
    ("It costs 3,50 euros", "3.5", False),
    ("It costs 3,50 euros", "50", False),
    ("It costs 3,50 euros", "350", False),
    (r"It costs 3{,}5", "3.5", True),
    (r"It is 0{,}125", "0.125", True),
    ("It is 0,125", "0.125", False),
    ("It is 1.234,5,6", "1234.5", False),
    ("The pair is 3,4", "3.4", False),
    ("The pair is (3,4)", "3.4", False),
    (r"\boxed{(3,4)}", "3.4", False),
    (r"\boxed{3,4}", "3.4", False),
    (r"\boxed{(1,2,3)}", "3", False),
    ("x between 3,7", "3.7", False),
    ("It is 1.234,5 euros", "1234.5", True),
    ("It is 1.234", "1.234", True),
    ("It is 1.234", "1234", False),
    ("It is 12,5", "5", False),
    ("1, 2, 3", "3", True),
    ("1,2,3", "3", False),
    ("1,2,3", "123", False),
    ("It is .75", "0.75", True),
    ("It is 72.00", "72", True),
    ("It is 72.", "72", True),
    ("It is 72...", "72", True),
    ("It is 072", "72", True),
    ("It is 7.2", "72", False),
    # signs
    ("The change is -5", "-5", True),
    ("The change is -5", "5", False),
    ("The change is \u22125", "-5", True),
    ("The change is \u22125", "5", False),
    ("The change is \u20135", "-5", True),
    ("x = - 5", "-5", True),
    ("The change is -$5", "-5", True),
    ("The change is $-5", "-5", True),
    ("The change is negative 5", "-5", True),
    ("The change is +5", "5", True),
    ("The answer is:\n- 5 apples", "5", True),
    ("The answer is:\n- 5 apples", "-5", False),
    ("so 12 - 7 is 5", "5", True),
    ("COVID-19", "-19", False),
    ("He lost it all ($500)", "500", True),
    ("He lost it all ($500)", "-500", False),
    ("It is \u00b15", "5", False),
    # currencies and units
    ("She pays $45.", "45", True),
    (r"She pays \$45.", "45", True),
    ("She pays 45\u20ac", "45", True),
    ("She pays \u20ac45", "45", True),
    ("She pays \u00a345.50", "45.5", True),
    ("She pays USD 45", "45", True),
    ("She pays USD45", "45", True),
    ("She pays Rs. 45", "45", True),
    ("\uff0445", "45", True),
    ("The area is 45 m^2", "45", True),
    ("The area is 45 m^2", "2", False),
    ("The area is 45 m\u00b2", "45", True),
    (r"The area is 45 \text{ cm}^2", "45", True),
    (r"The area is 45 \text{ cm}^{2}", "2", False),
    ("The area is 45 cm2", "45", True),
    (r"It runs at 45 m\cdot s^{-1}", "45", True),
    ("45 km/h", "45", True),
    ("45%", "45", True),
    (r"45\%", "45", True),
    (r"45 \%", "0.45", True),
    ("45 percent", "0.45", True),
    ("0.45", "45%", True),
    ("0.5%", "0.5", False),
    ("0.5%", "0.005", True),
    ("45\u00b0", "45", True),
    (r"45^\circ", "45", True),
    ("45 per person", "45", True),
    # scales
    (r"\boxed{3.5 million}", "3500000", True),
    (r"\boxed{3.5 million}", "3.5", False),
    (r"\boxed{3.5\text{ million}}", "3500000", True),
    (r"\boxed{\$3.5\ \text{million dollars}}", "3500000", True),
    ("It is 3.5 million people", "3500000", True),
    ("It is 3.5 million people", "3.5", False),
    ("It lost -$3 Billion.", "-3000000000", True),
    ("It is 2~trillion", "2e12", True),
    ("It is 3 hundred thousand", "300000", True),
    ("It is 3 hundred thousand", "300", False),
    (r"\frac{1}{2} million", "500000", True),
    ("2 dozen", "24", True),
    ("2 dozens of eggs", "24", True),
    ("2 dozen", "2", False),
    ("5 hundred-dollar bills", "5", True),
    ("5 thousandths", "5000", False),
    ("5 thousandths", "5", False),
    (r"\boxed{5 \text{ hundredths}}", "5", False),
    ("It is $3.5$ million", "3500000", True),
    ("It is **3.5** million", "3500000", True),
    (r"It is \(3.5\) million", "3500000", True),
    ("9" * 5000 + " million", "9" * 5000, False),
    # fractions, powers
    ("1/2", "0.5", True),
    ("1/2", "2", False),
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac{1}{2}", "1/2", True),
    (r"\tfrac12", "0.5", True),
    (r"\frac{1}{2}", "2", False),
    (r"-\frac{1}{2}", "-0.5", True),
    (r"3\frac{1}{2}", "3.5", True),
    ("3 1/2", "3.5", True),
    ("3 and 1/2 cups", "3.5", True),
    ("3\u00bd", "3.5", True),
    ("\u00bd", "0.5", True),
    ("\u00b9\u2044\u2082", "0.5", True),
    ("so 48/2", "24", True),
    ("so 48/2 = 24", "24", True),
    ("so 1/0", "0", False),
    (r"\frac{\pi}{2}", "2", False),
    (r"1.5 \times 10^3", "1500", True),
    (r"1.5 \times 10^{3}", "3", False),
    (r"1.5 \cdot 10^3", "1500", True),
    ("1.5 \u00d7 10\u00b3", "1500", True),
    ("1.5e3", "1500", True),
    ("1.5E-3", "0.0015", True),
    ("2^{10}", "1024", True),
    ("2^{10}", "10", False),
    ("10\u00b3", "1000", True),
    ("x^2", "2", False),
    (r"\sqrt{16}", "16", False),
    (r"36\pi", "36", False),
    # no numbers
    ("at 3:30", "30", False),
    ("at 3:30", "3.5", False),
    ("the ratio is 2:3", "3", False),
    ("on 2024-05-01", "1", False),
    ("on 5/12/2024", "2024", False),
    ("5-7 apples", "7", False),
    ("5\u20137 apples", "7", False),
    ("5-7 apples", "-7", False),
    ("$5-$7", "7", False),
    ("$5-$7", "5", False),
    ("5 to 7", "7", False),
    ("$5 to $7", "7", False),
    ("It rose from 5 to 7", "7", True),
    (r"\boxed{5 \text{ to } 7}", "7", False),
    (r"\boxed{5 \text{ or more}}", "5", False),
    ("5 or more", "5", False),
    ("No.42", "42", True),
    ("version 1.2.3", "3", False),
    ("no idea", "5", False),
    ("", "0", False),
    # other scripts, exactness
    ("\uff11\uff15", "15", True),
    ("\uff11\uff0c\uff15\uff10\uff10", "1500", True),
    ("\uff08\uff11\uff15\uff09", "15", True),
    ("\uff11\uff10\uff10\uff5e\uff12\uff10\uff10", "100200", False),
    ("\u0661\u0662", "12", True),
    ("9007199254740993", "9007199254740993", True),
    ("9007199254740993", "9007199254740992", False),
    ("9,007,199,254,740,993", "9007199254740993", True),
    ("0.1", "0.10000000000000000001", False),
    ("0.333", "1/3", False),
    ("9" * 5000, "9" * 5000, True),
    ("9" * 5000, "9" * 4999 + "8", False),
    # where the answer stands
    ("**42**", "42", True),
    ("__42__", "42", True),
    ("The answer is 42.", "42", True),
    ("Answer: $42$", "42", True),
    ("$$42$$", "42", True),
    ("#### 42", "42", True),
    ("#### 42 stones", "42", True),
    ("<b>42</b>", "42", True),
    ("| total | 42 |", "42", True),
    (r"\boxed{42} clips in 2 months", "42", True),
    (r"\boxed{42} clips in 2 months", "2", False),
    (r"\boxed{40}, no, \boxed{42}", "42", True),
    (r"\boxed{40}, no, \boxed{42}", "40", False),
    (r"\boxed{42} and \boxed{}", "42", True),
    (r"\boxed{42} and \boxed{4", "42", True),
    (r"\boxed{\boxed{42}}", "42", True),
    (r"\boxed{x = 42}", "42", True),
    (r"\boxed{40 + 2 = 42}", "42", True),
    (r"\boxed{42 \text{ clips}}", "42", True),
    (r"\boxed{42 \text{ m}^2}", "42", True),
    (r"\boxed{\text{She sold 42 clips}}", "42", True),
    (r"\boxed{\textbf{42}}", "42", True),
    (r"\boxed{\$42}", "42", True),
    (r"\boxed{\text{\$42.00}}", "42", True),
    (r"\boxed{42}\%", "42", True),
    (r"\boxed{42\,\text{cm}^3}", "42", True),
    (r"\boxed{4.2\times10^{1}}", "42", True),
    (r"\boxed{42 \text{ or } 43}", "43", False),
    (r"\boxed{3, 4}", "4", False),
    (r"\boxed{x = 3, y = 4}", "4", False),
    (r"\boxed{\text{Total for 3 days} = 42}", "42", True),
    (r"\boxed{9,500 + 500 = 10,000}", "10000", True),
    (r"\boxed 42", "42", True),
    (r"\boxed{36\pi}", "36", False),
    (r"\boxed{\text{yes}}, 42", "42", True),
]  # fmt: skip

# Rule "boxed": content of the box, gold answer, verdict; the last also without math-verify.
BOXES = [
    (r"9{,}500", "9500", True, True),
    (r"9{,}500", "500", False, False),
    ("9500", r"9{,}500", True, True),
    (r"9\,500", "9500", True, True),
    ("9 500", "9500", True, True),
    ("9\u202f500", "9500", True, True),
    ("9,500", "9500", True, True),
    ("9'500", "9500", True, True),
    (r"11\,111{,}111", r"11,\!111,\!111", True, True),
    ("1_000", "1000", True, True),
    (r"\$9{,}500", r"\$9500", True, True),
    ("\u20ac10", "10", True, True),
    ("10\u20ac", "10", True, True),
    (r"\text{USD } 10", "10", True, True),
    ("\u22125", "-5", True, True),
    ("\u22125", "5", False, False),
    ("\uff11\uff15", "15", True, True),
    ("\u00bd", r"\frac{1}{2}", True, True),
    ("3\u00bd", r"\frac72", True, True),
    ("1 1/2", "1.5", True, True),
    (r"1\frac{1}{2}", r"\frac{3}{2}", True, True),
    (r"\dfrac{14}{3}", r"\frac{14}{3}", True, True),
    (r"\cfrac{14}{3}", "14/3", True, True),
    (r"\frac{-14}{3}", r"-\frac{14}{3}", True, True),
    (r"\frac{14}{-3}", r"-\frac{14}{3}", True, True),
    ("4.67", r"\frac{14}{3}", False, False),
    ("0.3333333333", r"\frac13", False, False),
    ("0.5", r"\frac{1}{2}", True, True),
    (r"50\%", r"\frac{1}{2}", True, True),
    (r"50\%", "50", True, True),
    ("50", r"50\%", True, True),
    (r"0.5\%", "0.5", False, False),
    (r"5\text{ cm}^2", "5", True, True),
    (r"5\,\mathrm{cm}^{2}", "5", True, True),
    ("5 cm", "5", True, True),
    ("5 cm^2", "5", True, True),
    ("5 dollars", "5", True, True),
    (r"5\ \text{m}\cdot\text{s}^{-1}", "5", True, True),
    ("5 m/s", "5", True, True),
    ("3.5 million", "3500000", True, True),
    (r"3.5\text{ million}", "3.5", False, False),
    (r"3.5\text{ million dollars}", "3500000", True, True),
    ("3500000", r"3.5 \text{ million}", True, True),
    ("2 dozen", "2", False, False),
    ("5x", "5", False, False),
    ("5", "5x", False, False),
    ("5 xy", "5", False, False),
    (r"5\pi", "5", False, False),
    (r"5\sqrt{2}", "5", False, False),
    ("5i", "5", False, False),
    ("5^2", "5", False, False),
    ("5^2", "25", True, True),
    (r"10^{10}", "10000000000", True, True),
    (r"1.5 \times 10^{3}", "1500", True, True),
    ("1.5e3", "1500", True, True),
    (r"45^\circ", "45", True, True),
    ("45\u00b0", "45", True, True),
    (r"45 \text{ degrees}", r"45^{\circ}", True, True),
    (r"\mathbf{5}", "5", True, True),
    (r"\textbf{5}", "5", True, True),
    ("**5**", "5", True, True),
    ("$5$", "5", True, True),
    (r"\(5\)", "5", True, True),
    ("5.", "5", True, True),
    ("005", "5", True, True),
    ("+5", "5", True, True),
    ("-0", "0", True, True),
    (r"\left(5\right)", "5", True, False),
    ("x = 5", "5", True, True),
    ("AB = 5", "5", True, True),
    ("3 + 2 = 5", "5", True, True),
    (r"x \neq 5", "5", False, False),
    (r"x \le 5", "5", False, False),
    ("x=1, y=2", "2", False, False),
    ("6x - 7y + 4 = 0", "5x - 7y + 4 = 0", False, False),
    (r"\angle ABC = 45^\circ", "45", True, True),
    ("f(2) = 5", "5", True, True),
    (r"\text{Area} = 5\text{ cm}^2", "5", True, True),
    (r"\(x+1\)", "x+1", True, True),
    (r"\displaystyle x+1", "x+1", True, True),
    (r"\(\frac{1}{2}\)", "0.5", True, True),
    ("2", "x=1, y=2", False, False),
    (r"\pm 5", "5", False, False),
    (r"5 \text{ or } 6", "5", False, False),
    ("5,6", "5.6", False, False),
    ("1,2", "1.2", False, False),
    ("3:30", "3:30", True, True),
    ("3:30", "30", False, False),
    ("9007199254740993", "9007199254740993", True, True),
    ("9007199254740992", "9007199254740993", False, False),
    ("1" * 5000, "1" * 5000, True, True),
    ("1" * 5000, "1" * 4999 + "2", False, False),
    ("(1,200)", "(1,200)", True, True),
    ("(1200)", "(1,200)", False, False),
    (r"(9{,}500, 3)", "(9500,3)", True, True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True, True),
    ("(3,4]", "(3,4)", False, False),
    (r"[3, 4]", "[3,4]", True, True),
    (r"\{1,2\}", r"\{2,1\}", True, False),
    (r"\{1,2\}", r"\{1,2,3\}", False, False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", False, False),
    (r"\begin{pmatrix} 1 \\ 200 \end{pmatrix}", r"\begin{pmatrix}1200\end{pmatrix}", False, False),
    (r"\text{(C)}", r"\text{(C)}", True, True),
    (r"\text{(B)}", r"\text{(C)}", False, False),
    ("\u2212\\sqrt{2}", r"-\sqrt{2}", True, True),
    ("x\u00b2", "x^2", True, False),
    ("52_8", "52_8", True, True),
    ("52_8", "528", False, False),
    ("204_7", "204_5", False, False),
    ("1011_{10}", "1011_2", False, False),
    ("204_{5}", "204_5", True, False),
    (r"\textcolor{blue}{45}", "45", True, True),
    (r"\color{blue}45", "45", True, True),
    (r"\color{blue}{\frac{1}{2}}", "0.5", True, True),
    (r"\textcolor{red}{x+1}", "x+1", True, True),
]  # fmt: skip


@pytest.fixture
def without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)


@pytest.mark.parametrize(("response", "gold", "correct"), PROSE)
def test_the_verdict_on_a_response(response, gold, correct):
    assert ask("number", gold, response).correct is correct


@pytest.mark.parametrize(("content", "gold", "correct", "alone"), BOXES)
def test_the_verdict_on_a_box(content, gold, correct, alone):
    pytest.importorskip("math_verify", reason="needs the extra eval")
    assert ask("boxed", gold, f"So $\\boxed{{{content}}}$.").correct is correct


@pytest.mark.parametrize(("content", "gold", "correct", "alone"), BOXES)
def test_the_verdict_without_math_verify(content, gold, correct, alone, without_math_verify):
    assert ask("boxed", gold, f"So $\\boxed{{{content}}}$.").correct is alone


def test_a_scale_is_a_unit_where_the_question_asks_for_it():
    """GSM8K has such gold answers: "How many dozens of eggs will she eat?" 7."""
    problem = Problem("p-0", "How many dozen?", "prompt", "7", "number")
    assert grade(problem, "7 dozen eggs").correct and grade(problem, "7").correct
    assert not grade(problem, "7 thousand eggs").correct
    boxed = Problem("p-0", "How many Million?", "prompt", "4", "boxed")
    assert grade(boxed, r"\boxed{4 \text{ million}}").correct


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", Fraction(2469, 2)),
        (r"-\tfrac{3}{4}", Fraction(-3, 4)),
        ("2e-2", Fraction(1, 50)),
        ("1e999999999", None),
        ("9^{9999}", None),
        ("2^{-2}", Fraction(1, 4)),
        ("0^{-1}", None),
        (r"\frac{1}{0}", None),
        ("5 apples and 3 pears", None),
    ],
)
def test_the_value_of_a_number(text, value):
    number = read_number(text)
    assert (number.value if number else None) == value


def test_what_is_found_says_why_it_is_not_right():
    assert last_number("See you at 3:30.").text == "3:30"
    assert read_only_number(r"3 \text{ or } 4").text == r"3 \text{ or } 4"
    assert read_only_number("none") is None and last_number("none") is None


def test_verification_reads_prose_without_guessing_at_spaces():
    assert tidy("2 500 mL bottles") == "2 500 mL bottles"
    assert tidy("2 500", spaces=True) == "2500"
    assert tidy("9\u202f500 and 3{,}5 m\u00b2, \uff14") == "9500 and 3.5 m^{2}, 4"


HOSTILE = [
    "1", "{", "}", r"\boxed{", r"\boxed{}", "1 ", "x1 ", "1.", "-1", ",111", r"\,111", "\u2009111",
    "1{,}", " ", r"\frac", r"\frac{1}{2}", r"\frac{", r"\text{", "$", "1%", "1^", "^1", "9^9", "1e9",
    "\\", "\u00bd", "\u00b2", "\u0661", "1'", "**1", "=1", "1 1/2", "1/", r"\boxed 1", "1 and ",
    r"1\times 10^9", "- ", "0", "1 million ", r"1\text{ dozen", "5 to ",
]  # fmt: skip
GRADE = """
import sys
from mlx_densesteer.evaluation import grading
from mlx_densesteer.evaluation.tasks import Problem
grading.agree = lambda gold, answer: None
text = sys.stdin.read()
for response in text, "\\\\boxed{" + text + "}":
    for rule in "number", "boxed":
        grading.grade(Problem("p", "q", "q", "5", rule), response)
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", HOSTILE)
def test_a_megabyte_is_graded_in_time_linear_in_it(part):
    """A pattern that goes back over what it read takes hours here."""
    text = part * (1_000_000 // len(part))
    subprocess.run([sys.executable, "-c", GRADE], input=text, text=True, check=True, timeout=120)


def test_no_text_raises(monkeypatch):
    monkeypatch.setattr(grading, "agree", lambda gold, answer: None)
    rng = random.Random(19)
    parts = [*HOSTILE, *"0123456789.,:/-+=()[]^_eE}\n\ud800\x00\u0be7", r"\boxed{", "USD"]
    for _ in range(3000):
        gold, text = ("".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(2))
        for rule in ("number", "boxed"):
            ask(rule, gold, text)
            ask(rule, text, f"\\boxed{{{text}}}")
        last_boxed(text)
