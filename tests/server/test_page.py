"""The page in a real headless Chromium, on the real server."""

import json
import os
import re
import shutil
import time

import pytest

pytest.importorskip("starlette")

from serving import serving

from mlx_densesteer import SteeringVector
from mlx_densesteer.cli.run import load_problems
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.evaluation.sweep import settings_of, sweep, with_recommendation

pytestmark = pytest.mark.slow

QUESTION = held_out(1)[0].question
OVERDOSE = (
    60  # without the brake it repeats itself up to the limit: something to look at while it streams
)


def missing(what):
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        missing("no playwright: pip install -e '.[dev]'")
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    preloaded = os.environ.pop("LD_PRELOAD", None)  # OpenBLAS is not for the browser
    try:
        with sync_playwright() as playwright:
            try:  # without one of the system's: what `playwright install chromium` brought
                browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            except Error as error:
                missing(
                    f"no Chromium: apt-get install chromium, or playwright install chromium ({error})"
                )
            yield browser
            browser.close()
    finally:
        if preloaded is not None:
            os.environ["LD_PRELOAD"] = preloaded


@pytest.fixture
def open_page(server, browser):
    """Return a function that opens the page; at the end nothing may have gone wrong on it."""
    contexts, troubles = [], []

    def open_it(*, width=1300, height=900, before=lambda page: None, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        page = context.new_page()
        contexts.append(context)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "console",
            lambda message: troubles.append(message.text) if message.type == "error" else None,
        )
        page.on("request", lambda request: troubles.append(request.url) if server.url not in request.url and not request.url.startswith("blob:") else None)  # fmt: skip
        before(page)
        page.goto(server.url)
        return page

    open_it.troubles = troubles
    yield open_it
    for context in contexts:
        context.close()
    assert not troubles


def answered(page):
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text("Answered", timeout=60_000)
    page.locator("#status").evaluate("element => { element.textContent = '' }")


def ask(page, question=QUESTION):
    page.locator("#send:enabled").wait_for()
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")


def without_brake(page):
    """Let overdosed answers repeat themselves up to the limit."""

    def send(route):
        body = json.loads(route.request.post_data)
        if body.get("steering"):
            body["steering"]["brake"] = False
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", send)


