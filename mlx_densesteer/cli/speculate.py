"""``--draft-model``, and what is told of a draft and of the brake."""

from typing import TYPE_CHECKING

from ..text import note

if TYPE_CHECKING:
    from ..generation.answer import Generation
    from ..generation.speculation import Draft
    from ..model.model import Model


def load_draft(name: str | None, tokens: int, model: "Model") -> "Draft | None":
    """Load a draft for ``model``; ``None`` without a name."""
    if name is None:
        return None
    from ..generation.speculation import Draft
    from ..model.model import load

    draft = Draft(load(name), tokens)
    draft.check(model.tokenizer)
    return draft


def tell_draft(result: "Generation") -> str:
    """Say how many of the draft's tokens were accepted."""
    if not result.draft_proposed:
        return ""
    rate = result.draft_accepted / result.draft_proposed
    return (
        f"; draft {result.draft_accepted} of {result.draft_proposed} tokens accepted ({rate:.0%})"
    )


def tell_brakes(result: "Generation") -> None:
    """Say where repetition was cut off."""
    for one in result.brakes:
        note(
            f"brake: the answer repeated itself; {one.dropped} tokens were cut off behind token "
            f"{one.at_token}, and the strength lowered from {one.strength_before:.3g} to "
            f"{one.strength_after:.3g} (--no-brake lets it repeat)"
        )
