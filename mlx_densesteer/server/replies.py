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

TokenBytes = Callable[[int], bytes]

LEAST = -9999.0  # OpenAI's log-probability of an impossible token; JSON has no infinity


@dataclass
class Completion:
    """The response to one chat or completion request, while its choices are generated.

    Args:
        choices: number of answers, ``n`` for each prompt.
        steering: what is applied, as JSON; ``None`` is the stock model.
        with_usage: end the stream with the usage; its other chunks have ``"usage": null``.
        echo: the prompts, if each answer begins with its own.
        calls: makes a reader of the tool calls in one answer; ``None`` if there are no tools.
    """

    chat: bool
    model: str
    fingerprint: str
    choices: int
    n: int
    token_bytes: TokenBytes
    steering: dict[str, object] | None = None
    with_usage: bool = False
    calls: Callable[[], CallReader] | None = None
    echo: Sequence[str] = ()
    results: dict[int, Generation] = field(default_factory=dict)  # by choice
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # by choice
    cached: dict[int, int] = field(default_factory=dict)  # tokens, by the prompt's first choice

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._began, self._first = time.perf_counter(), 0.0
        self._lengths: dict[int, int] = {}  # characters with log-probabilities so far, by choice
        self._told: dict[int, tuple[int, int]] = {}  # characters of thought and answer, by choice
        self._readers: dict[int, CallReader] = {}  # by choice
        self._echoed: set[int] = set()
        self._contents: dict[int, str] = {}  # the answers without their tool calls, by choice

    def add(self, first: int, said: Said) -> None:
        """Add a piece of one choice; ``first`` is the first choice of the same prompt."""
        self._first = self._first or time.perf_counter() - self._began
        self.cached[first] = said.cached_tokens
        self.logprobs.setdefault(said.choice, []).extend(said.piece.logprobs)
        if said.piece.result:
            self.results[said.choice] = said.piece.result

    @property
    def complete(self) -> bool:
        return len(self.results) == self.choices

    def whole(self, with_logprobs: bool) -> dict[str, object]:
        """Return the body of a response that is not streamed."""
        choices = []
        for index in sorted(self.results):
            result = self.results[index]
            logprobs = self._logprobs(index, self.logprobs[index]) if with_logprobs else None
            choice: dict[str, object] = {"index": index}
            if self.chat:
                choice["message"] = self._message(index, result)
            else:
                choice["text"] = self._echo(index) + result.text
            choices.append(choice | {"logprobs": logprobs} | self._ended(index, result))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage(), "steering": self.steering}

    def opening(self) -> list[dict[str, object]]:
        """Return the first chunks of a stream: the role, and the steering."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            for i in range(self.choices)
        ]
        return [self._chunk(choices) | {"steering": self.steering}]

    def chunks(self, said: Said) -> list[dict[str, object]]:
        """Return one piece as a chunk, or none while it has nothing to tell; a choice's last one says why it ended.

        Tool calls are in a chunk without text: Continue reads one or the other.
        """
        index, piece, chunks = said.choice, said.piece, []
        logprobs = self._logprobs(index, piece.logprobs) if piece.logprobs else None
        choice: dict[str, object] = {"index": index, "logprobs": logprobs, "finish_reason": None}
        if self.chat:
            delta = self._delta(index, *piece.shown, piece.result)
            if "content" in delta and "tool_calls" in delta:
                chunks = [self._chunk([choice | {"delta": {"content": delta.pop("content")}}])]
                choice["logprobs"] = None
            choice["delta"] = delta
        else:
            choice["text"] = self._echo(index) + piece.text
        if piece.result is None:
            silent = self.chat and not choice["delta"] and not logprobs  # a call that is not whole
            return chunks if silent else [*chunks, self._chunk([choice])]
        choice |= self._ended(index, piece.result)
        return [*chunks, self._chunk([choice]) | {"steering": self.steering}]

    def _echo(self, choice: int) -> str:
        """Return the prompt, once for each choice."""
        if not self.echo or choice in self._echoed:
            return ""
        self._echoed.add(choice)
        return self.echo[choice // self.n]

    def _delta(
        self, choice: int, thought: str | None, answer: str, result: Generation | None = None
    ) -> dict[str, object]:
        """Return what is new of an answer; ``result`` once it is whole."""
        thought = thought or ""
        of_thought, of_answer = self._told.get(choice, (0, 0))
        self._told[choice] = len(thought), len(answer)
        new: dict[str, object] = {"reasoning_content": thought[of_thought:]}
        new["content"] = answer[of_answer:]
        if self.calls is not None:
            reader = self._readers.setdefault(choice, self.calls())
            first = len(reader.calls)
            stopped = result is not None and result.finish_reason == "stop"
            new["content"], calls = reader.read(answer, ended=result is not None, stopped=stopped)
            new["tool_calls"] = [
                {"index": number} | _call(one) for number, one in enumerate(calls, first)
            ]
        self._contents[choice] = self._contents.get(choice, "") + new["content"]
        return {name: value for name, value in new.items() if value}

    def _message(self, choice: int, result: Generation) -> dict[str, object]:
        new = self._delta(choice, result.thought, result.answer, result)
        calls = [
            {k: v for k, v in one.items() if k != "index"} for one in new.get("tool_calls", ())
        ]
        content = new.get("content", None if calls else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return (
            message if result.thought is None else message | {"reasoning_content": result.thought}
        )

    def _ended(self, choice: int, result: Generation) -> dict[str, object]:
        """Return why an answer ended, where its steps begin, the answer that it marks, and its brakes."""
        text = self._contents.get(choice, "") if self.chat else result.text
        called = choice in self._readers and self._readers[choice].calls
        reason = "tool_calls" if called and result.finish_reason == "stop" else result.finish_reason
        found = {
            "finish_reason": reason,
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

    def last(self) -> dict[str, object]:
        """Return the chunk that carries the usage."""
        return self._chunk([]) | {"usage": self.usage(), "steering": self.steering}

    def usage(self) -> dict[str, object]:
        """Return the tokens of prompts and answers, the steps and the density.

        The time to the first token starts at the request, so it includes the queue.
        """
        results = list(self.results.values())
        prompt = sum(self.results[i].prompt_tokens for i in range(0, self.choices, self.n))
        written, steps = sum(r.tokens for r in results), sum(r.steps for r in results)
        found = density(written, steps)
        rates = [r.tokens_per_second for r in results if r.tokens > 1]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
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

    def _logprobs(self, choice: int, found: Sequence[TokenLogprob]) -> dict[str, object]:
        if self.chat:
            return {"content": [self._chat_logprob(one) for one in found], "refusal": None}
        offsets, at = [], self._lengths.get(choice, 0)
        for one in found:
            offsets.append(at)
            at += len(one.text)
        self._lengths[choice] = at
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