def until(page, condition, seconds=60):
    """Wait for a JavaScript expression; the page's policy forbids evaluating strings inside it."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def visible_share(page, locator):
    """Return how much of an element lies within the part of the conversation that is shown."""
    box, frame = locator.bounding_box(), page.locator("#scroll").bounding_box()
    top, bottom = (
        max(box["y"], frame["y"]),
        min(box["y"] + box["height"], frame["y"] + frame["height"]),
    )
    return max(0, bottom - top) / min(box["height"], frame["height"])


def answers(page):
    """Return what each answer shows: heading, steps, what changed, and figures."""
    return [
        {
            "title": one.locator("h3").text_content(),
            "headline": one.locator(".headline:visible").all_inner_texts(),
            "steps": one.locator(".steps > li").all_inner_texts(),
            "receipt": dict(
                zip(
                    one.locator(".receipt div dt:visible").all_inner_texts(),
                    one.locator(".receipt div dd:visible").all_inner_texts(),
                    strict=True,
                )
            ),
        }
        for one in page.locator(".answer").all()
    ]


DENSE = "dense, 20\u00a0%, layer 5"


def test_the_unsteered_answer_stands_beside_the_steered_one(server, open_page):
    page = open_page()
    page.get_by_label("Show answers as plain text").check()
    ask(page)
    answered(page)
    stock, steered = answers(page)
    assert steered["title"] == DENSE and stock["title"] == "unsteered"
    for shown, model in ((steered, "demo@demo=20%"), (stock, "demo")):
        body = server.chat(QUESTION, model=model, max_tokens=512)
        text = body["choices"][0]["message"]["content"]
        assert "\n\n".join(shown["steps"]) == text.strip()
        details = body["usage"]["completion_tokens_details"]
        assert int(shown["receipt"]["Tokens"]) == body["usage"]["completion_tokens"]
        assert int(shown["receipt"]["Steps"]) == details["steps"] == len(shown["steps"])
        assert float(shown["receipt"]["Density"]) == pytest.approx(details["density"], rel=0.01)
    assert len(steered["steps"]) == 1 and len(stock["steps"]) == 5


def test_the_headline_says_what_changed(open_page):
    page = open_page()
    ask(page)
    answered(page)
    stock, steered = answers(page)
    assert stock["headline"] == []
    assert steered["headline"] == ["1 step instead of 5, same answer"]
    headline = page.locator(".headline:visible")
    assert headline.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 20
    said = page.locator(".answer .final")
    assert said.all_inner_texts() == ["Answer 32"] * 2
    assert "####" not in page.locator("#turns").inner_text()


def fulfilled(page, answer):
    """Let the page be answered by ``answer(request)``: a text, and where its steps begin."""

    def fulfil(route):
        text, starts, stated = answer(json.loads(route.request.post_data))
        choice = {
            "delta": {"content": text},
            "finish_reason": "stop",
            "step_starts": starts,
            "stated_answer": stated,
        }
        steering = json.loads(route.request.post_data).get("steering")
        told = steering and steering | {"dose": 0.2, "warning": None}
        details = {
            "steps": text.count("\n\n") + 1,
            "density": 1,
            "tokens_per_second": 1.0,
            "time_to_first_token": 1.0,
        }
        usage = {"completion_tokens": len(text), "completion_tokens_details": details}
        chunks = ({"choices": [choice], "steering": told}, {"choices": [], "usage": usage})
        route.fulfill(body=events(*chunks, "[DONE]"))

    page.route("**/v1/chat/completions", fulfil)


@pytest.mark.parametrize(
    ("steered", "stock", "headline"),
    [
        (("a", [0], "9"), ("a\n\nb", [0, 3], "8"), "1 step instead of 2, another answer: 9 instead of 8"),
        (("a", [0], None), ("b", [0], "8"), "1 step, as unsteered, another answer: none instead of 8"),
        (("a\n\nb", [0, 3], None), ("b", [0], None), "2 steps instead of 1"),
        (("```\na\n\nb\n```", [0], None), ("b\n\nc", [0, 3], None), "1 step instead of 2"),
    ],
)  # fmt: skip
def test_the_headline_of_other_answers(open_page, steered, stock, headline):
    page = open_page()
    fulfilled(page, lambda request: steered if request.get("steering") else stock)
    ask(page)
    answered(page)
    found = answers(page)[1]
    assert found["headline"] == [headline]
    literal = steered[0].count("\n\n") + 1
    number = len(steered[1])  # the server's, and the paper's beside it
    assert found["receipt"]["Steps"] == (
        f"{number}" if number == literal else f"{number} ({literal})"
    )


def watched(page):
    """Return the list of what the page asks from now on."""
    sent = []
    page.on(
        "request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None
    )
    return sent


def test_the_dial_by_keyboard_changes_what_is_asked(open_page):
    page = open_page()
    sent = watched(page)
    page.locator("#send:enabled").wait_for()
    dial = page.get_by_label("Strength", exact=True)
    number = page.get_by_label("Strength as a number")
    dial.focus()
    before = float(number.input_value())
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert float(number.input_value()) > before
    assert "towards dense" in dial.get_attribute("aria-valuetext")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert float(number.input_value()) == before  # there is a way back
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert float(number.input_value()) == float(dial.get_attribute("max"))
    page.keyboard.press("PageDown")
    after = float(number.input_value())
    page.get_by_label("Positions").select_option("generated")
    ask(page)
    answered(page)
    steered = [one["steering"] for one in sent if "steering" in one]
    assert len(sent) == 2 and len(steered) == 1
    assert steered[0]["strength"] == after and steered[0]["positions"] == "generated"
    assert answers(page)[1]["title"].endswith(", layer 5, generated positions")


def test_the_dose_stays_when_layers_are_added(open_page):
    page = open_page()
    page.locator("#send:enabled").wait_for()
    dose = page.locator("#dose")
    assert "20\u00a0%" in dose.inner_text()
    page.get_by_label("First layer").select_option("3")
    assert (
        "20\u00a0%" in dose.inner_text() and "keeps the dose" in page.locator("#kept").inner_text()
    )
    assert 0 < float(page.get_by_label("Strength as a number").input_value()) < 4.76
    sent = watched(page)
    ask(page)
    answered(page)
    assert [one["steering"]["layers"] for one in sent if "steering" in one] == [[3, 4, 5]]


def test_the_dial_by_mouse_is_caught_by_zero_and_by_the_default(open_page):
    page = open_page()
    page.locator("#send:enabled").wait_for()
    dial = page.get_by_label("Strength", exact=True)
    number = page.get_by_label("Strength as a number")
    box = dial.bounding_box()
    middle = box["y"] + box["height"] / 2

    def at(share):
        return box["x"] + 9 + (box["width"] - 18) * share

    page.mouse.move(at(0.9), middle)
    page.mouse.down()
    ends = dial.get_attribute("max")
    for share, expected in ((0.502, 0), (0.62, 4.76), (0.25, None), (1.2, float(ends)), (0.5, 0)):
        page.mouse.move(at(share), middle, steps=3)
        found = float(number.input_value())
        assert found == expected if expected is not None else found < -5
        assert dial.get_attribute("max") == ends
    page.mouse.up()


def titles(page):
    return page.locator(".answer h3").all_text_contents()


def test_asking_again_adds_an_answer_in_its_place_and_none_twice(open_page):
    page = open_page()
    sent = watched(page)
    ask(page)
    answered(page)
    assert len(sent) == 2
    sent.clear()
    page.get_by_role("button", name="Ask again").click()  # greedy: both are there
    toast = page.locator("#toast")
    assert toast.inner_text() == "Answered already: the answers of this setting are shown."
    page.get_by_label("Strength as a number").fill("-7")
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    assert [one["steering"]["strength"] for one in sent] == [-7]
    sparse = "sparse, 29.4\u00a0%, layer 5"
    assert titles(page) == [sparse, "unsteered", DENSE]
    assert page.locator(".answer.chosen h3").text_content() == sparse
    sent.clear()
    page.get_by_role("button", name="0, unsteered").click()
    page.get_by_role("button", name="Ask again").click()
    assert page.locator(".answer.chosen h3").text_content() == "unsteered" and not sent
    page.get_by_role("button", name="Back to the default").click()
    page.get_by_role("button", name="Ask again").click()
    assert page.locator(".answer.chosen h3").text_content() == DENSE and not sent
    page.get_by_label("Temperature").fill("0.5")  # samples differ
    for _ in range(2):
        page.get_by_label("Compare with unsteered").uncheck()
        page.get_by_role("button", name="Ask again").click()
        answered(page)
    assert titles(page) == [sparse, "unsteered", DENSE, f"{DENSE} (2)", f"{DENSE} (3)"]
    assert page.locator("#turns > li").count() == 1
    page.reload()
    page.locator("#send:enabled").wait_for()
    assert len(titles(page)) == 5


def test_another_system_message_is_another_request(open_page):
    page = open_page()
    sent = watched(page)
    ask(page)
    answered(page)
    assert not page.locator("#told-system").is_visible()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Compare with unsteered").uncheck()
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    assert len(answers(page)) == 3 and page.locator(".headline:visible").count() == 1
    page.get_by_label("Compare with unsteered").check()
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    assert page.locator(".headline:visible").count() == 2
    assert [one["messages"][0]["role"] for one in sent] == ["user"] * 2 + ["system"] * 2
    assert page.locator("#told-system").inner_text().split() == [
        "System",
        "message",
        "Be",
        "brief.",
    ]


def test_five_strengths_are_one_button(open_page):
    page = open_page()
    sent = watched(page)
    five = page.get_by_role("button", name="Try five strengths")
    page.locator("#send:enabled").wait_for()
    assert five.is_disabled()
    page.get_by_label("Question", exact=True).fill(QUESTION)
    five.click()
    answered(page)
    assert len(sent) == 5 and page.get_by_label("Question", exact=True).input_value() == ""
    doses = ("sparse, 20", None, "dense, 10", "dense, 20", "dense, 40")
    expected = [f"{one}\u00a0%, layer 5" if one else "unsteered" for one in doses]
    assert titles(page) == expected
    assert page.locator(".answer.chosen h3").text_content() == DENSE
    rows = page.locator(".overview tbody tr")
    assert rows.locator("button").all_text_contents() == expected
    shown = answers(page)
    for row, answer in zip(rows.all(), shown, strict=True):
        assert row.locator("td").first.inner_text() == answer["receipt"]["Steps"]
    assert visible_share(page, page.locator(".overview")) > 0.9
    rows.locator("button").last.click()
    box, strip = (
        page.locator(".answer").last.bounding_box(),
        page.locator(".answers").bounding_box(),
    )
    assert box["x"] + box["width"] <= strip["x"] + strip["width"] + 1
    five.click()  # again, of the last question: all are there
    assert page.locator(".answer.chosen h3").text_content() == DENSE
    assert len(sent) == 5 and len(titles(page)) == 5
    for question in (None, "And now?"):  # the dial stands at none of the five
        page.get_by_label("Strength as a number").fill("3.8")
        if question:
            fulfilled(page, lambda request: ("a", [0], None))
            page.get_by_label("Question", exact=True).fill(question)
        five.click()
        until(page, "!document.querySelector('#send').hidden")
        last = page.locator("#turns > li").last
        chosen = last.locator(".answer.chosen h3").get_attribute("title")
        assert chosen == "Vector demo, strength 4.76"
    assert len(sent) == 10


def test_five_strengths_of_a_vector_that_is_off_by_default(open_page):
    def off(route):
        response = route.fetch()
        body = response.json()
        body["vectors"][0]["default"] |= {"strength": 0, "dose": 0}  # serve -s 0
        route.fulfill(response=response, json=body)

    page = open_page(before=lambda page: page.route("**/v1/steering", off))
    sent = watched(page)
    fulfilled(page, lambda request: ("a", [0], None))
    page.locator("#send:enabled").wait_for()
    page.get_by_label("Question", exact=True).fill(QUESTION)
    page.get_by_role("button", name="Try five strengths").click()
    answered(page)
    strengths = sorted(one.get("steering", {"strength": 0})["strength"] for one in sent)
    most = float(page.get_by_label("Strength", exact=True).get_attribute("max"))
    assert strengths == pytest.approx([share * most for share in (-0.25, 0, 0.125, 0.25, 0.5)])


def test_answers_of_another_model_or_vector_are_asked_for_anew(open_page):
    changes = []

    def answer(route):
        response = route.fetch()
        body = response.json()
        for part in changes:
            (body["model"] if part == "model" else body["vectors"][0])["fingerprint"] = "another"
        route.fulfill(response=response, json=body)

    page = open_page(before=lambda page: page.route("**/v1/steering", answer))
    sent = watched(page)
    fulfilled(page, lambda request: ("a", [0], None))
    ask(page)
    answered(page)
    for change, asked in (("model", 4), ("vector", 5), (None, 5)):
        changes[:] = filter(None, [change])
        page.reload()
        page.locator("#again:enabled").click()
        answered(page)
        assert len(sent) == asked == len(answers(page))
        assert page.get_by_text("another model: demo").count() == 2


def test_a_strength_is_not_kept_for_another_vector_of_the_same_name(open_page):
    replaced = []

    def answer(route):
        response = route.fetch()
        body = response.json()
        if replaced:
            body["vectors"][0]["fingerprint"] = "another"
        route.fulfill(response=response, json=body)

    page = open_page(before=lambda page: page.route("**/v1/steering", answer))
    number = page.locator("#strength-number")
    page.locator("#send:enabled").wait_for()
    usual = number.input_value()
    number.fill("1.5")
    for other, shown in ((False, "1.5"), (True, usual)):
        replaced[:] = [other] * other
        page.reload()
        page.locator("#send:enabled").wait_for()
        assert number.input_value() == shown != ""


def test_a_phone_compares_by_swiping(open_page):
    page = open_page(width=390, height=844)
    ask(page)
    answered(page)
    strip = page.locator(".answers")
    assert strip.evaluate("e => getComputedStyle(e).scrollSnapType") == "x mandatory"
    cards = [one.bounding_box() for one in page.locator(".answer").all()]
    assert cards[0]["x"] < 0 < cards[1]["x"] and cards[1]["x"] + cards[1]["width"] <= 390
    assert cards[0]["y"] == cards[1]["y"]  # side by side
    strip.evaluate("e => e.scrollTo(0, 0)")
    until(page, "document.querySelector('.answers').scrollLeft == 0")
    assert page.locator(".answer").first.bounding_box()["x"] > 0
    assert page.locator(".overview").is_visible()


def test_the_figures_are_explained(open_page):
    page = open_page()
    ask(page)
    answered(page)
    first = page.locator(".answer").first
    for figure in first.locator(".receipt div").all():
        assert len(figure.get_attribute("title")) > 20
    first.get_by_role("button", name="What the figures mean").click()
    told = page.get_by_role("dialog").inner_text()
    for name in answers(page)[0]["receipt"]:
        assert name in told
    page.get_by_role("button", name="Close").click()
    assert not page.get_by_role("dialog").is_visible()


def test_vectors_are_chosen_by_what_they_are(open_page, with_vectors):
    page = open_page(before=with_vectors)
    sent = watched(page)
    page.locator("#send:enabled").wait_for()
    choices = page.get_by_role("group", name="Vector").locator("label")
    assert choices.first.inner_text().split("\n") == [
        "demo", "Mean difference of 50 pairs, made for demo.", "Default: dense, 20\u00a0%, layer 5",
    ]  # fmt: skip
    page.get_by_role("radio", name="other").check()
    page.get_by_label("Compare with unsteered").uncheck()
    fulfilled(page, lambda request: ("a", [0], None))
    ask(page)
    answered(page)
    assert sent[0]["steering"]["vector"] == "other"
    assert titles(page) == [f"{DENSE}, vector other"]


@pytest.mark.parametrize(("width", "height"), [(1300, 900), (390, 844), (650, 450)])
def test_what_comes_is_seen(open_page, width, height):
    page = open_page(width=width, height=height)
    for number in range(4):
        ask(page, held_out(4)[number].question)
        answered(page)
    last = page.locator("#turns > li").last.locator(".answers")
    assert visible_share(page, last) > 0.9
    question = page.get_by_label("Question", exact=True).bounding_box()
    assert question["y"] + question["height"] <= height
    assert page.get_by_label("Strength", exact=True).bounding_box()["y"] < height
    page.locator("#scroll").evaluate("e => { e.scrollTop = 0 }")
    page.get_by_role("button", name="Newest").click()
    assert visible_share(page, last) > 0.9


def test_a_long_answer_is_followed_unless_the_reader_has_left(open_page):
    page = open_page(width=800, height=600)
    page.get_by_label("Compare with unsteered").uncheck()
    page.get_by_label("Strength as a number").fill(str(OVERDOSE))
    without_brake(page)
    page.get_by_label("Tokens at most").fill("900")
    ask(page)
    until(page, "document.querySelector('#scroll').scrollTop > 100")
    gap = "(() => { const e = document.querySelector('#scroll'); return e.scrollHeight - e.clientHeight - e.scrollTop })()"
    assert page.evaluate(gap) < 80
    # a notch of the wheel whose movement a token has undone: it counts all the same
    page.locator("#scroll").evaluate(
        "e => { e.dispatchEvent(new WheelEvent('wheel', {deltaY: -9})) }"
    )
    before = len(page.locator(".answer").inner_text())
    until(page, f"document.querySelector('.answer').innerText.length > {before + 50}")
    assert page.get_by_role("button", name="Newest").is_visible()
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -5000)
    until(page, "document.querySelector('#scroll').scrollTop == 0")
    before = len(page.locator(".answer").inner_text())
    until(page, f"document.querySelector('.answer').innerText.length > {before + 50}")
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == 0
    assert page.get_by_role("button", name="Newest").is_visible()
    page.mouse.wheel(0, 100_000)
    page.get_by_role("button", name="Newest").wait_for(state="hidden")
    before = len(page.locator(".answer").inner_text())
    until(page, f"document.querySelector('.answer').innerText.length > {before + 50}")
    assert page.evaluate(gap) < 80
    page.get_by_role("button", name="Stop").click()


def test_the_dial_ends_below_an_overdose(open_page):
    page = open_page()
    page.locator("#send:enabled").wait_for()
    dial = page.get_by_label("Strength", exact=True)
    dial.focus()
    page.keyboard.press("End")
    assert "79.9\u00a0%" in page.locator("#dose").inner_text()
    assert page.locator("#dose.warn").count() == 0
    page.get_by_label("Strength as a number").fill(str(OVERDOSE))  # typed: allowed, and said
    assert dial.input_value() == dial.get_attribute("max")


def test_a_large_dose_is_said(open_page):
    page = open_page()
    page.locator("#send:enabled").wait_for()
    page.get_by_label("Strength as a number").fill("22")
    assert "usually ruins" in page.locator("#dose").inner_text()
    assert page.locator("#dose.warn").count() == 1
    page.get_by_label("Tokens at most").fill("200")
    ask(page)
    answered(page)
    note = page.locator(".answer .note").last.inner_text()
    assert re.search(r"Began to repeat itself: \d+ tokens cut off, strength lowered to 11\.", note)


def test_the_conversation_goes_on_with_the_chosen_answer(open_page):
    page = open_page()
    sent = watched(page)
    ask(page)
    answered(page)
    page.get_by_label("Show answers as plain text").check()
    stock = answers(page)[0]
    page.get_by_role("button", name="Continue from this one").click()
    ask(page, "And now?")
    answered(page)
    messages = sent[-1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].strip() == "\n\n".join(stock["steps"])

    # an earlier question's answers are history: another one of them begins a conversation of its own
    page.get_by_role("button", name="Branch from here").last.click()
    assert (
        page.locator("#turns > li").count() == 1 and page.locator("#conversations li").count() == 2
    )
    assert page.locator(".answer.chosen h3").text_content() == DENSE
    sent.clear()
    ask(page, "And now?")
    answered(page)
    assert sent[-1]["messages"][1]["content"].strip() != "\n\n".join(stock["steps"])


def test_stopping_frees_the_server_and_keeps_what_was_said(server, open_page):
    from playwright.sync_api import expect

    page = open_page()
    page.locator("#send:enabled").wait_for()
    page.get_by_label("Tokens at most").fill("900")
    page.get_by_label("Strength as a number").fill(str(OVERDOSE))
    ask(page)
    expect(page.locator(".answer").first.locator(".steps > li").first).not_to_be_empty(
        timeout=30_000
    )
    expect(page.locator(".answer").last.locator(".steps > li").first).not_to_be_empty(
        timeout=30_000
    )
    page.keyboard.press("Escape")
    expect(page.locator(".answer .note").last).to_contain_text("Stopped.")
    server.settle()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_history_survives_a_reload_and_is_deleted_on_demand(open_page):
    page = open_page()
    ask(page)
    answered(page)
    said = answers(page)
    page.get_by_label("Question", exact=True).fill("a draft")
    page.get_by_label("Strength as a number").fill("3.5")
    page.get_by_label("Temperature").fill("0.25")
    page.reload()
    page.locator("#send:enabled").wait_for()
    assert answers(page) == said  # where it was, with what was being written
    assert page.get_by_label("Question", exact=True).input_value() == "a draft"
    assert page.get_by_label("Strength as a number").input_value() == "3.5"
    assert page.get_by_label("Temperature").input_value() == "0.25"
    page.get_by_role("button", name="New conversation").click()
    page.locator("#conversations .open").click()
    assert answers(page) == said

    delete = page.get_by_role("button", name=re.compile("^Delete " + re.escape(QUESTION[:20])))
    delete.click()
    assert page.locator("#conversations li").count() == 0 and not answers(page)
    page.get_by_role("button", name="Undo").click()
    assert page.locator("#conversations li").count() == 1
    forget = page.get_by_role("button", name="Delete all")
    forget.click()
    page.get_by_role("button", name="Keep them").click()
    assert page.locator("#conversations li").count() == 1
    forget.click()
    page.keyboard.press("Escape")
    assert page.locator("#conversations li").count() == 1
    forget.click()
    page.get_by_role("button", name="Delete", exact=True).click()
    until(page, "document.querySelectorAll('#conversations li').length == 0")
    page.reload()
    assert page.locator("#conversations li").count() == 0


def test_the_open_conversation_may_be_clicked_while_it_is_answered(open_page):
    page = open_page()
    ask(page)
    answered(page)
    page.get_by_label("Strength as a number").fill(str(OVERDOSE))
    ask(page, "And now?")
    page.locator("#conversations .open").click()
    assert page.locator("#turns > li").count() == 2
    last = page.locator("#turns > li").last
    for answer in last.locator(".answer").all():
        answer.locator(".steps > li").first.wait_for()  # an answer without text would not be kept
    page.get_by_role("button", name="Stop").click()
    last.get_by_text("Stopped.").first.wait_for()
    page.reload()
    assert page.locator("#turns > li").count() == 2


def test_two_tabs_lose_nothing_of_each_other(server, open_page):
    one = open_page()
    ask(one)
    answered(one)
    other = one.context.new_page()
    other.goto(server.url)
    other.locator("#conversations .open").click()
    ask(other, "And in the other tab?")
    answered(other)
    until(one, "document.querySelectorAll('#turns > li').length == 2")
    # both at once: the one that ends later goes on in a conversation of its own
    for page in (one, other):
        page.get_by_label("Tokens at most").fill("900")
        page.get_by_label("Strength as a number").fill(str(OVERDOSE))
    ask(one, "At once?")
    ask(other, "At the same time?")
    for page in (one, other):
        page.locator("#turns > li").last.locator(".steps > li").first.wait_for()
    for page in (one, other):  # the hidden tab draws nothing, so a click would wait for its frames
        page.locator("#stop").evaluate("button => button.click()")
        page.locator("#send").wait_for()
    until(one, "document.querySelectorAll('#conversations li').length == 2")
    stored = one.evaluate(
        "JSON.parse(localStorage['densesteer.conversations']).map((c) => c.turns.at(-1).question)"
    )
    assert sorted(stored) == ["At once?", "At the same time?"]


def test_what_another_tab_wrote_over_is_kept_again(open_page):
    """Browsers tell a tab late what another wrote: here it has not seen this tab's second answer."""
    page = open_page()
    ask(page)
    answered(page)
    seen = page.evaluate("localStorage['densesteer.conversations']")
    ask(page, "And now?")
    answered(page)
    until(page, "JSON.parse(localStorage['densesteer.conversations'])[0].turns.length == 2")

    def overwrite(text):
        page.evaluate(
            """text => {
                localStorage['densesteer.conversations'] = text;
                Date.now = () => 0;  // however slow this machine is, that was at once
                dispatchEvent(new StorageEvent('storage', {key: 'densesteer.conversations'}));
            }""",
            text,
        )
        return json.loads(page.evaluate("localStorage['densesteer.conversations']"))

    first = json.loads(seen)[0]
    for text in (seen, "[]"):  # without the newest answer; without the conversation
        (kept,) = overwrite(text)
        assert kept["id"] == first["id"] and len(kept["turns"]) == 2
    theirs = first | {"revision": "theirs", "earlier": [*first["earlier"], first["revision"]]}
    kept, other = overwrite(json.dumps([theirs]))
    assert other == theirs
    assert kept["id"] != first["id"] and [t["question"] for t in kept["turns"]][1] == "And now?"
    assert page.locator("#conversations li").count() == 2
    assert page.locator("#turns > li").count() == 2


