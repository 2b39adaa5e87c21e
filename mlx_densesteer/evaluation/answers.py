"""Responses to many problems under many conditions, in shared batches and kept in a journal.

The journal holds one record for each problem and condition, and later one for its NLL. One file can
grow over several runs, and no answer in it is generated again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Protocol, TypedDict, Unpack, get_type_hints

from ..errors import InputError, ModelError
from ..files import check_fields, token_ids
from ..generation.answer import Generation, split_steps
from ..generation.batch import ROWS, generate_batch
from ..generation.sampling import GREEDY
from ..model.likelihood import nll
from ..model.model import Model
from ..model.prompt import check_prompt, encode_answer, encode_chat, render_chat
from ..steering.steering import Steering
from ..text import one_line
from .condition import Condition
from .grading import Grade, grade
from .journal import Journal, not_a_record
from .tasks import Problem

FORMAT = "mlx-densesteer answers 1"
LIKELIHOODS = 16  # responses whose NLL is computed between two writes to the journal

Key = tuple[str, str, str]  # problem, content, steering
Under = Steering | Condition | None  # what a problem is answered under


@dataclass(frozen=True)
class Answer:
    """One graded response to one problem.

    - ``content``: a hash of prompt and gold answer; it tells problems of equal ids apart.
    - ``steering``: the fingerprint of the steering or condition, ``"unsteered"`` at strength 0.
    - ``seconds``: from the start of the response to its end, in its batch.
    - ``compute_seconds``: its share of its batch's time (``Batch``); ``None`` in older journals.
    - ``said``: what is graded: ``text`` without a reasoning model's thought; ``None`` is the whole text.
    - ``thought_tokens``: those of the thought, which are among ``tokens``.
    - ``nll``: the mean negative log-likelihood of the response under the *unsteered* model given
      its prompt, in nats per token. The prompt is the condition's, without the ``prefix``.
    """

    problem: str
    content: str
    steering: str
    text: str
    token_ids: tuple[int, ...]
    steps: int
    finish_reason: str
    correct: bool
    found: str | None
    by_reference: bool
    by_math_verify: bool | None
    seconds: float
    nll: float | None = None
    compute_seconds: float | None = None
    said: str | None = None
    thought_tokens: int = 0

    @property
    def key(self) -> Key:
        """Identify the answer."""
        return self.problem, self.content, self.steering

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def lacks_nll(self) -> bool:
        """Whether the NLL is still to be computed; an empty response has none."""
        return self.nll is None and bool(self.token_ids)


OnAnswers = Callable[[list[Answer], int], None]  # answers so far, tokens generated in this run


class AnswerOptions(TypedDict, total=False):
    """The options of ``answer``; ``evaluate`` and ``sweep`` pass them on.

    Keys:
        journal: keeps every answer as it comes; what it holds is not answered again.
        system: system message.
        max_tokens: longest response. [2048]
        rows: responses that are generated together; memory grows with it. [16]
        with_nll: compute the NLL of each response. [True]
        think_limit: end a thought of so many tokens by force.
        progress: called now and then.
    """

    journal: Journal | None
    system: str | None
    max_tokens: int
    rows: int
    with_nll: bool
    think_limit: int | None
    progress: OnAnswers


class Answerer(Protocol):
    """A function that answers problems: ``answer``, or one that spreads the work over ranks."""

    def __call__(
        self,
        model: Model,
        problems: Sequence[Problem],
        conditions: Sequence[Under],
        **options: Unpack[AnswerOptions],
    ) -> list[Answer]: ...


def journal_header(
    model: Model, max_tokens: int, system: str | None = None, think_limit: int | None = None
) -> dict[str, object]:
    """Return the settings that runs with one journal share: all but problems and conditions."""
    info = model.info
    return {
        "format": FORMAT,
        "model": info.name,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "chat_template_sha256": model.chat_template_sha256,
        "system": system,
        "max_tokens": max_tokens,
        **({} if think_limit is None else {"think_limit": think_limit}),
    }


def answer(
    model: Model,
    problems: Sequence[Problem],
    conditions: Sequence[Under],
    journal: Journal | None = None,
    *,
    system: str | None = None,
    max_tokens: int = 2048,
    rows: int = ROWS,
    with_nll: bool = True,
    think_limit: int | None = None,
    progress: OnAnswers = lambda answers, tokens: None,
) -> list[Answer]:
    """Return the responses to all problems under all conditions, problem by problem.

    They are greedy unless a condition samples. Answers in the journal are taken from there and graded
    anew; the others are added to it. The order is by problem, so the conditions of an interrupted run
    can be compared on its whole problems.

    Raises:
        InputError: a prefix leaves no room below ``max_tokens``.
        ModelError: an NLL is not finite. The answers are kept.
    """
    wanted = keys_of(problems, conditions)
    by_print = {one.fingerprint: one for one in map(Condition.of, conditions)}
    by_id = {problem.id: problem for problem in problems}
    there = read_answers(journal, model.vocabulary) if journal else {}
    found = {  # graded again: math-verify (extra ``eval``) may be new here
        key: replace(there[key], **asdict(_grade(by_id[key[0]], there[key].text, there[key].said)))
        for key in wanted
        if key in there
    }
    missing = [key for key in wanted if key not in found]
    prefixes = {name: encode_answer(model.tokenizer, one.prefix) for name, one in by_print.items()}
    if long := [name for name, ids in prefixes.items() if len(ids) >= max_tokens]:
        raise InputError(
            f"the prefix {one_line(by_print[long[0]].prefix)} has {len(prefixes[long[0]])} tokens, and a "
            f"response at most {max_tokens}: choose a shorter one."
        )
    generated = 0

    def prompt(key: Key) -> list[int]:
        return prompt_tokens(model, by_id[key[0]], by_print[key[2]], system)

    def tell(tokens: int) -> None:
        nonlocal generated
        generated = tokens
        progress(list(found.values()), tokens)

    runs = generate_batch(
        model,
        [prompt(key) + prefixes[key[2]] for key in missing],
        steering=[by_print[key[2]].steering for key in missing],
        max_tokens=[max_tokens - len(prefixes[key[2]]) for key in missing],
        sampling=[by_print[key[2]].seeded(by_id[key[0]]) or GREEDY for key in missing],
        think_limit=think_limit,
        rows=rows,
        progress=tell,
    )
    for index, generation in runs:
        key = missing[index]
        prefix = by_print[key[2]].prefix, prefixes[key[2]]
        found[key] = _graded(by_id[key[0]], key, generation, *prefix)
        if journal:
            journal.append(asdict(found[key]))
        progress(list(found.values()), generated)
    if with_nll:
        todo = [key for key in wanted if found[key].lacks_nll]
        for first in range(0, len(todo), LIKELIHOODS):
            part = todo[first : first + LIKELIHOODS]
            responses = [found[key].token_ids for key in part]
            values = nll(model.network, list(map(prompt, part)), responses)
            _check_finite(part, values)
            for key, value in zip(part, values, strict=True):
                found[key] = replace(found[key], nll=value)
                if journal:
                    journal.append({"nll_of": list(key), "nll": value})
        progress(list(found.values()), generated)
    return [found[key] for key in wanted]


def _check_finite(keys: Sequence[Key], values: Sequence[float]) -> None:
    for key, value in zip(keys, values, strict=True):
        if not isfinite(value):
            raise ModelError(
                f"the NLL of the response to {key[0]} is not finite: the model overflows its dtype. "
                "Convert it with the dtype bfloat16 or float32, or leave the NLL out."
            )


def prompt_tokens(
    model: Model, problem: Problem, condition: Condition, system: str | None = None
) -> list[int]:
    """Return the token ids of what ``problem`` is asked as, without the ``prefix`` of the response.

    Raises:
        InputError, ContextError, ModelError: what the model's chat template or context cannot take.
    """
    system, question = condition.system(system), condition.question(problem)
    texts = [text for turn in condition.turns for text in turn]
    model.check_length(system, *texts, question, what=f"the prompt of {problem.id}")
    check_prompt(model.tokenizer, question, system=system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, response in condition.turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": response})
    messages.append({"role": "user", "content": question})
    return encode_chat(model.tokenizer, render_chat(model.tokenizer, messages))


def keys_of(problems: Iterable[Problem], conditions: Iterable[Under]) -> list[Key]:
    """Return the keys of all answers, once each, problem by problem."""
    prints = [Condition.of(one).fingerprint for one in conditions]
    return list(dict.fromkeys((p.id, _content(p), one) for p in problems for one in prints))


# what older journals lack
_ADDED = {"nll": None, "compute_seconds": None, "said": None, "thought_tokens": 0}
_KINDS = get_type_hints(Answer) | {"token_ids": list | tuple}  # a tuple if this run made it


def read_answers(journal: Journal, vocabulary: int) -> dict[Key, Answer]:
    """Return the answers that a journal holds, each with its NLL.

    Raises:
        InputError: a record is no answer of a model with ``vocabulary`` tokens.
    """
    answers: dict[Key, Answer] = {}
    for number, record in enumerate(journal.records, 2):
        try:
            if "nll_of" in record:
                check_fields(record, nll_of=list, nll=float)
                key = tuple(record["nll_of"])
                if key in answers:
                    answers[key] = replace(answers[key], nll=record["nll"])
            else:
                check_fields(_ADDED | record, **_KINDS)
                ids = token_ids(record["token_ids"], vocabulary)
                made = Answer(**(record | {"token_ids": ids}))
                answers[made.key] = made
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_record(journal, number, "answer", error) from error
    return answers


def by_steering(answers: Iterable[Answer]) -> dict[str, dict[str, Answer]]:
    """Return ``{fingerprint: {problem id: answer}}``."""
    table: dict[str, dict[str, Answer]] = {}
    for one in answers:
        table.setdefault(one.steering, {})[one.problem] = one
    return table


def _content(problem: Problem) -> str:
    text = json.dumps([problem.prompt, problem.answer, problem.rule], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _grade(problem: Problem, text: str, said: str | None) -> Grade:
    return grade(problem, text if said is None else said)


def _graded(
    problem: Problem, key: Key, generation: Generation, prefix: str, prefix_ids: Sequence[int]
) -> Answer:
    text = prefix + generation.text
    seconds = generation.time_to_first_token
    if generation.tokens_per_second:
        seconds += generation.tokens / generation.tokens_per_second
    said = None if generation.thought is None else generation.answer
    return Answer(
        *key,
        text=text,
        said=said,
        thought_tokens=generation.thought_tokens,
        token_ids=(*prefix_ids, *generation.token_ids),
        steps=len(split_steps(text)),
        finish_reason=generation.finish_reason,
        seconds=round(seconds, 3),
        compute_seconds=round(generation.compute_seconds or 0.0, 6),
        **asdict(_grade(problem, text, said)),
    )
