"""Text to token ids and back: prompts, conversations in the chat template, answers.

A user's text is not control. What a message says is encoded without control tokens: ``<|im_end|>`` in a
message becomes the tokens of these ten characters. Only the chat template writes control tokens.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError, ModelError
from ..text import cause, one_line

# Role and content; perhaps ``tool_calls`` and ``tool_call_id``.
Message = Mapping[str, object]

# Lone surrogates: no valid text holds one, so no message can forge them.
TEXT = "\udc00"  # the control token that follows is text
_OPEN, _CLOSE = "\udc01", "\udc02"
_MASK = "\ufdd0"  # a noncharacter: where it stands is a message in any case

_QUESTION = {"role": "user", "content": "?"}
_ANSWER = "answer0mark0."
_THOUGHT = "thought0mark0."


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    system: str | None = None,
    raw: bool = False,
    special_tokens: bool = False,
) -> list[int]:
    """Return the token ids of one user turn in the chat template, or with ``raw`` of the text alone.

    ``system`` is the system message; without one, Qwen2.5's template adds its own. Token ids are
    returned unchanged. With ``special_tokens`` the text of a control token, such as ``<|im_end|>``, becomes
    that token; with ``raw`` it always does.

    Raises:
        InputError: an empty prompt, ``system`` with ``raw``, a tokenizer without a chat template, or
            a conversation that the template refuses.
        ModelError: the chat template cannot be used.
    """
    if not isinstance(prompt, str):
        if not len(prompt):
            raise InputError("a prompt has no tokens; expected at least one.")
        try:
            return list(map(operator.index, getattr(prompt, "tolist", lambda: prompt)()))
        except TypeError:
            raise InputError(
                "the prompt has a token that is no whole number; expected token ids."
            ) from None
    check_prompt(tokenizer, prompt, system=system, raw=raw)
    if raw:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if special_tokens:
        return tokenizer.encode(_render(tokenizer, messages), add_special_tokens=False)
    return encode_chat(tokenizer, render_chat(tokenizer, messages))


def check_prompt(
    tokenizer: TokenizerWrapper, prompt: str, *, system: str | None = None, raw: bool = False
) -> None:
    """Raise ``InputError`` for text that ``encode_prompt`` cannot encode."""
    _check_unicode((prompt, system or ""))
    if not prompt.strip():
        raise InputError("the prompt is empty; give it as an argument or on standard input.")
    if raw and system is not None:
        raise InputError("a system message needs the chat template; it cannot go with raw.")
    if not raw and not tokenizer.has_chat_template:
        raise InputError("the model has no chat template; use raw for plain text.")


def render_chat(tokenizer: TokenizerWrapper, messages: Sequence[Message], **options: object) -> str:
    """Return a conversation as text in the chat template, for ``encode_chat``.

    ``TEXT`` precedes what would be read as a control token and is not the template's alone. For this the
    conversation is rendered a second time with its messages masked: a place that then differs is a
    message's, wherever the template puts it and whatever else it does to it.

    Args:
        messages: each with ``role`` and ``content``; perhaps ``tool_calls``, as OpenAI has them but with
            arguments that are not JSON text.
        options: of the tokenizer's ``apply_chat_template``, by default ``add_generation_prompt=True``. The texts
            of ``tools``, and ids and names of calls, must not have control tokens.

    Raises:
        InputError: the template refuses this conversation, or reads the text of control tokens in
            a way that leaves their origin open.
        ModelError: the chat template cannot be used.
    """
    contents = _strings([[one["content"], _arguments(one)] for one in messages])
    names = _strings([options.get("tools"), *map(_names, messages)])
    _check_unicode([*contents, *names])
    control = _control(tokenizer)
    if any(map(control.token.search, names)):
        raise InputError(
            "a tool, or the id or name of a call, has the text of a control token, such as <|im_end|>. Leave "
            "it out."
        )
    whole = _render(tokenizer, messages, **options)
    # A template may look for words in a message, or for a token (a reasoning model's drops all before
    # </think>). So the second attempt masks tokens alone, and the third leaves them, between marks.
    for guard, mask in (
        (str, lambda content: _mask(control.mask(content))),
        (str, control.mask),
        (control.guard, _mask),
    ):
        guarded = [_changed(message, guard) for message in messages]
        try:
            text = whole if guard is str else _render(tokenizer, guarded, **options)
            masked = [_changed(message, mask) for message in guarded]
            masked = _render(tokenizer, masked, **options)
        except (InputError, ModelError):
            continue
        if _is_masked(text, masked):
            return control.mark(text, masked)
    if any(map(control.token.search, contents)):
        raise InputError(
            "a message has the text of a control token, such as <|im_end|>, and the model's chat template "
            "changes the message by what it says. Leave the token out."
        )
    return whole


def encode_chat(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of what ``render_chat`` returned, or of a part of it.

    Text without ``TEXT`` is encoded as the stock tokenizer does it. Else the text between two control
    tokens that holds one as text is encoded as if the tokenizer had no such tokens.

    Raises:
        InputError: the tokenizer makes a control token of text that does not look like one.
    """
    control = _control(tokenizer)
    ids: list[int] = []
    as_ever = ""
    for part in control.token.split(text):  # text, token, text, token, ..., text
        if TEXT in part:
            ids += _encode(tokenizer, as_ever) + _encode_text(tokenizer, part.replace(TEXT, ""))
            as_ever = ""
        else:
            as_ever += part
    ids += _encode(tokenizer, as_ever)
    if sum(map({*control.ids.values()}.__contains__, ids)) > len(control.token.findall(text)):
        raise InputError(
            "the tokenizer makes a control token of text in a message. Leave the text of control tokens, "
            "such as <|im_end|>, out of the message."
        )
    return ids


