"""Encode messages and text as token ids, and write tokens as bytes for log-probabilities."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ContextError, InputError
from ..model.model import Model
from ..model.prompt import decode, encode_chat, encode_prompt, render_chat
from .faults import bad
from .schema import ChatRequest, CompletionRequest, Message


class Encoder:
    """Encodes on its own thread, so that a long prompt blocks neither the loop nor the model."""

    def __init__(self, model: Model):
        self._model, self._tokenizer = model, model.tokenizer
        self._vocabulary = model.vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")

    async def encode(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt of a request.

        Raises:
            Fault: an empty prompt, one that is too long, or an unknown token id.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, request)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes: exact for a byte-level vocabulary, else those of its text."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is not None and all(c in self._byte_of for c in name):
            return bytes(self._byte_of[c] for c in name)
        return decode(self._tokenizer, [token]).encode()

    def _encode(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        if isinstance(request, ChatRequest):
            return [self._check(self._chat(request.messages), "messages")]
        prompt = request.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return [self._prompt(one) for one in (prompt if several else [prompt])]

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of one text or of one list of token ids."""
        if isinstance(prompt, str):
            self._check_length([prompt], "prompt")
            return self._check(self._tokenizer.encode(prompt) if prompt else [], "prompt")
        if max(prompt) >= self._vocabulary:
            raise bad(f"a token id is too large: expected less than {self._vocabulary}.", "prompt")
        return self._check(list(prompt), "prompt")

    def _check_length(self, texts: Sequence[str], param: str) -> None:
        try:
            self._model.check_length(*texts)
        except ContextError as error:
            raise bad(str(error), param, "context_length_exceeded") from error

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        if not self._tokenizer.has_chat_template:
            raise bad("this model has no chat template: use /v1/completions.", "messages")
        if not any(one.role == "user" and one.text.strip() for one in messages):
            raise bad("no message of the user has text: expected at least one.", "messages")
        self._check_length([one.text for one in messages], "messages")
        plain = [
            {"role": "system" if one.role == "developer" else one.role, "content": one.text}
            for one in messages
        ]
        try:
            return encode_chat(self._tokenizer, render_chat(self._tokenizer, plain))
        except InputError as error:
            raise bad(str(error), "messages") from error

    def _check(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise bad("the prompt is empty: expected at least one token.", param)
        try:
            self._model.room(len(tokens), 1)
        except ContextError as error:
            raise bad(str(error), param, "context_length_exceeded") from error
        return tokens

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte of each character in a byte-level vocabulary's names (GPT-2's table).

        A printable character of Latin-1 is itself; U+0100 and on are the other bytes, in order.
        """
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def opening_tokens(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Return the special token that begins a message, if the chat template has one.

    Raises:
        ModelError: the chat template cannot be used.
    """
    if not tokenizer.has_chat_template:
        return frozenset()
    first = encode_prompt(tokenizer, "?")[0]
    return frozenset([first]) & frozenset(tokenizer.get_added_vocab().values())
