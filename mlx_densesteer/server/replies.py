"""OpenAI's answers, whole and in chunks, with what was applied and the density receipt."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..generation.answer import Generation, density
from ..generation.batch import Piece, TokenLogprob

TokenBytes = Callable[[int], bytes]

LEAST = -9999.0  # OpenAI's word for a token that cannot come; JSON has no infinity


@dataclass
class ApiAnswer:
    """One answer of the API as it comes: to chat or to a plain prompt, with one choice or several."""

    chat: bool
    model: str
    fingerprint: str
    choices: int
    n: int  # of each prompt
    token_bytes: TokenBytes
    steering: dict[str, object] | None = None
    cached: dict[int, int] = field(default_factory=dict)  # by prompt
    with_usage: bool = False  # a stream that ends with the usage says null in its other chunks
    results: dict[int, Generation] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._began, self._first = time.perf_counter(), 0.0
        self._lengths: dict[int, int] = {}  # characters told with log-probabilities, by choice

    def add(self, choice: int, piece: Piece) -> None:
        """Take in a piece of one choice."""
        self._first = self._first or time.perf_counter() - self._began
        self.logprobs.setdefault(choice, []).extend(piece.logprobs)
        if piece.result:
            self.results[choice] = piece.result

    @property
    def complete(self) -> bool:
        return len(self.results) == self.choices

    def whole(self, with_logprobs: bool) -> dict[str, object]:
        """Return the answer as one object."""
        choices = []
        for index in sorted(self.results):
            result = self.results[index]
            logprobs = self._logprobs(index, self.logprobs[index]) if with_logprobs else None
            choice: dict[str, object] = {"index": index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
            else:
                choice["text"] = result.text
            choices.append(choice | {"logprobs": logprobs, "finish_reason": result.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind, choices) | {"usage": self.usage(), "steering": self.steering}

    def opening(self) -> list[dict[str, object]]:
        """Return the chunks with which a stream begins: who speaks, and what is applied."""
        if not self.chat:
            return []
        choices = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
             "finish_reason": None}
            for i in range(self.choices)
        ]  # fmt: skip
        return [self._chunk(choices) | {"steering": self.steering}]

    def chunk(self, index: int, piece: Piece) -> dict[str, object]:
        """Return one piece as a chunk; the last one of a choice says why it ended."""
        logprobs = self._logprobs(index, piece.logprobs) if piece.logprobs else None
        said = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        if self.chat and not piece.text:
            said = {"delta": {}}
        reason = piece.result.finish_reason if piece.result else None
        chunk = self._chunk(
            [{"index": index} | said | {"logprobs": logprobs, "finish_reason": reason}]
        )
        return chunk | {"steering": self.steering} if piece.result else chunk

    def last(self) -> dict[str, object]:
        """Return the chunk that carries the usage."""
        return self._chunk([]) | {"usage": self.usage(), "steering": self.steering}

    def usage(self) -> dict[str, object]:
        """Return tokens read and written, and the density receipt.

        Seconds to the first token count from the request, time in the queue included.
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
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": list(choices),
        }  # fmt: skip

    def _logprobs(self, choice: int, found: Sequence[TokenLogprob]) -> dict[str, object]:
        if self.chat:
            return {"content": [self._chat_logprob(one) for one in found], "refusal": None}
        offsets, at = [], self._lengths.get(choice, 0)
        for one in found:
            offsets.append(at)
            at += len(self._text(one.token))
        self._lengths[choice] = at
        return {
            "tokens": [self._text(one.token) for one in found],
            "token_logprobs": [max(one.logprob, LEAST) for one in found],
            # the token itself is always among them
            "top_logprobs": [
                {self._text(t): max(p, LEAST) for t, p in (*one.top, (one.token, one.logprob))}
                for one in found
            ],
            "text_offset": offsets,
        }

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, object]:
        return self._entry(one.token, one.logprob) | {
            "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        return {
            "token": self._text(token), "logprob": max(logprob, LEAST), "bytes": list(self.token_bytes(token)),
        }  # fmt: skip

    def _text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")