def test_a_server_that_dies_costs_no_answer(open_page):
    page = open_page()
    for question in (QUESTION, "And now?"):
        ask(page, question)
        answered(page)
    said = answers(page)
    page.get_by_label("Strength as a number").fill("-7")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    for _ in range(2):
        page.get_by_role("button", name="Ask again").click()
        page.locator("#alert").get_by_text("cannot be reached").wait_for()
        page.locator("#send:enabled").wait_for()
        assert answers(page) == said
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Retry").click()
    answered(page)
    assert len(answers(page)) == 5 and page.locator("#turns > li").count() == 2
    open_page.troubles[:] = [t for t in open_page.troubles if "ERR_FAILED" not in t]


def test_an_unfinished_answer_is_replaced_by_a_whole_one_only(open_page):
    page = open_page()
    page.get_by_label("Compare with unsteered").uncheck()
    half = {"choices": [{"delta": {"content": "Half"}, "finish_reason": None}]}
    less = {"choices": [{"delta": {"content": "Ha"}, "finish_reason": None}]}
    bodies = [events(half), "", events(less)]
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=bodies.pop(0)))
    ask(page)
    page.locator("#alert").get_by_text("broke off").wait_for()
    for left in (1, 0):
        page.get_by_role("button", name="Ask again").click()
        page.locator("#alert").get_by_text("broke off").wait_for()
        assert len(bodies) == left and [one["steps"] for one in answers(page)] == [["Half"]]
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    (one,) = answers(page)
    assert one["steps"] != ["Half"] and one["receipt"]


