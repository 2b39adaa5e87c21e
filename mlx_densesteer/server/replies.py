"""OpenAI's response bodies, whole and in chunks, with the steering and the density."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from ..evaluation.grading import stated_answer
from ..generation.answer import Generation, density, step_starts
from ..generation.batch import TokenLogprob
from ..generation.calls import CallReader, ToolCall
from .worker import Said

LEAST = -9999.0  # OpenAI's log-probability of an impossible token; JSON has no infinity


@dataclass
class _Choice:
    """One answer while it is generated."""

    prompt: str  # with which it begins, until that is told
    reader: CallReader | None
    result: Generation | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    length: int = 0  # characters with log-probabilities that were told
    thought: int = 0  # characters of the thought that were told
    answer: int = 0  # characters of the answer that were read
    content: str = ""  # the answer without its tool calls

    def echo(self) -> str:
        """Return the prompt, once."""
        prompt, self.prompt = self.prompt, ""
        return prompt

    def delta(self, thought: str | None, answer: str) -> dict[str, object]:
        """Return what is new of an answer."""
        thought, result = thought or "", self.result
        new: dict[str, object] = {"reasoning_content": thought[self.thought :]}
        content = answer[self.answer :]
        self.thought, self.answer = len(thought), len(answer)
        if self.reader is not None:
            first = len(self.reader.calls)
            stopped = result is not None and result.finish_reason == "stop"
            content, calls = self.reader.read(answer, ended=result is not None, stopped=stopped)
            new["tool_calls"] = [
                {"index": number} | _call(one) for number, one in enumerate(calls, first)
            ]
        self.content += content
        new["content"] = content
        return {name: value for name, value in new.items() if value}

    def message(self) -> dict[str, object]:
        """Return the message of an answer that is not streamed."""
        result = self.result
        new = self.delta(result.thought, result.answer)
        calls = [
            {k: v for k, v in one.items() if k != "index"} for one in new.get("tool_calls", ())
        ]
        content = new.get("content", None if calls else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        if result.thought is not None:
            message["reasoning_content"] = result.thought
        return message

    def ended(self, *, chat: bool) -> dict[str, object]:
        """Return why an answer ended, where its steps begin, the answer that it marks, and its brakes."""
        result = self.result
        text = self.content if chat else result.text
        called = self.reader is not None and self.reader.calls and result.finish_reason == "stop"
        found = {
            "finish_reason": "tool_calls" if called else result.finish_reason,
            "step_starts": step_starts(text),
            "stated_answer": stated_answer(text),
        }
        if result.gave_up:
            found["gave_up"] = True
        if result.brakes:
            found["brakes"] = [asdict(one) for one in result.brakes]
        if result.thought_limit is not None:
            found["thinking_limit"] = result.thought_limit
        return found


@dataclass
class Completion:
    """The response to one chat or completion request, while its choices are generated.

    Args:
        choices: number of answers, ``n`` for each prompt.
        steering: what is applied, as JSON; ``None`` is the stock model.
        with_usage: end the stream with the usage; its other chunks have ``"usage": null``.
        calls: makes a reader of the tool calls in one answer; ``None`` if there are no tools.
        echo: the prompts, if each answer begins with its own.
    """

    chat: bool
    model: str
    fingerprint: str
    choices: int
    n: int
    token_bytes: Callable[[int], bytes]
    steering: dict[str, object] | None = None
    with_usage: bool = False
    calls: Callable[[], CallReader] | None = None
    echo: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._began, self._first = time.perf_counter(), 0.0
        self._cached: dict[int, int] = {}  # tokens, by the prompt's first choice
        self._choices = [
            _Choice(self.echo[i // self.n] if self.echo else "", self.calls and self.calls())
            for i in range(self.choices)
        ]

    def add(self, first: int, said: Said) -> None:
        """Add a piece of one choice; ``first`` is the first choice of the same prompt."""
        self._first = self._first or time.perf_counter() - self._began
        self._cached[first] = said.cached_tokens
        choice = self._choices[said.choice]
        choice.logprobs += said.piece.logprobs
        choice.result = said.piece.result

    @property
    def complete(self) -> bool:
        return all(choice.result for choice in self._choices)

    def whole(self, with_logprobs: bool) -> dict[str, object]:
        """Return the body of a response that is not streamed."""
        choices = []
        for index, choice in enumerate(self._choices):
            logprobs = self._logprobs(choice, choice.logprobs) if with_logprobs else None
            told: dict[str, object] = {"index": index}
            if self.chat:
                told["message"] = choice.message()
            else:
                told["text"] = choice.echo() + choice.result.text
            choices.append(told | {"logprobs": logprobs} | choice.ended(chat=self.chat))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage(), "steering": self.steering}

    def opening(self) -> list[dict[str, object]]:
        """Return the first chunks of a stream: the role, and the steering."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            for i in range(len(self._choices))
        ]
        return [self._chunk(choices) | {"steering": self.steering}]

    def chunks(self, said: Said) -> list[dict[str, object]]:
        """Return one piece as a chunk, or none while it has nothing to tell; a choice's last one says why it ended.

        Tool calls are in a chunk without text: Continue reads one or the other.
        """
        choice, piece, chunks = self._choices[said.choice], said.piece, []
        logprobs = self._logprobs(choice, piece.logprobs) if piece.logprobs else None
        told: dict[str, object] = {
            "index": said.choice,
            "logprobs": logprobs,
            "finish_reason": None,
        }
        if self.chat:
            delta = choice.delta(*piece.shown)
            if "content" in delta and "tool_calls" in delta:
                chunks = [self._chunk([told | {"delta": {"content": delta.pop("content")}}])]
                told["logprobs"] = None
            told["delta"] = delta
        else:
            told["text"] = choice.echo() + piece.text
        if piece.result is None:
            silent = self.chat and not told["delta"] and not logprobs  # a call that is not whole
            return chunks if silent else [*chunks, self._chunk([told])]
        told |= choice.ended(chat=self.chat)
        return [*chunks, self._chunk([told]) | {"steering": self.steering}]

    def last(self) -> dict[str, object]:
        """Return the chunk that carries the usage."""
        return self._chunk([]) | {"usage": self.usage(), "steering": self.steering}

    def usage(self) -> dict[str, object]:
        """Return the tokens of prompts and answers, the steps and the density.

        The time to the first token starts at the request, so it includes the queue.
        """
        results = [choice.result for choice in self._choices if choice.result]
        prompt = sum(result.prompt_tokens for result in results[:: self.n])
        written, steps = sum(r.tokens for r in results), sum(r.steps for r in results)
        found = density(written, steps)
        rates = [r.tokens_per_second for r in results if r.tokens > 1]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {
                "reasoning_tokens": sum(r.thought_tokens for r in results),
                "steps": steps,
                "density": None if found is None else round(found, 2),
                "tokens_per_second": round(sum(rates) / len(rates), 2) if rates else None,
                "time_to_first_token": round(self._first, 3),
            },
        }

    def _chunk(self, choices: Sequence[dict[str, object]]) -> dict[str, object]:
        chunk = self._frame("chat.completion.chunk" if self.chat else "text_completion", choices)
        return chunk | {"usage": None} if self.with_usage else chunk

    def _frame(self, kind: str, choices: Sequence[dict[str, object]]) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }

    def _logprobs(self, choice: _Choice, found: Sequence[TokenLogprob]) -> dict[str, object]:
        if self.chat:
            return {"content": [self._chat_logprob(one) for one in found], "refusal": None}
        offsets = []
        for one in found:
            offsets.append(choice.length)
            choice.length += len(one.text)
        return {
            "tokens": [one.text for one in found],  # joined, they are the text
            "token_logprobs": [
                None if one.logprob is None else max(one.logprob, LEAST) for one in found
            ],
            "top_logprobs": [self._top(one) for one in found],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float] | None:
        """Return the likeliest tokens by their text; the token itself is among them, as ``tokens`` names it."""
        if one.logprob is None:
            return None
        found = {self._text(t): max(p, LEAST) for t, p in one.top if t != one.token}
        return found | {one.text: max(one.logprob, LEAST)}

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, object]:
        return self._entry(one.token, one.logprob) | {
            "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        return {
            "token": self._text(token),
            "logprob": max(logprob, LEAST),
            "bytes": list(self.token_bytes(token)),
        }

    def _text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")


def _call(one: ToolCall) -> dict[str, object]:
    number = one.id or f"call_{uuid.uuid4().hex[:24]}"
    function = {"name": one.name, "arguments": one.arguments}
    return {"id": number, "type": "function", "function": function}
