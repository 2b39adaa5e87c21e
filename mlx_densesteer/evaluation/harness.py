"""A model class for lm-evaluation-harness, which runs its tasks steered.

Its name in lm-eval is ``densesteer``. Newer releases find it through the entry point
``lm_eval.models``; for others ``python -m mlx_densesteer.evaluation.harness`` is lm-eval's command
with this model added (docs/lm-eval.md). No torch. Not covered: several processes, images, and
lm-eval's cache of responses.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..errors import install_command

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    kind = SystemExit if __name__ == "__main__" else ImportError
    raise kind(f"lm-evaluation-harness needs an extra: {install_command('lm-eval')}") from error

from ..demo import NAME
from ..errors import DenseSteerError, InputError
from ..generation.batch import generate_batch
from ..generation.sampling import Sampling
from ..model.block import make_cache
from ..model.likelihood import log_likelihoods
from ..model.model import load
from ..model.prompt import TEXT, encode_chat, render_chat
from ..steering.places import Positions
from ..steering.request import Request, parse_layers, request
from ..steering.vector import SteeringVector, format_layers
from ..text import printable
from .condition import Baseline

ROWS = 16  # of --batch_size auto
# Stands for ``TEXT`` in what lm-eval hands on: a noncharacter of Unicode, which it can hash and write
# to its log. No valid text holds one.
_TEXT = "\ufdd0"

log = logging.getLogger(__name__)


class DenseSteerLM(TemplateLM):
    """A model under one steering, for lm-eval; its arguments are the ``--model_args``.

    Generated text and likelihoods are those of the steered model. A continuation is read as if the
    model had written it after the context, under the same ``positions``.

    Args:
        pretrained: a folder that ``densesteer convert`` wrote, a Hub id, or ``demo``.
        vector: a steering vector (``.npz``) or ``demo``; by default nothing is steered.
        strength: lambda, a dose such as ``20%``, or a KL such as ``0.1nats``.
        layer: ``14``, ``"10-14"``, ``[10, 12]``, ``"all"``.
        positions: ``"all"``, ``"first:48"``, ... (``steering.places``). ``steering.request`` has the defaults
            of strength, layer and positions.
        random: a seed: a random direction in the place of the vector's, of the same norm at each layer; a
            baseline. The other baselines of ``densesteer eval`` are lm-eval's own options.
        strict: refuse a vector that was made for another model, instead of warning of it.
        revision: of a Hub id.
        max_length: tokens of context and continuation together, by default and at most the model's
            context. A longer text loses its beginning, with a warning.
        max_gen_toks: length of a response if the task does not say.
        seed: for tasks that sample.
        batch_size, max_batch_size: contexts, or responses, at a time; ``"auto"`` is 16 at most.
        device: ignored; lm-eval always names one, and MLX chooses its own.

    Raises:
        InputError, SteeringError, VectorFormatError, VectorMismatchError: unusable arguments.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        vector: str | None = None,
        strength: float | str | None = None,
        layer: int | str | Sequence[int] | None = None,
        positions: Positions | None = None,
        random: int | None = None,
        strict: bool = False,
        revision: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ):
        super().__init__()
        if unknown:
            raise InputError(
                f"model_args {', '.join(sorted(unknown))}: unknown. Expected some of pretrained, "
                "vector, strength, layer, positions, random, strict, revision, max_length, max_gen_toks, seed."
            )
        if pretrained is None:
            raise InputError("no model: expected --model_args pretrained=FOLDER_OR_HUB_ID.")
        asked = _read_request(vector, strength, layer, positions, random)
        replaced = None if random is None else Baseline.parse(f"random:{random}")
        self.rows = _read_rows(batch_size, max_batch_size)
        self.max_gen_toks, self.seed = _whole("max_gen_toks", max_gen_toks), seed
        length = None if max_length is None else _whole("max_length", max_length)
        self.model = load(pretrained, revision=revision)
        self.max_length = min(length or self.model.context, self.model.context)
        self.steering = None
        if asked is not None:
            self.model.check_fits(asked.vector)
            if warning := self.model.other_weights(asked.vector, strict=_yes("strict", strict)):
                log.warning("%s", printable(warning.removeprefix("warning: ")))
            self.steering = asked.steering(self.model)
            if replaced is not None:
                self.steering = replaced.condition(self.steering).steering
            make_cache(self.model, self.steering, prompt=range(1))  # refuses an overflow, now

    @property
    def tokenizer(self) -> TokenizerWrapper:
        return self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: begin of text, else end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, object]:
        """Return the model and the steering, which lm-eval writes beside its results."""
        info, steering = self.model.info, None
        if self.steering is not None:
            steering = self.steering.describe() | {"dose": self.model.dose(self.steering)}
        return {
            "model_name": info.name,
            "model_dtype": info.dtype,
            "model_quantization": info.quantization,
            "model_fingerprint": info.fingerprint,
            "steering": steering,
        }

    def set_cache_hook(self, cache_hook: object) -> None:
        raise InputError(
            "--use_cache: lm-eval's cache identifies a request by its text alone and would return "
            "answers of another steering. Leave it out."
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Return token ids, with one begin-of-text token at most.

        What a message of ``apply_chat_template`` says stays text; elsewhere the text of a control token is
        that token.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        if _TEXT in string:
            begin = self.tokenizer.encode("", add_special_tokens=add_special_tokens)
            return [*begin, *encode_chat(self.tokenizer, string.replace(_TEXT, TEXT))]
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the conversation as text in the model's chat template."""
        if not self.tokenizer.has_chat_template:
            raise InputError("the model has no chat template; leave --apply_chat_template out.")
        text = render_chat(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text.replace(TEXT, _TEXT)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Return the steered response to each request, up to the first of its stop texts, without a thought."""
        alike: dict[tuple[int, Sampling, tuple[str, ...]], list[int]] = {}
        for i, one in enumerate(requests):
            options = self._read_options(one.args[1])
            alike.setdefault(options, []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for (max_tokens, sampling, stops), members in alike.items():
                room = self.max_length - max_tokens
                prompts = [self._clip(self.tok_encode(requests[i].args[0]), room) for i in members]
                for number, response in generate_batch(
                    self.model,
                    prompts,
                    steering=self.steering,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    stop=stops,
                    rows=self.rows,
                ):
                    texts[members[number]] = response.answer
                    bar.update()
        return texts

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each text, in windows of ``max_length`` tokens.

        The whole text counts as generated: the prompt is ``prefix_token_id``. Each window is an answer of its
        own, so positions such as ``first:N`` begin anew.
        """
        windows, owners = [], []
        for i, one in enumerate(requests):
            tokens = self.tok_encode(one.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (score, _) in zip(owners, scores, strict=True):
            totals[i] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Return ``(log p, greedy)`` of requests ``(_, context, continuation)``, token ids."""
        contexts, continuations = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, but max_length is "
                    f"{self.max_length}; it cannot be scored."
                )
            room = self.max_length + 1 - len(continuation)  # the last token is not read
            contexts.append(self._clip(context, room))
            continuations.append(continuation)
        found: dict[int, tuple[float, bool]] = {}
        scores = log_likelihoods(
            self.model.network, contexts, continuations, steering=self.steering, rows=self.rows
        )
        for i, score, greedy in tqdm(
            scores, total=len(requests), disable=disable_tqdm, desc="loglikelihood"
        ):
            found[i] = score, greedy
        return [found[i] for i in range(len(requests))]

    def _clip(self, context: list[int], room: int) -> list[int]:
        """Return at most the last ``room`` tokens; ``prefix_token_id`` if there are none."""
        if (lost := len(context) - room) > 0:
            log.warning("a context of %d tokens loses its first %d", len(context), lost)
        return context[-room:] or [self.prefix_token_id]

    def _read_options(self, given: dict[str, object]) -> tuple[int, Sampling, tuple[str, ...]]:
        """Return length, sampling and stop texts of a task's ``generation_kwargs``."""
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        max_tokens = _whole("max_gen_toks", options.pop("max_gen_toks"))
        if max_tokens >= self.max_length:
            raise InputError(
                f"max_gen_toks {max_tokens} leaves no room for a prompt: the model takes "
                f"{self.max_length} tokens. Choose fewer with --gen_kwargs max_gen_toks=N."
            )
        stops = tuple(stop for stop in options.pop("until") if stop)
        temp, top_p = float(options.pop("temperature", 0.0)), options.pop("top_p", 1.0)
        sample = options.pop("do_sample") and temp > 0
        if not sample:  # greedy decoding ignores them
            options = {k: v for k, v in options.items() if k not in ("top_k", "min_p")}
        if options:
            raise InputError(
                f"generation_kwargs {', '.join(sorted(options))}: not supported. Expected until, "
                "max_gen_toks, do_sample, temperature and top_p."
            )
        sampling = Sampling(temp, float(top_p), self.seed) if sample else Sampling()
        return max_tokens, sampling, stops


def _read_request(
    vector: str | None,
    strength: object,
    layer: object,
    positions: Positions | None,
    random: object = None,
) -> Request | None:
    """Return the steering of the model_args, ``None`` without a vector."""
    if vector is None:
        asked = {"strength": strength, "layer": layer, "positions": positions, "random": random}
        if unused := [name for name, value in asked.items() if value is not None]:
            raise InputError(f"model_args {', '.join(unused)}: need a vector; add vector=FILE.")
        return None
    loaded = SteeringVector.load(vector if vector == NAME else Path(str(vector)).expanduser())
    layers = None
    if layer is not None:
        texts = layer if isinstance(layer, (list, tuple)) else [layer]
        layers = parse_layers(map(str, texts), loaded.layers)
    made = request(loaded, strength, layers, positions)  # type: ignore[arg-type]
    if made.why:
        log.info("layer %s: %s", format_layers(made.layers), made.why)
    return made


def _read_rows(batch_size: int | str | None, max_batch_size: int | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return min(ROWS, max_batch_size or ROWS)
    return _whole("batch_size", batch_size)


def _whole(name: str, value: object) -> int:
    """Read a whole number of at least 1."""
    number = str(value)
    if not (number.isascii() and number.isdecimal() and int(number)):
        raise InputError(f"{name} {value!r}: expected a whole number of at least 1.")
    return int(number)


def _yes(name: str, value: object) -> bool:
    """Read a truth value, which lm-eval's ``--model_args`` give as one or as text."""
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise InputError(f"{name} {value!r}: expected true or false.")
    return known[str(value).lower()]


def register() -> None:
    """Make ``densesteer`` a model of lm-eval in this process. May be called again."""
    import lm_eval.models  # noqa: F401  (lm-eval adds its own models to an empty list only)
    from lm_eval.api.registry import model_registry

    if "densesteer" not in model_registry:
        model_registry.register("densesteer", target=f"{__package__}.harness:DenseSteerLM")


def main() -> None:
    """Run lm-eval's own command line with ``--model densesteer`` added."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except DenseSteerError as error:
        sys.exit(printable(f"densesteer: {error}"))


if __name__ == "__main__":
    main()