def test_a_setting_that_cannot_be_is_mended(open_page):
    page = open_page()
    sent = watched(page)
    page.locator("#send:enabled").wait_for()
    for label, given, taken in (("Temperature", "5", "2"), ("Temperature", "0.75", "0.75"), ("Top p", "0", "0.01"),
                                ("Tokens at most", "2.6", "3"), ("Seed", "-3", "0"), ("Seed", "", "")):  # fmt: skip
        page.get_by_label(label).fill(given)
        page.get_by_label(label).blur()
        assert page.get_by_label(label).input_value() == taken
    page.get_by_label("Seed").fill("7")
    ask(page)
    answered(page)
    assert {k: sent[0][k] for k in ("temperature", "top_p", "seed", "max_tokens")} == {
        "temperature": 0.75, "top_p": 0.01, "seed": 7, "max_tokens": 3,
    }  # fmt: skip


def test_an_example_can_be_asked(open_page):
    page = open_page()
    page.locator("#examples button").first.click()
    answered(page)
    for one in answers(page):
        assert one["steps"][-1].endswith(f"Answer {held_out(1)[0].answer}")
    assert not page.locator("#empty").is_visible()


def test_exports(open_page):
    page = open_page()
    ask(page)
    answered(page)
    shown = answers(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export JSON").click()
    document = json.loads(download.value.path().read_text())
    told = document["turns"][0]["answers"]
    assert [one["steering"] and one["steering"]["dose"] for one in told] == [None, 0.2]
    assert told[1]["steering"]["strength"] == pytest.approx(4.756, abs=1e-3)  # not rounded
    assert told[0]["usage"]["completion_tokens"] == int(shown[0]["receipt"]["Tokens"])
    assert [one["stated"] for one in told] == [str(held_out(1)[0].answer)] * 2
    with page.expect_download() as download:
        page.get_by_role("button", name="Export Markdown").click()
    text = download.value.path().read_text()
    assert QUESTION in text and "### unsteered" in text and shown[0]["steps"][0] in text
    assert not re.search("^#### ", re.sub("```text.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    assert document["turns"][0]["answers"][0]["asked"]["temperature"] == 0 and document["server"]
    assert re.fullmatch(
        r"zoe-has-7-rows-with-4-\d{4}-\d\d-\d\d.md", download.value.suggested_filename
    )


def test_another_conversation_while_one_is_answered(open_page):
    page = open_page()
    page.get_by_label("Strength as a number").fill(str(OVERDOSE))
    ask(page)
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("button", name="Back to the default").click()
    ask(page)
    answered(page)
    assert len(page.locator("#turns > li").all()) == 1
    assert answers(page)[1]["receipt"]["Steps"] == "1"


def events(*chunks):
    return "".join(
        f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks
    )


def test_errors_are_told_and_can_be_retried(open_page):
    page = open_page()
    said = {"choices": [{"delta": {"content": "Half"}, "finish_reason": None}]}
    bodies = [
        (429, {"Retry-After": "3"}, json.dumps({"error": {"message": "full."}})),
        (200, {}, events(said, {"error": {"message": "the server is shutting down."}})),
        (200, {}, events(said)),
    ]
    page.get_by_label("Compare with unsteered").uncheck()

    def refuse(route):
        status, headers, body = bodies.pop(0)
        route.fulfill(status=status, headers=headers, body=body)

    page.route("**/v1/chat/completions", refuse)
    ask(page)
    alert = page.locator("#alert")
    alert.get_by_text("full.").wait_for()
    assert page.get_by_label("Question", exact=True).input_value() == QUESTION
    page.get_by_role("button", name="Retry").click()
    alert.get_by_text("shutting down").wait_for()
    assert answers(page)[0]["steps"] == ["Half"]
    page.get_by_role("button", name="Retry").click()
    alert.get_by_text("broke off").wait_for()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Retry").click()
    answered(page)
    assert not alert.is_visible() and len(answers(page)[0]["steps"]) == 1
    open_page.troubles[:] = [
        t for t in open_page.troubles if "429" not in t
    ]  # the browser's own line


def test_markup_of_the_model_is_text(open_page):
    page = open_page()
    text = "<img src=x onerror=alert(1)><b>bold</b>\n\n<script>alert(2)</script>"
    chunk = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}], "steering": None}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=events(chunk, "[DONE]")))
    page.on("dialog", lambda dialog: open_page.troubles.append("a dialog opened"))
    ask(page)
    answered(page)
    assert page.locator(".answer img, .answer b, .answer script").count() == 0
    assert "\n\n".join(answers(page)[0]["steps"]) == text
    for markup in ("- {}\n\n  {}", "| {} |\n|-|\n| {} |", "```{}\n{}\n```", "### {}\n**{}** `{}`", "\\[\n{}\n\\]", "\\boxed{{{}}}"):  # fmt: skip
        inside = "<img src=x onerror=alert(1)>"
        chunk["choices"][0]["delta"]["content"] = markup.format(*[inside] * 3)
        page.get_by_role("button", name="New conversation").click()
        ask(page)
        answered(page)
        assert page.locator(".answer img").count() == 0, markup
        assert "onerror=alert(1)" in page.locator(".answer").first.inner_text()


