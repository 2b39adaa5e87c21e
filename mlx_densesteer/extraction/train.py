"""Train a steering vector: a model's own likelihoods are the teacher, everything but the vector is frozen.

Sources: one trained vector a layer, arXiv 2505.18706; preferences in both directions (BiPO), arXiv
2406.00045.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from mlx.optimizers import Adam
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import InputError, ModelError
from ..evaluation.solutions import Solution
from ..files import atomic_path, disk_errors, parse_object
from ..model.gradient import Fixed, fixed, response_log_likelihood
from ..model.model import Model, takes_model
from ..model.prompt import encode_prompt
from ..model.residual import check_layers
from ..steering.places import Positions, check_positions
from ..steering.vector import SteeringVector, VectorMeta
from .extract import encode_response
from .pairs import Pair, pairs_sha256

Loss = Literal["sft", "bipo"]
FORMAT = "mlx-densesteer training 1"
MOST_HELD_OUT = 32  # a tenth of the examples, but at most so many,
FEWEST = 8  # and none of fewer examples than these
CHECKS = 2  # of the held-out loss, in an epoch
PATIENCE = 3  # checks without a better loss, until training stops
WARM_UP = 10  # steps
BETA = 0.1  # of BiPO, as its authors
KEPT_BYTES = 2**29  # of what no vector changes, which every epoch needs again
SAVED_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Recipe:
    """How a vector is trained; runs with the same recipe, data and model are the same run.

    The defaults, which the command has too, are the recipe of the one vector that shortened a real model's
    answers with no fewer right (docs/results.md).

    - ``loss``: ``"sft"``, the negative log-likelihood of the good responses, per token; ``"bipo"``, the
      preference of the good response over the bad one, with ``+v`` and, reversed, with ``-v``.
    - ``layers``: 0-based; each has a vector of its own.
    - ``positions``: where the vector is added, as in ``Steering``.
    - ``epochs``: how often each example is seen, unless training stops before.
    - ``batch_tokens``: response tokens of one step of Adam, at least.
    - ``rate``: how far one step can move a vector, as a dose: 0.01 is 1 % of the residual stream.
    - ``max_dose``: how long each vector may become, as a dose; ``None`` for as long as the loss wants.
    - ``seed``: of the order of the examples, and of which are held out.
    - ``max_length``: tokens of an example, with its prompt; longer ones are left out.
    - ``recompute``: compute activations again in the backward pass, for less memory.
    """

    loss: Loss = "sft"
    layers: tuple[int, ...] = ()
    positions: Positions = "first:48"
    epochs: int = 2
    batch_tokens: int = 400
    rate: float = 0.007
    max_dose: float | None = 0.1
    seed: int = 0
    max_length: int = 1024
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise InputError(f"loss {self.loss!r}: expected one of {', '.join(get_args(Loss))}.")
        check_positions(self.positions)
        for name in ("epochs", "batch_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1.")
        if not 0 < self.rate < 1:
            raise InputError(
                f"rate {self.rate}: expected a number between 0 and 1, such as 0.005: the part of the "
                "residual stream's norm by which one step can move a vector."
            )
        if self.max_dose is not None and not self.max_dose > 0:
            raise InputError(
                f"max_dose {self.max_dose}: expected more than 0, such as 0.05 for 5 %."
            )


@dataclass(frozen=True)
class Progress:
    """Where a training stands. ``held_out`` is the last loss on held-out examples."""

    step: int
    steps: int
    epoch: int
    loss: float
    held_out: float | None
    tokens: int  # response tokens of this run


@dataclass(frozen=True)
class Training:
    """A trained vector and how it came about.

    ``held_out`` are the losses on the held-out examples by step, step 0 (unsteered) first; empty if none
    were held out. ``step`` is the one whose vector this is. ``ended`` says why training ended.
    """

    vector: SteeringVector
    step: int
    steps: int
    ended: Literal["done", "no better", "not finite"]
    losses: tuple[float, ...]
    held_out: dict[int, float]
    examples: int
    left_out: tuple[int, ...]  # numbers of the examples that are longer than max_length
    tokens: int


@dataclass(frozen=True)
class _Example:
    """Token ids; the responses end with the end of turn. ``bad`` is empty for ``sft``."""

    number: int
    prompt: list[int]
    good: list[int]
    bad: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.good), len(self.bad))

    @property
    def tokens(self) -> int:
        return len(self.good) + len(self.bad)


@takes_model
def train(
    model: Model,
    data: Sequence[Solution] | Sequence[Pair],
    recipe: Recipe,
    *,
    state: Path | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Training:
    """Train one vector for each layer of the recipe; strength 1 adds what was trained.

        sft:   L(v) = -1/n sum log p_v(good | prompt)
        bipo:  L(v) = -mean log sigmoid( s beta ( r_sv(good) - r_sv(bad) ) ),   s = +1 or -1 at random
               r_v(y) = log p_v(y | prompt) - log p_0(y | prompt),   beta = 0.1

    Every response ends with the end of turn, so when to stop is learnt too. The vector of the step with
    the lowest held-out loss is returned. Gradients go through the blocks that steer; what no vector changes
    is computed once: what lies below the lowest layer, and before the first steered token.

    Args:
        data: solutions or pairs for ``sft`` (of a pair the dense side), pairs for ``bipo``.
        state: keeps the run; the same call goes on from there, and returns at once if all is done. Remove
            it when the vector is saved.

    Raises:
        InputError: no data, a response that is empty or has an end of turn inside, data of the wrong kind, a
            layer that the model does not have, or a file ``state`` of another run.
        ModelError: a loss is not finite at the first step, or no step is better than no vector.
        DiskError: ``state`` cannot be written.
    """
    recipe = replace(recipe, layers=tuple(check_layers(model.network, recipe.layers)))
    examples, left_out = _encode(model, data, recipe)
    run = _Run(model, recipe, examples, _identity(model, data, recipe), state)
    try:
        ended = run.go(progress)
    finally:
        run.save()
    if run.best_step == 0:
        raise ModelError(
            f"no step made the held-out loss smaller than it is without a vector "
            f"({run.held_out[0]:.4f}). Use more data, other layers, or a smaller rate."
            if ended != "not finite"
            else "the loss is not finite from the first step on. Load the model in bfloat16 or float32, or "
            "convert it again."
        )
    return Training(
        vector=run.vector(data, ended),
        step=run.best_step,
        steps=run.step,
        ended=ended,
        losses=tuple(run.losses),
        held_out=dict(run.held_out),
        examples=len(examples),
        left_out=left_out,
        tokens=run.tokens,
    )


class _Run:
    """A training under way. ``save`` writes the last whole step, if there is one."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        examples: Sequence[_Example],
        identity: str,
        state: Path | None,
    ):
        self._model, self._recipe, self._identity, self._state = model, recipe, identity, state
        order = np.random.default_rng(recipe.seed).permutation(len(examples))
        held = min(MOST_HELD_OUT, max(1, len(examples) // 10)) if len(examples) >= FEWEST else 0
        self._held_out = [examples[i] for i in sorted(order[:held])]
        self._seen = [examples[i] for i in sorted(order[held:])]
        self._fixed = _KeptFixed(model, recipe)
        self._unsteered: dict[int, tuple[float, float]] = {}
        norms = model.measured_norms
        self._norms = {layer: norms[layer] for layer in recipe.layers}
        # Adam moves each coordinate by the rate: so it is the rate's share of ||h_l|| in all
        self._scale = mx.array([[norms[k] / math.sqrt(model.hidden_size)] for k in recipe.layers])
        self._adam = Adam(learning_rate=recipe.rate)
        self._gradient = mx.value_and_grad(self._log_likelihood)
        shape = len(recipe.layers), model.hidden_size
        self.step, self.best_step, self.tokens = 0, 0, 0
        self.losses: list[float] = []
        self.held_out: dict[int, float] = {}
        self._u = mx.zeros(shape)  # v_l = scale_l u_l
        self._best = self._u
        self._adam.init({"u": self._u})
        self._whole: tuple[dict[str, mx.array], dict[str, str]] | None = None
        self._saved = time.monotonic()
        self._restore()

    def go(
        self, progress: Callable[[Progress], None]
    ) -> Literal["done", "no better", "not finite"]:
        """Train to the end; return why it ended."""
        batches = [b for epoch in range(self._recipe.epochs) for b in self._batches(epoch)]
        per_epoch = len(batches) / self._recipe.epochs
        checks = {round((i + 1) * per_epoch / CHECKS) for i in range(CHECKS * self._recipe.epochs)}
        if self._held_out and not self.held_out:
            self.held_out[0] = self._mean_loss(self._held_out)
            self._keep()
        while self.step < len(batches):
            if self._is_no_better():
                return "no better"
            epoch, batch = batches[self.step]
            loss, gradient = self._loss_and_gradient(batch, epoch)
            if not math.isfinite(loss) or not mx.isfinite(gradient).all():
                return "not finite"
            self._adam.learning_rate = self._recipe.rate * min(1, (self.step + 1) / WARM_UP)
            u = self._limited(self._adam.apply_gradients({"u": gradient}, {"u": self._u})["u"])
            mx.eval(u, self._adam.state)
            self._u = u
            self.step += 1
            self.losses.append(loss)
            self.tokens += sum(example.tokens for example in batch)
            if not self._held_out:
                self._best, self.best_step = u, self.step
            elif self.step in checks or self.step == len(batches):
                found = self._mean_loss(self._held_out)
                if not math.isfinite(found):
                    return "not finite"
                if found < min(self.held_out.values()):
                    self._best, self.best_step = u, self.step
                self.held_out[self.step] = found
            self._keep()
            mx.clear_cache()  # batches differ in shape, so the next one cannot use these buffers
            last = [*self.held_out.values()][-1:]
            progress(
                Progress(
                    self.step, len(batches), epoch, loss, last[0] if last else None, self.tokens
                )
            )
        return "done"

    def _limited(self, u: mx.array) -> mx.array:
        """Return vectors of the same directions that are no longer than the recipe allows."""
        if self._recipe.max_dose is None:
            return u
        doses = mx.linalg.norm(u, axis=-1, keepdims=True) / math.sqrt(u.shape[-1])
        return u * mx.minimum(1.0, self._recipe.max_dose / mx.maximum(doses, 1e-12))

    def _is_no_better(self) -> bool:
        since = [step for step in self.held_out if step > self.best_step]
        return len(since) >= PATIENCE

    def _batches(self, epoch: int) -> Iterator[tuple[int, list[_Example]]]:
        """Yield the epoch's number and its examples in their order, ``batch_tokens`` at a time."""
        order = np.random.default_rng([self._recipe.seed, 1 + epoch]).permutation(len(self._seen))
        batch: list[_Example] = []
        for i in order:
            batch.append(self._seen[i])
            if sum(example.tokens for example in batch) >= self._recipe.batch_tokens:
                yield epoch, batch
                batch = []
        if batch:
            yield epoch, batch

    def _log_likelihood(self, u: mx.array, example: _Example, bad: bool, sign: int) -> mx.array:
        v = sign * self._scale * u
        return response_log_likelihood(
            self._model.network,
            example.prompt,
            example.bad if bad else example.good,
            dict(zip(self._recipe.layers, v, strict=True)),
            positions=self._recipe.positions,
            known=self._fixed(example, bad),
            recompute=self._recipe.recompute,
        )

    def _loss_and_gradient(self, batch: Sequence[_Example], epoch: int) -> tuple[float, mx.array]:
        loss, gradient = 0.0, mx.zeros_like(self._u)
        whole = sum(len(example.good) for example in batch)
        for example in batch:
            with _enough_memory(example):
                if self._recipe.loss == "sft":
                    value, slope = self._gradient(self._u, example, False, 1)
                    loss -= value.item() / whole
                    gradient -= slope / whole
                else:
                    sign = self._sign(example, epoch)
                    good, slope = self._gradient(self._u, example, False, sign)
                    bad, other = self._gradient(self._u, example, True, sign)
                    argument = self._preference(example, good.item(), bad.item(), sign)
                    loss += _softplus(-argument) / len(batch)
                    weight = -sign * BETA / (1 + math.exp(min(argument, 80.0))) / len(batch)
                    gradient += weight * (slope - other)
                mx.eval(gradient)
        return loss, gradient

    def _mean_loss(self, examples: Sequence[_Example]) -> float:
        """Return the loss without its gradient; of ``bipo`` the mean over both signs."""
        total = 0.0
        for example in examples:
            with _enough_memory(example):
                if self._recipe.loss == "sft":
                    total -= self._log_likelihood(self._u, example, False, 1).item()
                    continue
                for sign in (1, -1):
                    good, bad = (
                        self._log_likelihood(self._u, example, bad, sign).item()
                        for bad in (False, True)
                    )
                    total += _softplus(-self._preference(example, good, bad, sign)) / 2
        tokens = sum(len(example.good) for example in examples)
        return total / (tokens if self._recipe.loss == "sft" else len(examples))

    def _preference(self, example: _Example, good: float, bad: float, sign: int) -> float:
        """Return the argument of BiPO's sigmoid."""
        if example.number not in self._unsteered:
            zero = mx.zeros_like(self._u)
            self._unsteered[example.number] = tuple(
                self._log_likelihood(zero, example, side, 1).item() for side in (False, True)
            )
        before = self._unsteered[example.number]
        return sign * BETA * ((good - before[0]) - (bad - before[1]))

    def _sign(self, example: _Example, epoch: int) -> int:
        return 1 - 2 * int(
            np.random.default_rng([self._recipe.seed, 1 + epoch, example.number]).integers(2)
        )

    def vector(self, data: Sequence[Solution] | Sequence[Pair], ended: str) -> SteeringVector:
        """Return the best vector so far, with its metadata."""
        info, recipe = self._model.info, self._recipe
        arrays = np.array(self._scale * self._best)
        figures = {
            **asdict(recipe),
            "steps": self.best_step,
            "ended": ended,
            "held_out_loss": {str(step): float(f"{x:.6g}") for step, x in self.held_out.items()},
        }
        meta = VectorMeta(
            model=info.name,
            hidden_size=info.hidden_size,
            layer_count=info.layer_count,
            fingerprint=info.fingerprint,
            method=f"trained: {recipe.loss}",
            pair_count=len(data),
            pairs_sha256=pairs_sha256(data),
            chat_template_sha256=self._model.chat_template_sha256,
            quantization=info.quantization,
            residual_norms={str(k): float(f"{norm:.6g}") for k, norm in self._norms.items()},
            recommended={
                "layers": list(recipe.layers),
                "strength": 1.0,
                "positions": recipe.positions,
                "reason": "trained",
                "text": "Trained at these layers together, with strength 1.",
            },
            extra={"dtype": info.dtype, "training": figures},
        )
        return SteeringVector(dict(zip(recipe.layers, arrays, strict=True)), meta)

    def _snapshot(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        arrays = {"u": self._u, "best": self._best}
        arrays |= {f"adam.{name}": array for name, array in tree_flatten(self._adam.state)}
        figures = {
            "step": self.step,
            "best_step": self.best_step,
            "tokens": self.tokens,
            "losses": self.losses[:],
            "held_out": [[step, loss] for step, loss in self.held_out.items()],
        }
        return arrays, {"format": FORMAT, "run": self._identity, "figures": json.dumps(figures)}

    def _keep(self) -> None:
        """Note that the step is whole; write it now and then."""
        self._whole = self._snapshot()
        if time.monotonic() - self._saved > SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write the last whole step."""
        if self._state is None or self._whole is None:
            return
        arrays, about = self._whole
        with atomic_path(self._state) as made:
            mx.save_safetensors(str(made.with_suffix(".safetensors")), arrays, about)
            made.with_suffix(".safetensors").rename(made)
        self._saved = time.monotonic()

    def _restore(self) -> None:
        if self._state is None or not self._state.exists():
            return
        wrong = InputError(
            f"{self._state}: belongs to another training, or is damaged. Use the same data and settings to go "
            "on, or remove the file to begin anew."
        )
        try:
            with disk_errors(self._state):
                arrays, about = mx.load(
                    str(self._state), format="safetensors", return_metadata=True
                )
            if about.get("format") != FORMAT or about.get("run") != self._identity:
                raise wrong
            figures = parse_object(about["figures"], "figures")
            adam = {k.removeprefix("adam."): v for k, v in arrays.items() if k[:5] == "adam."}
            held_out = {int(step): float(loss) for step, loss in figures["held_out"]}
            if any(arrays[name].shape != self._u.shape for name in ("u", "best")):
                raise wrong
            self._adam.state = tree_unflatten(list(adam.items()))
            self._u, self._best = arrays["u"], arrays["best"]
            self.step, self.best_step = int(figures["step"]), int(figures["best_step"])
            self.tokens, self.losses = int(figures["tokens"]), [*map(float, figures["losses"])]
            self.held_out = held_out
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise wrong from error
        self._whole = self._snapshot()


class _KeptFixed:
    """What no vector changes of each response: computed once, and kept as long as there is room."""

    def __init__(self, model: Model, recipe: Recipe):
        self._network, self._recipe = model.network, recipe
        self._kept: dict[tuple[int, bool], Fixed] = {}
        self._room = KEPT_BYTES

    def __call__(self, example: _Example, bad: bool) -> Fixed:
        key = example.number, bad
        if key in self._kept:
            return self._kept[key]
        response = example.bad if bad else example.good
        layer, positions = min(self._recipe.layers), self._recipe.positions
        known = fixed(self._network, example.prompt, response, layer, positions)
        mx.eval(known.arrays)
        size = sum(array.nbytes for array in known.arrays)
        if size <= self._room:
            self._room -= size
            self._kept[key] = known
        return known


def _encode(
    model: Model, data: Sequence[Solution] | Sequence[Pair], recipe: Recipe
) -> tuple[list[_Example], tuple[int, ...]]:
    """Return the examples as token ids, and the numbers of those that are too long."""
    if not data:
        raise InputError("no data to train on; expected at least one solution or pair.")
    if recipe.loss == "bipo" and not all(isinstance(one, Pair) for one in data):
        raise InputError("loss bipo needs pairs: a dense and a sparse response for each prompt.")
    end = model.end_of_turn
    end = model.tokenizer.eos_token_id if end is None else end
    examples, left_out = [], []
    most = min(recipe.max_length, model.context)
    for number, one in enumerate(data):
        pair = isinstance(one, Pair)
        prompt = encode_prompt(model.tokenizer, one.prompt, system=one.system)
        texts = [one.positive if pair else one.response]
        texts += [one.negative] if pair and recipe.loss == "bipo" else []
        sides = [encode_response(model, text, number) for text in texts]
        if not all(sides):
            raise InputError(f"pair {number} has an empty response. Remove it or fill it in.")
        good, *bad = ([*side, end] for side in sides)
        if bad and bad[0] == good:
            continue  # nothing to prefer
        example = _Example(number, prompt, good, bad[0] if bad else [])
        if example.length > most:
            left_out.append(number)
        else:
            examples.append(example)
    if not examples:
        raise InputError(
            f"none of the {len(data)} examples can be trained on: their responses are the same, or longer "
            f"than {most} tokens with the prompt."
        )
    return examples, tuple(left_out)


def _identity(model: Model, data: Sequence[Solution] | Sequence[Pair], recipe: Recipe) -> str:
    about = [asdict(recipe), pairs_sha256(data), asdict(model.info)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _enough_memory(example: _Example) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(
            word in str(error).lower() for word in ("alloc", "memory")
        ):
            raise
        raise ModelError(
            f"not enough memory for example {example.number} of {example.length} tokens ({error}). Leave "
            "out long examples (max_length), recompute activations, train higher layers, or use a model of "
            "4 bits."
        ) from error


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
