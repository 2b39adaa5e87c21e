"""Encode a user's text as the token ids that the model reads."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Return the token ids of one user turn in the chat template, or with ``raw`` of the text alone.

    ``system`` is the system message; without one, Qwen2.5's template adds its own. Token ids are
    returned unchanged.

    Raises:
        InputError: an empty prompt, ``system`` with ``raw``, or a tokenizer without a chat
            template.
    """
    if not isinstance(prompt, str):
        if not len(prompt):
            raise InputError("a prompt has no tokens; expected at least one.")
        return [int(token) for token in prompt]
    check_prompt(tokenizer, prompt, system=system, raw=raw)
    if raw:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def check_prompt(
    tokenizer: TokenizerWrapper, prompt: str, *, system: str | None = None, raw: bool = False
) -> None:
    """Raise ``InputError`` for text that ``encode_prompt`` cannot encode."""
    for text in (prompt, system or ""):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the prompt is not valid UTF-8 text; convert it to UTF-8 first.")
    if not prompt.strip():
        raise InputError("the prompt is empty; give it as an argument or on standard input.")
    if raw and system is not None:
        raise InputError("a system message needs the chat template; it cannot go with raw.")
    if not raw and not tokenizer.has_chat_template:
        raise InputError("the model has no chat template; use --raw (raw=True) for plain text.")