def test_markdown_and_formulas_are_dressed(open_page):
    page = open_page()
    text = (
        "### Step 1\nWe **multiply** `a`:\n\\[\n\\frac{3}{4} \\times 8 = \\boxed{6}\n\\]\n\n"
        "```python\nx = 1\n\ny = **2**\n```\nSo \\(x \\le 2\\), 3 * 4 ** 2, $5.\n\n"
        "| day | apples |\n|:--|--:|\n| Monday | **4** |\n| a \\| b | 5 |\n\n"
        "- one\n\n  more of one\n- two\n  1. inner\n\n"
        "#### 2 Solution\nThe end.\n#### 6"
    )
    starts = [text.index(one) for one in ("###", "```python", "| day", "- one", "#### 2")]
    fulfilled(page, lambda request: (text, starts, "6"))
    page.get_by_label("Compare with unsteered").uncheck()
    ask(page)
    answered(page)
    steps = page.locator(".answer .steps > li")
    assert steps.count() == 5
    assert steps.first.locator("p").all_inner_texts() == ["Step 1", "We multiply a:", "3/4 × 8 = 6"]
    assert steps.nth(1).locator("p").all_inner_texts() == ["So x ≤ 2, 3 * 4 ** 2, $5."]
    strong = page.locator(".answer p > strong").all_inner_texts()
    assert strong == ["Step 1", "multiply", "2 Solution", "6"]
    assert page.locator(".answer .final").all_inner_texts() == ["Answer 6"]
    assert page.locator(".answer mark").inner_text() == "6"
    assert page.locator(".answer code.block").all_inner_texts() == ["x = 1\n\ny = **2**"]
    assert page.locator(".answer .code .bar span").inner_text() == "python"
    rows = page.locator(".answer .steps tr")
    assert [row.locator("th, td").all_inner_texts() for row in rows.all()] == [
        ["day", "apples"], ["Monday", "4"], ["a | b", "5"],
    ]  # fmt: skip
    assert rows.last.locator("td").last.evaluate("e => e.style.textAlign") == "right"
    items = steps.nth(3).locator("> ul > li")
    assert items.count() == 2 and items.first.locator("p").count() == 2
    assert items.last.locator("ol > li").all_inner_texts() == ["inner"]
    page.get_by_label("Show answers as plain text").check()
    assert "\n\n".join(answers(page)[0]["steps"]) == text


