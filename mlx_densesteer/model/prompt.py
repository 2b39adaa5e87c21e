"""From what a person typed to the token ids that the model reads."""

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
    """Return the token ids of one user turn in the chat template, or of the text as it is.

    ``raw`` leaves the template out; otherwise ``system`` is the system message (Qwen2.5 has a default
    of its own). Token ids stay as they are.

    Raises:
        InputError: an empty prompt, a system message without a template, or a tokenizer that has no
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
    """Raise ``InputError`` for what ``encode_prompt`` cannot encode."""
    for text in (prompt, system or ""):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the prompt is not valid UTF-8 text; convert it to UTF-8 first.")
    if not prompt.strip():
        raise InputError("the prompt is empty; give it as an argument or on standard input.")
    if raw and system is not None:
        raise InputError("a system message needs the chat template; it cannot go with raw.")
    if not raw and not tokenizer.has_chat_template:
        raise InputError("the model has no chat template; use --raw (raw=True) for plain text.")