def encode_text(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of a message's text alone, without control tokens."""
    control = _control(tokenizer)
    return encode_chat(tokenizer, control.token.sub(rf"{TEXT}\1", text))


def encode_answer(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of a model's response: as ``encode_text``, but with the marks around its thought."""
    marks = [mark for mark in (tokenizer.think_start, tokenizer.think_end) if mark]
    if not marks:
        return encode_text(tokenizer, text)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, marks))})", text):
        if part in marks:
            ids += tokenizer.encode(part, add_special_tokens=False)
        elif part:
            ids += encode_text(tokenizer, part)
    return ids


def decode(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """Return the text of token ids, control tokens included, exactly as the model wrote it."""
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)


def end_of_turn(tokenizer: TokenizerWrapper) -> int | None:
    """Return the control token with which the chat template ends an answer, if generation goes on after it.

    A base model's checkpoint often has a chat template, and an end token that the template does not use.
    ``None`` if one of ``eos_token_ids`` ends the template's answers, or it has no end.
    """
    if not tokenizer.has_chat_template:
        return None
    messages = [_QUESTION, {"role": "assistant", "content": _ANSWER}, _QUESTION]
    try:
        text = _render(tokenizer, messages, add_generation_prompt=False)
    except (InputError, ModelError):
        return None  # told when the template is needed
    _, found, rest = text.partition(_ANSWER)
    control = _control(tokenizer)
    ids = [control.ids[token] for token in control.token.findall(rest.partition("?")[0])]
    return None if not found or tokenizer.eos_token_ids & {*ids} else next(iter(ids), None)