def test_no_text_of_the_model_holds_the_page_up(open_page):
    page = open_page()
    made = page.evaluate("""async () => {
        const { blocks } = await import("/page/markup.js");
        const gap = " ".repeat(40_000);
        const texts = [`a | b\n|${gap}-${gap}x`, `| a${gap}x | b |\n|-|-|`, `# ${gap}a\u2028b`, "#### 1. Setup"];
        return texts.map((text) => blocks(text, true).map((one) => one.make().firstElementChild?.tagName ?? "P"));
    }""")  # for hours, where an expression backtracks
    assert made == [["P"], ["TABLE"], ["STRONG"], ["STRONG"]]


def test_an_api_key_is_asked_for_and_kept_in_the_tab(browser):
    from mlx_densesteer.server.settings import Access

    with serving(access=Access(key=b"a-key-of-many-letters")) as locked:
        context = browser.new_context()
        page = context.new_page()
        page.goto(locked.url)
        page.get_by_text("asks for its API key").wait_for()
        page.get_by_label("Question", exact=True).fill("kept")
        page.keyboard.press("Enter")
        assert page.get_by_label("Question", exact=True).input_value() == "kept"
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("refused that key").wait_for()
        assert not page.locator("#alert").is_visible()
        page.get_by_label("API key").fill("a-key-of-many-letters")
        page.get_by_role("button", name="Use it").click()
        page.locator("#vectors input").first.wait_for()
        assert not page.locator("#key-form").is_visible()
        assert "a-key-of" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        page.locator("#vectors input").first.wait_for()
        context.close()


