"""Contrastive pairs -> recorded activations -> ``SteeringVector``, and a report on it."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from ..errors import ContextError, InputError, ModelError
from ..generation.answer import split_steps
from ..model.marks import Marks, marks_of
from ..model.model import Model, takes_model
from ..model.prompt import encode_answer, encode_prompt
from ..model.residual import TokenPair, record_pairs
from ..steering.request import DEFAULT_DOSE, SMALLEST
from ..steering.vector import SteeringVector, VectorMeta
from .directions import Direction, Halves, MeanDifference, PrincipalComponent
from .margin import margin_gains
from .pairs import Pair, pairs_sha256

HELD_OUT = 6  # pairs on which the layers are compared, at most; a quarter of few pairs
Method = Literal["mean", "pca"]
Progress = Callable[[int, int], None]
_METHODS = {"mean": MeanDifference, "pca": PrincipalComponent}


@dataclass(frozen=True)
class LayerReport:
    """How large, how stable and how useful the vector of one layer is.

    - ``norm``: ``||v_l||``.
    - ``residual_norm``: the mean of ``||h_l||`` over the responses' tokens, unsteered.
    - ``agreement``, ``noise``: see ``directions.Direction``.
    - ``margin_gain``: what a dose of 20 % does to held-out pairs, in nats per token (see
      ``margin.margin_gains``). ``None`` for fewer than four pairs.
    """

    norm: float
    residual_norm: float
    agreement: float | None
    noise: float | None
    margin_gain: float | None = None

    @property
    def unit_dose(self) -> float:
        """The dose of strength 1."""
        return self.norm / self.residual_norm


@dataclass(frozen=True)
class Extraction:
    """A steering vector and how it was found.

    ``identical`` are the numbers of the pairs whose two responses are the same. ``tokens`` counts
    the tokens of all prompts and responses.
    """

    vector: SteeringVector
    layers: dict[int, LayerReport]
    identical: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class ReadOut:
    """The tokens that are averaged: ``response[start:stop]``, of ``needs`` tokens at least.

    With ``step_ends`` only the tokens that end a step (``Marks.step_ends``). The last one of a response
    is not read: where the sides differ in steps, the vector would be its share, 1 / steps, of the mean.
    A response of one step has no other.
    """

    start: int | None
    stop: int | None
    needs: int
    name: str
    step_ends: bool = False

    @classmethod
    def of(cls, token: int | str) -> "ReadOut":
        """Read ``-1``, ``"-1"``, ``"mean-response"``, ``"first-16"`` or ``"steps"``.

        Raises:
            InputError: none of these.
        """
        text = str(token).strip()
        if text == "mean-response":
            return cls(None, None, 1, "mean of the response")
        if text == "steps":
            return cls(None, None, 1, "mean of the tokens that end a step of the response", True)
        if match := re.fullmatch(r"first-([1-9]\d{0,5})", text, re.ASCII):
            count = int(match[1])
            return cls(0, count, count, f"mean of the first {count} of the response")
        if match := re.fullmatch(r"-([1-9]\d{0,5})", text, re.ASCII):
            back = int(match[1])
            return cls(-back, 1 - back or None, back, f"{-back} of the response")
        raise InputError(
            f"token {text}: expected a negative number, counted from the end of the response (-1 "
            "is its last token), mean-response, first-N with N from 1 on, or steps."
        )

    def weights(self, response: Sequence[int], marks: Marks | None = None) -> np.ndarray:
        """Return the weight of each token of a response, float32 ``(tokens,)``; their sum is 1.

        ``step_ends`` are those of the model's vocabulary, needed for the read-out ``"steps"``.
        """
        weights = np.zeros(len(response), np.float32)
        if self.step_ends:
            weights[:-1] = marks.ending_steps(response[:-1])
            weights[-1] = not weights.any()
        else:
            weights[self.start : self.stop] = 1
        return weights / weights.sum()


def has_single_step(pair: Pair) -> bool:
    """Tell whether the read-out ``"steps"`` takes the last token of a response, as it has no other."""
    return any(len(split_steps(text)) < 2 for text in (pair.positive, pair.negative))


@takes_model
def extract(
    model: Model,
    pairs: Sequence[Pair],
    *,
    layers: Iterable[int] | None = None,
    token: int | str = -1,
    method: Method = "mean",
) -> SteeringVector:
    """Return the mean difference of the pairs' residual streams at a read-out of the responses.

        v_l = mean_i( h_l(prompt_i + positive_i)[token] - h_l(prompt_i + negative_i)[token] )

    The prompt goes through the chat template and the response follows as plain text. Token -1 (the
    default) is the last content token of the response, never an end-of-turn token. The vector is
    not normalised. Its metadata keeps the figures of ``LayerReport``. Source: arXiv 2605.29247,
    section 3.

    Args:
        layers: 0-based layer numbers, by default all. Nothing above the last one is computed.
        token: a negative number, counted from the end of the response; ``"mean-response"``, the
            mean over all its tokens; ``"first-N"``, the mean over its first N; or ``"steps"``, the
            mean over those that end a step before the last: where positions ``"steps"`` add the
            vector (SEAL, arXiv 2504.07986). Both responses should have two steps or more.
        method: ``"mean"``, or ``"pca"`` for the first principal component of the differences
            (``directions.PrincipalComponent``).

    Raises:
        InputError: no pairs, pairs without a difference at the read-out, a response shorter than
            the read-out, a pair longer than the model's context, a layer that the model lacks.
        ModelError: the residual stream holds NaN or infinity; or ``"steps"``, and the tokenizer
            writes a blank line as several tokens.
    """
    return extract_with_report(model, pairs, layers=layers, token=token, method=method).vector


@takes_model
def extract_with_report(
    model: Model,
    pairs: Sequence[Pair],
    *,
    layers: Iterable[int] | None = None,
    token: int | str = -1,
    method: Method = "mean",
    progress: Progress = lambda done, total: None,
) -> Extraction:
    """Return what ``extract`` returns, with a report on each layer.

    ``progress`` is called with the number of pairs that are done and of all; those on which the layers are
    compared count twice.
    """
    if method not in _METHODS:
        raise InputError(f"method {method!r}: expected one of {', '.join(_METHODS)}.")
    readout = ReadOut.of(token)
    token_pairs = encode_pairs(model, pairs, readout)
    identical = tuple(i for i, pair in enumerate(token_pairs) if pair.positive == pair.negative)
    if len(identical) == len(pairs):
        raise InputError(
            "the two responses are the same in every pair, so nothing can be learnt from them; "
            "positive is the dense one, negative the sparse one."
        )
    info, kind = model.info, _METHODS[method]
    chosen = range(info.layer_count) if layers is None else sorted(set(layers))
    held_out = _held_out(len(pairs))
    steps = len(pairs) + len(held_out)
    directions, others, norms = _read_layers(
        model, token_pairs, chosen, readout, kind, held_out, lambda done: progress(done, steps)
    )
    vectors = {layer: direction.vector for layer, direction in directions.items()}
    sizes = {k: float(np.linalg.norm(v.astype(np.float64))) for k, v in vectors.items()}
    if all(sizes[k] / norms[k] < SMALLEST for k in chosen):
        raise InputError(
            f"read at {readout.name} the two responses of the pairs do not differ: every layer's "
            "vector is zero. They begin with the same words, or end so; choose another token."
        )
    gains: dict[int, float] = {}
    if held_out:
        unseen = [token_pairs[i] for i in held_out]
        gains = margin_gains(
            model,
            unseen,
            others,
            norms,
            dose=DEFAULT_DOSE,
            progress=lambda done: progress(len(pairs) + done, steps),
        )
        gains = {layer: gain for layer, gain in gains.items() if np.isfinite(gain)}
    report = {
        k: LayerReport(sizes[k], norms[k], one.agreement, one.noise, gains.get(k))
        for k, one in directions.items()
    }
    stability = {
        str(k): {"agreement": _rounded(row.agreement), "noise": _rounded(row.noise)}
        for k, row in report.items()
    }
    meta = VectorMeta(
        model=info.name,
        hidden_size=info.hidden_size,
        layer_count=info.layer_count,
        fingerprint=info.fingerprint,
        method=kind.name,
        token=readout.name,
        pair_count=len(pairs),
        pairs_sha256=pairs_sha256(pairs),
        chat_template_sha256=model.chat_template_sha256,
        quantization=info.quantization,
        residual_norms={str(k): _rounded(norm) for k, norm in norms.items()},
        margin_gain={str(k): _rounded(gain) for k, gain in gains.items()} or None,
        extra={"dtype": info.dtype, "stability": stability},
    )
    vector = SteeringVector(vectors, meta)
    tokens = sum(len(sequence) for pair in token_pairs for sequence in pair.sequences)
    return Extraction(vector, report, identical, tokens)


def _held_out(count: int) -> range:
    """Return the numbers of the pairs on which the layers are compared, spread over all pairs."""
    held = min(HELD_OUT, count // 4)
    return range(0, count, count // held)[:held] if held else range(0)


def _read_layers(
    model: Model,
    pairs: Sequence[TokenPair],
    layers: Sequence[int],
    readout: ReadOut,
    kind: type[MeanDifference | PrincipalComponent],
    held_out: Sequence[int],
    progress: Callable[[int], None],
) -> tuple[dict[int, Direction], dict[int, np.ndarray], dict[int, float]]:
    """Return by layer: direction of all pairs, vector without the held-out ones, ``||h_l||``."""
    count = len(pairs)
    halves, others = Halves(count), Halves(count - len(held_out))
    place = {pair: i for i, pair in enumerate(sorted(set(range(count)) - set(held_out)))}
    found = {layer: (kind(halves), kind(others)) for layer in layers}
    norms = dict.fromkeys(layers, 0.0)
    done = 0
    weigh = partial(readout.weights, marks=marks_of(model.network))
    for reading in record_pairs(model.network, pairs, layers, weigh):
        _check_finite(reading.layer, reading.pairs, reading.rows)
        differences = reading.rows[:, 0] - reading.rows[:, 1]
        everything, rest = found[reading.layer]
        everything.add(reading.pairs, differences)
        kept = [i for i, pair in enumerate(reading.pairs) if pair in place]
        rest.add([place[reading.pairs[i]] for i in kept], differences[kept])
        norms[reading.layer] += float(reading.norms.mean(axis=1).sum()) / count
        if reading.layer == layers[-1]:
            done += len(reading.pairs)
            progress(done)
    directions = {layer: everything.direction() for layer, (everything, _) in found.items()}
    return directions, {layer: rest.vector() for layer, (_, rest) in found.items()}, norms


def _check_finite(layer: int, pairs: Sequence[int], rows: np.ndarray) -> None:
    bad = [pair for pair, row in zip(pairs, rows, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise ModelError(
            f"layer {layer}: the residual stream of pair {min(bad)} holds NaN or infinity. Load the "
            "model in bfloat16 or float32, or convert it again."
        )


def encode_pairs(model: Model, pairs: Sequence[Pair], readout: ReadOut) -> list[TokenPair]:
    """Return the tokens of the pairs: the prompt in the chat template, and both responses.

    Raises:
        InputError: no pairs, a response shorter than the read-out or with an end of turn inside,
            or a pair longer than the model's context.
    """
    tokenizer = model.tokenizer
    if not pairs:
        raise InputError("no contrastive pairs; expected at least one.")
    encoded = []
    for number, pair in enumerate(pairs):
        responses = [
            encode_response(model, text, number) for text in (pair.positive, pair.negative)
        ]
        if (shortest := min(map(len, responses))) < readout.needs:
            raise InputError(
                f"pair {number} has a response of {shortest} tokens, expected at least "
                f"{readout.needs} in both (read-out: {readout.name})."
            )
        prompt = encode_prompt(tokenizer, pair.prompt, system=pair.system)
        try:
            model.room(len(prompt) + max(map(len, responses)), 0, what=f"pair {number}")
        except ContextError as error:
            raise InputError(f"{error} Or leave it out.") from None
        encoded.append(TokenPair(prompt, *responses))
    return encoded


def encode_response(model: Model, text: str, number: int) -> list[int]:
    """Return the tokens of a response without the end of turn behind it; what it says is text.

    Raises:
        InputError: not valid text, or an end of turn inside.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"pair {number} is not valid UTF-8 text; convert it to UTF-8 first.")
    numbers = {*model.tokenizer.eos_token_ids, model.end_of_turn} - {None}
    ends = [end for end in map(model.tokenizer.convert_ids_to_tokens, numbers) if end]
    text = text.strip()
    while cut := next((end for end in ends if text.endswith(end)), None):
        text = text.removesuffix(cut).rstrip()
    if any(end in text for end in ends):
        raise InputError(
            f"pair {number} has an end-of-turn token inside a response; expected one turn's text."
        )
    return encode_answer(model.tokenizer, text)


def _rounded(value: float | None) -> float | None:
    """Keep six digits: the measurement has no more."""
    return None if value is None else float(f"{value:.6g}")