def turn_tokens(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Return the control tokens with which the chat template surrounds a question.

    Raises:
        ModelError: the chat template cannot be used.
    """
    if not tokenizer.has_chat_template:
        return frozenset()
    control = _control(tokenizer)
    return frozenset(control.ids[t] for t in control.token.findall(_render(tokenizer, [_QUESTION])))


def opening_tokens(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Return the control token that begins a message, if the chat template has one.

    Raises:
        ModelError: the chat template cannot be used.
    """
    if not tokenizer.has_chat_template:
        return frozenset()
    first = encode_prompt(tokenizer, "?")[0]
    return frozenset([first]) & frozenset(tokenizer.get_added_vocab().values())


def bytes_of_token(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """Return a token's bytes: exact for a byte-level vocabulary, else those of its text."""
    name, table = tokenizer.convert_ids_to_tokens(token), _byte_of()
    if name is not None and all(c in table for c in name):
        return bytes(table[c] for c in name)
    return decode(tokenizer, [token]).encode()


@cache
def _byte_of() -> dict[str, int]:
    """Return the byte of each character in a byte-level vocabulary's names (GPT-2's table).

    A printable character of Latin-1 is itself; U+0100 and on are the other bytes, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def check_ids(tokens: Sequence[int], vocabulary: int, what: str) -> None:
    """Raise ``InputError`` unless every token, a whole number, is one of the model's ``vocabulary``.

    mlx would read memory beyond its rows.
    """
    if not len(tokens) or (min(tokens) >= 0 and max(tokens) < vocabulary):
        return
    strange = next(token for token in tokens if not 0 <= token < vocabulary)
    raise InputError(
        f"{what} has the token {strange}: the model knows 0 to {vocabulary - 1}. Use the ids of this "
        "model's tokenizer."
    )


def drops_thoughts(tokenizer: TokenizerWrapper) -> bool:
    """Tell whether the chat template leaves the thoughts of earlier answers out of a conversation."""
    if not tokenizer.has_thinking or not tokenizer.has_chat_template:
        return False
    thought = f"{tokenizer.think_start}\n{_THOUGHT}\n{tokenizer.think_end}\n\n{_ANSWER}"
    messages = [_QUESTION, {"role": "assistant", "content": thought}, _QUESTION]
    try:
        return _THOUGHT not in _render(tokenizer, messages)
    except (InputError, ModelError):
        return False  # told when the template is needed


class _Control:
    """The control tokens of a tokenizer: special ones, and added ones that are not a mere word.

    ``ids`` are their numbers, by their text. ``token`` finds them, except after ``TEXT``.
    """

    def __init__(self, ids: Mapping[str, int]):
        self.ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        one = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.token = re.compile(f"(?<!{TEXT})({one})")
        # With the blanks beside them, unless a message begins or ends there: templates strip those.
        self._beside = re.compile(rf"(?:(?<=\S)\s+)?(?:{one})(?:\s+(?=\S))?")
        self._guarded = re.compile(f"{_OPEN}(\\s*(?:{one})\\s*){_CLOSE}")

    def mask(self, content: str) -> str:
        """Return a message with ``_MASK`` for its control tokens."""
        return self.token.sub(lambda found: _MASK * len(found[0]), content)

    def guard(self, content: str) -> str:
        """Return a message with its control tokens between marks."""
        return self._beside.sub(rf"{_OPEN}\g<0>{_CLOSE}", content)

    def mark(self, text: str, masked: str) -> str:
        """Return ``text`` with ``TEXT`` before each control token that is not the template's alone.

        ``masked`` is as long as ``text``, and has ``_MASK`` where a message stands.
        """
        masked = self._guarded.sub(lambda found: _MASK * len(found[1]), masked)
        text, masked = (re.sub(f"[{_OPEN}{_CLOSE}]", "", one) for one in (text, masked))
        marked, done, at = [], 0, 0
        while found := self.token.search(text, at):
            start, at = found.span()
            if _MASK in masked[start:at]:
                marked += [text[done:start], TEXT]
                done, at = start, start + 1
        return "".join([*marked, text[done:]])


@lru_cache(maxsize=8)
def _control_of(ids: tuple[tuple[str, int], ...]) -> _Control:
    return _Control(dict(ids))


def _control(tokenizer: TokenizerWrapper) -> _Control:
    added = tokenizer.added_tokens_decoder.items()
    return _control_of(
        tuple(
            (token.content, number)
            for number, token in added
            if token.content and (token.special or re.search(r"[^\w\s]", token.content))
        )
    )


def _arguments(message: Message) -> list[object]:
    """Return the arguments of a message's tool calls."""
    return [call["function"]["arguments"] for call in message.get("tool_calls", ())]


def _names(message: Message) -> list[object]:
    """Return what a message has beside its role, its content and its calls' arguments."""
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
    calls = [
        {**call, "function": {k: v for k, v in call["function"].items() if k != "arguments"}}
        for call in message.get("tool_calls", ())
    ]
    return [rest, calls]


def _strings(value: object) -> list[str]:
    """Return all texts in a value of JSON."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _strings(one)]
    return [value] if isinstance(value, str) else []


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    """Return a message with every text in its content and its calls' arguments changed."""

    def map_strings(value: object) -> object:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {change(key): map_strings(one) for key, one in value.items()}
        return [map_strings(one) for one in value] if isinstance(value, list) else value

    message = {**message, "content": change(message["content"])}
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": map_strings(arguments)}}
            for call, arguments in zip(message["tool_calls"], _arguments(message), strict=True)
        ]
    return message


def _render(tokenizer: TokenizerWrapper, messages: Sequence[Message], **options: object) -> str:
    """Return messages in the chat template."""
    options = {"add_generation_prompt": True} | options
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program: it may raise anything
        if messages != [_QUESTION]:
            _render(tokenizer, [_QUESTION])  # raises if the template does not even take this
            raise InputError(
                f"the model's chat template refuses this conversation ({one_line(error, 200)})."
            ) from error
        raise ModelError(
            f"the model's chat template cannot be used ({cause(error)}). Correct it, or use "
            "raw for plain text."
        ) from error


def _mask(content: str) -> str:
    """Return a message with ``_MASK`` for its letters, digits and underscores, but not between marks.

    Templates strip, split and escape at other characters.
    """
    return re.sub(
        rf"({_OPEN}[^{_CLOSE}]*{_CLOSE})|\w+",
        lambda found: found[1] or _MASK * len(found[0]),
        content,
    )


def _is_masked(text: str, masked: str) -> bool:
    """Whether ``masked`` is ``text`` but for its masks."""
    if len(text) != len(masked):
        return False
    a, b = (
        np.frombuffer(one.encode("utf-32-le", "surrogatepass"), np.uint32) for one in (text, masked)
    )
    return bool(((a == b) | (b == ord(_MASK))).all())


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _encode_text(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of text as if the tokenizer had no added tokens."""
    if not tokenizer.is_fast:
        raise InputError(
            "a message has the text of a control token, such as <|im_end|>, which this model's tokenizer "
            "cannot encode as text. Leave it out of the message."
        )
    steps = tokenizer.backend_tokenizer
    if steps.normalizer is not None:
        text = steps.normalizer.normalize_str(text)
    words = [text]
    if steps.pre_tokenizer is not None:
        words = [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in steps.model.tokenize(word)]


def _check_unicode(texts: Iterable[str]) -> None:
    if any(re.search("[\ud800-\udfff]", text) for text in texts):
        raise InputError("the prompt is not valid UTF-8 text; convert it to UTF-8 first.")