def test_a_model_is_chosen_at_the_top(browser, tmp_path, hf_folder):
    (tmp_path / "tiny").symlink_to(hf_folder)
    (tmp_path / "beads").mkdir()
    shutil.copy(hf_folder / "config.json", tmp_path / "beads")  # cannot be loaded
    with serving("demo", models=tmp_path) as server:
        context = browser.new_context(viewport={"width": 1300, "height": 900})
        page = context.new_page()
        sent = watched(page)
        page.goto(server.url)
        ask(page, "Hi")
        answered(page)
        chooser = page.get_by_label("Model", exact=True)
        assert chooser.input_value() == "demo"
        chooser.select_option("tiny")
        page.locator("#model", has_text="4 layers").wait_for()
        assert not page.locator("#dial").is_visible()  # it has no vector
        assert page.get_by_text("another model: demo").count() == 2
        page.get_by_label("Tokens at most").fill("4")
        ask(page, "Hi")
        answered(page)
        assert [one["model"] for one in sent] == ["demo", "demo", "tiny"]
        page.reload()
        page.locator("#model", has_text="4 layers").wait_for()
        assert chooser.input_value() == "tiny"
        chooser.select_option("beads")
        page.get_by_text("model beads cannot be loaded").wait_for()
        chooser.select_option("demo")
        page.locator("#model", has_text="6 layers").wait_for()
        assert page.locator("#dial").is_visible() and not page.locator("#alert").is_visible()
        context.close()


@pytest.fixture(scope="module")
def tested(demo_model):
    """The rows of a small sweep, as `densesteer sweep --write` keeps them in the vector."""
    problems, about = load_problems(
        "demo", split=None, skip=0, limit=4, revision=None, calibration=True
    )
    vector = SteeringVector.load("demo")
    settings = settings_of(demo_model, vector, [4, 5], ["10%", "20%", "40%"])
    result = sweep(demo_model, problems, settings, max_tokens=80, with_nll=False)
    written = with_recommendation(vector, result, task=about, positions="all")
    return list(written.meta.tested)


@pytest.fixture
def with_vectors():
    """Return a function that lets the page see two vectors: the demo's, and the same as ``other``."""

    def routed(page):
        def answer(route):
            response = route.fetch()
            body = response.json()
            (demo,) = body["vectors"]
            usual = demo["default"] | {"vector": "other"}
            body["vectors"].append(demo | {"name": "other", "default": usual})
            route.fulfill(response=response, json=body)

        page.route("**/v1/steering", answer)

    return routed


@pytest.fixture
def with_sweep(tested):
    """Return a function that lets the page see the demo vector as that sweep wrote it."""

    def routed(page, rows=tested):
        def answer(route):
            response = route.fetch()
            body = response.json()
            body["vectors"][0]["tested"] = rows
            route.fulfill(response=response, json=body)

        page.route("**/v1/steering", answer)

    return routed


def column_labels(page):
    return page.locator("#sweep-picture svg > text[text-anchor=middle]").all_text_contents()


def test_a_sweep_is_shown_and_sets_the_dial(open_page, with_sweep, tested):
    page = open_page(before=with_sweep)
    cells = page.locator("#sweep-picture [role=button]")
    cells.first.wait_for()
    assert cells.count() == 6
    assert page.locator("#sweep-task").input_value() == "demo train, 4 problems"
    assert page.get_by_role("group", name="Accuracy by layer and dose").count() == 1
    assert column_labels(page) == ["10\u00a0%", "20\u00a0%", "40\u00a0%"]
    assert page.locator("#sweep-picture [aria-pressed=true]").count() == 1  # the vector's default
    stock, *rows = tested
    detail = page.locator("#sweep-detail")
    assert f"Unsteered: {100 * stock['accuracy']:.0f}\u00a0%" in detail.inner_text()
    (row,) = (one for one in rows if one["layers"] == [4] and one["dose"] == pytest.approx(0.4))
    strength = f"{row['strength']:.3g}"
    named = (
        f"Layer 4, 40\u00a0% (strength {strength}): accuracy {100 * row['accuracy']:.0f}\u00a0%,"
    )
    page.get_by_role(
        "button", name=re.compile("^" + re.escape(named.replace("\u00a0", " ")))
    ).focus()
    assert f"density {row['density']:.3g}" in detail.inner_text()
    sent = watched(page)
    page.keyboard.press("Enter")
    assert page.get_by_label("Strength as a number").input_value() == strength
    assert "40\u00a0% of the residual stream" in page.locator("#dose").inner_text()
    assert page.get_by_label("First layer").input_value() == "4"
    assert page.locator("#sweep-picture [aria-pressed=true]").count() == 1
    page.get_by_text("As a table").click()
    lines = page.locator("#sweep-table tr").all_inner_texts()
    assert len(lines) == 8 and lines[0].split() == [
        "layers", "dose", "strength", "accuracy", "tokens", "steps", "density",
    ]  # fmt: skip
    doses = [line.split("\t")[1].replace("\u00a0", " ") for line in lines[1:]]
    assert doses == ["0 %", *("10 %", "20 %", "40 %") * 2]
    ask(page)
    answered(page)
    assert sent[1]["steering"]["strength"] == row["strength"]  # exactly


def test_a_sweep_whose_layers_share_strengths_has_columns_of_strengths(
    open_page, with_sweep, tested
):
    rows = [one | {"strength": round(20 * one["dose"])} for one in tested]
    rows = [one | {"dose": one["strength"] / ((one["layers"] or [1])[0])} for one in rows]
    page = open_page(before=lambda page: with_sweep(page, rows))
    page.locator("#sweep-picture [role=button]").first.wait_for()
    assert column_labels(page) == ["2", "4", "8"]
    assert page.get_by_role("button", name=re.compile("^Layer 4, 200 % .strength 8.:")).count() == 1


def test_a_sweep_without_doses_is_shown_by_strength(open_page, with_sweep, tested):
    """A file may hold any measurements (docs/vector-format.md)."""
    rows = [
        {key: one[key] for key in ("layers", "strength", "accuracy")} | {"task": "mine"}
        for one in tested
        if one["layers"] != [4]
    ]
    page = open_page(before=lambda page: with_sweep(page, rows))
    page.locator("#sweep-picture [role=button]").first.wait_for()
    assert column_labels(page) == [f"{one['strength']:.3g}" for one in rows[1:]]
    assert page.locator("#sweep-task").input_value() == "mine"


def test_without_a_sweep_there_is_no_picture(open_page):
    page = open_page()
    page.locator("#send:enabled").wait_for()
    assert not page.locator("#sweep").is_visible()


def contrast(page):
    """Return the smallest contrast of a visible text to its ground (WCAG 2)."""
    return page.evaluate(
        """() => {
        const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const ground = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
          if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
        let least = [99, ""];
        for (const e of document.body.querySelectorAll("*")) {
          if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
          const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
          const c = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (c < least[0]) least = [c, e.outerHTML.slice(0, 80)];
        }
        return least; }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(open_page, with_sweep, scheme):
    page = open_page(color_scheme=scheme, before=with_sweep)
    ask(page)
    answered(page)
    least, where = contrast(page)
    assert least >= 4.5, where
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.get_by_label("Theme").select_option("light" if scheme == "dark" else "dark")
    page.reload()
    page.locator("#sweep-picture [role=button]").first.wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    least, where = contrast(page)
    assert least >= 4.5, where


@pytest.mark.parametrize("width", [320, 360, 800, 1300])
def test_no_width_scrolls_sideways(open_page, with_sweep, width):
    page = open_page(width=width, height=800, before=with_sweep)
    ask(page, QUESTION + " " + "x" * 200)
    answered(page)
    for name in ("Chats", "Settings"):
        button = page.get_by_role("button", name=name, exact=True)
        if button.get_attribute("aria-expanded") == "false":
            button.click()
        for part in (
            "document.documentElement",
            "document.querySelector('#scroll')",
            "document.querySelector('#steer')",
        ):
            assert page.evaluate(f"{part}.scrollWidth <= Math.max({part}.clientWidth, 0)"), part
    page.keyboard.press("Escape")
    assert page.locator("#steer").is_visible() == (width >= 800)


def test_every_control_has_a_name_and_is_reached_by_tab(open_page, with_sweep):
    page = open_page(before=with_sweep)
    ask(page)
    answered(page)
    for side in page.locator("details").all():
        side.evaluate("element => { element.open = true }")
    controls = "a, button, input, select, textarea, summary, [role=button]"
    wanted = set()
    for one in page.locator(controls).all():
        if not one.is_visible() or one.is_disabled():
            continue
        name = one.evaluate(
            "e => e.getAttribute('aria-label') || [...(e.labels ?? [])].map(l => l.textContent).join() || e.textContent"
        )
        assert name.strip(), one.evaluate("e => e.outerHTML")
        wanted.add(one.evaluate("e => e.outerHTML"))
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(len(wanted) + 10):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.outerHTML"))
    assert wanted - reached == set()


def test_a_thought_is_folded_above_its_answer(browser, thinking_folder):
    from playwright.sync_api import expect

    from mlx_densesteer.server.vectors import NamedVector
    from mlx_densesteer.steering.request import Amount

    vector = SteeringVector.load(thinking_folder / "out.npz")
    vector.name = "out"
    with serving(thinking_folder, [NamedVector(vector, Amount(2.0), (1,), "steps")]) as running:
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        ask(page, "17 * 3?")
        answered(page)
        card = page.locator("article.answer").filter(has_text="dense").first
        thought = card.locator("details.thought")
        expect(thought.locator("summary")).to_have_text("Thought, 5 tokens")
        expect(thought.locator("p")).not_to_be_visible()
        expect(card.locator(".steps")).to_have_text("51")
        thought.locator("summary").click()
        expect(thought.locator("p")).to_have_text("tabc")
        options = page.get_by_label("Positions").locator("option").all_text_contents()
        assert {"think", "answer"} <= {one.split()[0].casefold() for one in options}, options
        context.close()


def test_a_vector_for_the_first_tokens_is_asked_for_as_it_was_trained(browser):
    from dataclasses import replace

    from mlx_densesteer.server.vectors import NamedVector

    demo = SteeringVector.load("demo")
    best = {"layers": [3, 4], "strength": 2.0, "positions": "first:48", "reason": "trained"}
    vectors = [
        NamedVector(
            SteeringVector(demo.layers, replace(demo.meta, recommended=best), name="brief")
        ),
        NamedVector(demo),
    ]
    with serving("demo", vectors) as running:
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        asked = []
        page.on("request", lambda one: asked.append(one.post_data_json) if one.post_data else None)
        ask(page, QUESTION)
        answered(page)
        wanted = {"vector": "brief", "strength": 2, "layers": [3, 4], "positions": "first:48"}
        assert [one["steering"] for one in asked if one.get("steering")] == [wanted]
        assert page.locator("#positions").input_value() == "first:48"
        page.reload()  # the setting is remembered
        page.locator("#positions").wait_for(state="attached")
        page.wait_for_function("document.querySelector('#positions').value === 'first:48'")
        context.close()
