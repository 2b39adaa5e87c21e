"""``Model``: a loaded network with its tokenizer, and their properties, each computed once."""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from .. import demo
from ..demo.problems import calibration, draw_solution
from ..errors import (
    ContextError,
    DenseSteerError,
    InputError,
    ModelError,
    ModelTooLargeError,
    VectorMismatchError,
)
from ..files import full_disk
from ..steering.places import Positions
from ..steering.request import stored_strength, unit_dose
from ..steering.steering import Steering
from ..steering.vector import SteeringVector, format_layers
from ..text import cause, count, note, one_line
from .block import patch
from .config import (
    BAKED,
    check_adapter,
    for_batches,
    local_folder,
    origin,
    parse_config,
    read_file,
    read_folder,
)
from .divergence import Divergence, strengths_for
from .families import decoder_blocks, empty_network, last_bias, stream_dtype, unlike
from .hub import fetch_model
from .machine import FOR_WEIGHTS, gpu, working_set
from .marks import last_opens, thought_marks
from .prompt import encode_prompt, encode_text, end_of_turn, turn_tokens
from .residual import residual_norms
from .weights import INDEX

P = ParamSpec("P")
R = TypeVar("R")

# The key under which transformers notes that it has given this warning.
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
# For ``Model.check_length``: text of this many characters a token at most is encoded at once. Longer text
# is counted in pieces; a cut adds fewer tokens than this (measured: 5).
_LIKELY, _PIECE, _AT_CUTS = 4, 2**14, 64
_PRECISION = re.compile(
    r"[-_.](mlx|gguf|\d+-?bits?|int\d+|b?f(p|loat)?(16|32)|i?q\d\w*|dwq|awq|gptq)$"
)
_SOLUTIONS = 3  # fixed texts on which norms are measured


@dataclass(frozen=True)
class ModelInfo:
    """What the metadata of a steering vector records of its model; see ``Model.fingerprint``.

    ``end_of_turn`` is the chat template's, where the checkpoint does not name it (``Model.end_of_turn``).
    """

    name: str
    layer_count: int
    hidden_size: int
    dtype: str
    quantization: str
    fingerprint: str
    end_of_turn: str | None = None


class Model:
    """A network of mlx-lm whose decoder blocks can steer, with its tokenizer.

    It unpacks as mlx-lm's pair: ``network, tokenizer = load("demo")``. With caches that hold no
    steering (``block.make_cache``), the network computes what the stock network computes.

    Args:
        network: a text model as ``mlx_lm.load`` returns it. Its blocks are patched.
        tokenizer: its tokenizer.
        name: the name for metadata; by default that of the tokenizer's folder.

    Raises:
        UnsupportedModelError: the network cannot be steered (``families``).
    """

    def __init__(self, network: nn.Module, tokenizer: TokenizerWrapper, name: str | None = None):
        self.network = patch(network, tokenizer)
        self.tokenizer = tokenizer
        self.name = origin(tokenizer.name_or_path) if name is None else name

    @classmethod
    def of(cls, model: "Model | tuple[nn.Module, TokenizerWrapper]") -> "Model":
        """Return ``model``, or the ``Model`` of mlx-lm's pair; raise ``InputError`` for anything else.

        ``load`` checks a folder, its weights and that its logits are finite. mlx-lm's pair has
        passed none of that: it computes what mlx-lm read.
        """
        if isinstance(model, Model):
            return model
        if isinstance(model, tuple) and len(model) >= 2 and isinstance(model[0], nn.Module):
            return cls(model[0], model[1])
        raise InputError(
            f"{type(model).__name__} given as a model: expected what load returns, or mlx-lm's pair of "
            "model and tokenizer."
        )

    def __iter__(self) -> Iterator[nn.Module | TokenizerWrapper]:
        return iter((self.network, self.tokenizer))

    def __getitem__(self, index: int | slice) -> nn.Module | TokenizerWrapper | tuple:
        return (self.network, self.tokenizer)[index]

    @property
    def layer_count(self) -> int:
        return self.network.args.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.network.args.hidden_size

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows: numbers from 0 to below it. The tokenizer's may be fewer."""
        return self.network.args.vocab_size

    @property
    def context(self) -> int:
        """How many tokens a prompt and its response may have together."""
        args = self.network.args
        if not hasattr(args, "max_position_embeddings"):  # mlx-lm's own pair of some families
            return int(self.tokenizer.model_max_length)
        return args.max_position_embeddings

    @cached_property
    def fingerprint(self) -> str:
        """Identify the weights: the first 16 digits of the SHA-256 of every norm's weights as bfloat16.

        Norm weights are not quantised, so all precisions of a checkpoint have one fingerprint. A baked
        model's biases count too.
        """
        digest = hashlib.sha256()
        for block in decoder_blocks(self.network).values():
            for name, weight in sorted(tree_flatten(block.parameters())):
                if "norm" in name:
                    digest.update(_bfloat16_bytes(weight))
            if (bias := last_bias(block)) is not None:
                digest.update(_bfloat16_bytes(bias))
        digest.update(_bfloat16_bytes(self.network.model.norm.weight))
        return digest.hexdigest()[:16]

    @cached_property
    def baked_layers(self) -> tuple[int, ...]:
        """The layers at which ``bake`` wrote a steering into the weights; empty for other models."""
        blocks = decoder_blocks(self.network)
        return tuple(layer for layer, block in blocks.items() if _is_baked(block))

    @cached_property
    def info(self) -> ModelInfo:
        """What a vector's metadata records of this model."""
        last = list(decoder_blocks(self.network).values())[-1]
        # the first by name: of Qwen2's block mlp.down_proj
        quantised = [(k, one) for k, one in last.named_modules() if getattr(one, "bits", None)]
        method = "none"
        if quantised:
            one = min(quantised)[1]
            kind = "" if one.mode == "affine" else f"{one.mode}, "
            method = f"{kind}{one.bits}-bit, group {one.group_size}"
        return ModelInfo(
            name=self.name,
            layer_count=self.layer_count,
            hidden_size=self.hidden_size,
            dtype=dtype_name(stream_dtype(self.network)),
            quantization=method,
            fingerprint=self.fingerprint,
            end_of_turn=self.end_of_turn and self.tokenizer.convert_ids_to_tokens(self.end_of_turn),
        )

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn in the chat template, if the checkpoint's end tokens do not.

        A base model with a chat template would write it and run on. It is told once, in a note.
        """
        token = end_of_turn(self.tokenizer)
        if token is not None:
            name = self.tokenizer.convert_ids_to_tokens(token)
            note(
                f"{self.name}: the chat template ends a turn with {name}, which is not among the model's end "
                f"tokens. Answers in the chat template end there too."
            )
        return token

    def ends(self, prompt: Iterable[int]) -> frozenset[int]:
        """Return the tokens that end the answer: ``end_of_turn`` too, if the prompt has the template's tokens."""
        ends = frozenset(self.tokenizer.eos_token_ids)
        if self.end_of_turn is None or self._turn_tokens.isdisjoint(prompt):
            return ends
        return ends | {self.end_of_turn}

    @cached_property
    def _turn_tokens(self) -> frozenset[int]:
        return turn_tokens(self.tokenizer)

    @property
    def thinks(self) -> bool:
        """Whether the tokenizer has tokens around a thought, so that answers are parted."""
        return self.tokenizer.has_thinking

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Tell whether a prompt ends within a thought, as those of R1's template do."""
        return last_opens(prompt, *thought_marks(self.tokenizer), self.tokenizer.eos_token_ids)

    @cached_property
    def chat_template_sha256(self) -> str | None:
        """The SHA-256 of the chat template; ``None`` without one."""
        template = self.tokenizer.chat_template
        return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None

    @cached_property
    def measured_norms(self) -> dict[int, float]:
        """The mean unsteered ``||h_l||`` of every layer over the response tokens of ``solutions``.

        The prompts are left out: the norms of a chat template's tokens are several times those of
        text.
        """
        layers = list(decoder_blocks(self.network))
        totals = dict.fromkeys(layers, 0.0)
        for tokens, first in self.solutions():
            for layer, norm in residual_norms(self.network, tokens, layers, first=first).items():
                totals[layer] += norm / _SOLUTIONS
        return totals

    def norms(self, vector: SteeringVector, layers: Iterable[int]) -> dict[int, float]:
        """Return the mean ``||h_l||`` at some layers, to which doses refer.

        A layer's norm comes from the vector's file, if it was recorded with these weights; else from
        ``measured_norms``. It does not depend on the other layers.

        Raises:
            VectorMismatchError: one of the layers does not fit this model, or the vector does not hold it.
        """
        wanted = sorted(set(layers))
        self.check_fits(vector.select(wanted))
        ours = vector.meta.fingerprint == self.fingerprint
        recorded = (vector.residual_norms or {}) if ours else {}
        missing = set(wanted) - set(recorded)
        found = (self.measured_norms if missing else {}) | recorded
        return {layer: found[layer] for layer in wanted}

    def dose(self, steering: Steering | None) -> float:
        """Return the dose of a steering in this model; 0.2 is 20 %."""
        if steering is None or not steering.strength:
            return 0.0
        return steering.dose(self.norms(steering.vector, steering.layers))

    def largest_dose(self, steering: Steering | None) -> float:
        """Return the dose of a steering, or that beyond its thinking budget if it is larger."""
        return max(self.dose(steering), self.dose(steering and steering.beyond_budget))

    def kl_strength(
        self, vector: SteeringVector, layers: Sequence[int], positions: Positions, kl: float
    ) -> float:
        """Return the strength at which KL(steered || unsteered) is ``|kl|`` nats per token.

        It has the sign of ``kl``. It comes from the vector's calibration, if that was made with these weights
        at the same layers and positions; else it is measured on ``solutions`` by some forward passes, once.

        Raises:
            InputError: no strength gives this KL.
            VectorMismatchError: the vector does not fit the model.
        """
        found = self.known_kl_strength(vector, layers, positions, kl)
        if found is None:
            self.check_fits(vector)
            chosen = tuple(sorted(layers))
            unit = unit_dose(vector, self.norms(vector, chosen))
            measure = Divergence(self.network, self.solutions(), [chosen[0]])
            made = strengths_for(measure, vector, chosen, positions, [kl], unit_dose=unit)
            if made.missed:
                raise InputError(made.missed[kl])
            found = made.strengths[kl]
            self._kl_strengths[_kl_key(vector, layers, positions, kl)] = found
        return found

    def known_kl_strength(
        self, vector: SteeringVector, layers: Sequence[int], positions: Positions, kl: float
    ) -> float | None:
        """Return ``kl_strength`` where it takes no forward pass; else ``None``."""
        stored = stored_strength(vector, layers, positions, kl, fingerprint=self.fingerprint)
        if stored is not None:
            return stored
        return self._kl_strengths.get(_kl_key(vector, layers, positions, kl))

    @cached_property
    def _kl_strengths(self) -> dict[tuple, float]:
        """What ``kl_strength`` has measured."""
        return {}

    def room(
        self, tokens: int, wanted: int, *, limit: int | None = None, what: str = "the prompt"
    ) -> int:
        """Return how many of ``wanted`` tokens fit in the context after the first ``tokens``.

        ``wanted=0`` only checks that the ``tokens`` themselves fit.

        Args:
            limit: a narrower context, in tokens.
            what: names the tokens in the error.

        Raises:
            ContextError: not even one wanted token fits, or the ``tokens`` do not.
        """
        context = min(self.context, limit or self.context)
        room = context - tokens
        if room < min(wanted, 1):
            raise ContextError(_too_long(what, tokens, context, with_response=bool(wanted)))
        return min(wanted, room)

    def check_fits(self, vector: SteeringVector) -> None:
        """Raise ``VectorMismatchError`` unless every layer of the vector fits this model."""
        vector.check_fits(
            hidden_size=self.hidden_size,
            layer_count=self.layer_count,
            model=self.name or "the model",
        )

    def other_weights(self, vector: SteeringVector, *, strict: bool = False) -> str | None:
        """Return a warning if the vector was made for other weights than these, or ``None``.

        For a vector without a fingerprint, as other programs' files have none, the names of the
        models and their layer counts are compared; precision and organisation in a name do not count.

        Raises:
            VectorMismatchError: the same, with ``strict``.
        """
        meta = vector.meta
        if meta.fingerprint == self.fingerprint:
            return None
        theirs = one_line(meta.model, 80)
        if self.baked_layers:
            found = (
                f"is added to the steering that is baked into {self.name} (layer "
                f"{format_layers(self.baked_layers)})"
            )
        elif meta.fingerprint is not None:
            found = (
                f"was extracted from other weights ({theirs}, fingerprint "
                f"{one_line(meta.fingerprint, 40)}; this model is {self.name}, {self.fingerprint})"
            )
        elif _base_name(meta.model) != _base_name(self.name) or (
            # of an imported vector it is only the last layer of the file
            meta.source is None and meta.layer_count != self.layer_count
        ):
            found = (
                f"seems to be made for another model ({theirs}, {count(meta.layer_count, 'layer')}; "
                f"this model is {self.name}, {count(self.layer_count, 'layer')}). Its file has no "
                "fingerprint of the weights"
            )
        else:
            return None
        if strict:
            raise VectorMismatchError(
                f"{vector.name} {found}. Use a vector that was extracted from this model, or leave "
                "strict out."
            )
        return f"warning: {vector.name} {found}"

    def check_length(
        self, *texts: object, limit: int | None = None, what: str = "the prompt"
    ) -> None:
        """Raise ``ContextError`` for text that is too long for the context, without encoding all of it.

        A MiB takes seconds to encode. Text that may fit passes; ``room`` then counts all tokens.

        Args:
            texts: what else a prompt may be (token ids, ``None``) is left out.
            limit: a shorter context, as for ``room``.
            what: its name in the error.
        """
        context = min(self.context, limit or self.context)
        given = [text for text in texts if isinstance(text, str)]
        if sum(map(len, given)) <= _LIKELY * context:
            return
        least = 0  # tokens that the texts have for certain
        for text in given:
            for start in range(0, len(text), _PIECE):
                # replaced: lone surrogates, which cannot be encoded and are refused elsewhere
                piece = text[start : start + _PIECE].encode(errors="replace").decode()
                tokens = self.tokenizer.encode(piece, add_special_tokens=False)
                least += max(0, len(tokens) - _AT_CUTS)
                if least > context:
                    raise ContextError(_too_long(what, f"more than {context}", context))

    def solutions(self) -> list[tuple[list[int], int]]:
        """Return fixed solutions of three arithmetic stories: token ids, and where the response begins."""
        made = []
        for problem in calibration(_SOLUTIONS):
            raw = not self.tokenizer.has_chat_template
            prompt = encode_prompt(self.tokenizer, problem.question, raw=raw)
            text = draw_solution(problem, random.Random(problem.id))
            response = encode_text(self.tokenizer, text)
            made.append(([*prompt, *response], len(prompt)))
        return made


def _kl_key(
    vector: SteeringVector, layers: Sequence[int], positions: Positions, kl: float
) -> tuple[str, tuple[int, ...], Positions, float]:
    return vector.sha256(), tuple(sorted(layers)), positions, kl


def takes_model(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function or method whose first argument is a ``Model`` also take mlx-lm's pair.

    ``function(model, ...)``, ``function(network, tokenizer, ...)`` and ``function((network,
    tokenizer), ...)`` then do the same.
    """
    bound = next(iter(signature(function).parameters)) in ("self", "cls")

    @wraps(function)
    def call(*given: P.args, **options: P.kwargs) -> R:
        own, given = given[:bound], given[bound:]
        if not given and "model" in options:
            given = (options.pop("model"),)
        if given and isinstance(given[0], nn.Module):
            if "tokenizer" in options:
                given = (given[0], options.pop("tokenizer"), *given[1:])
            if len(given) > 1 and isinstance(given[1], TokenizerWrapper):
                given = (given[:2], *given[2:])
        if given:
            given = (Model.of(given[0]), *given[1:])
        return function(*own, *given, **options)

    return call


def load(
    path_or_repo: str | Path, *, revision: str | None = None, adapter_path: str | None = None
) -> Model:
    """Load a model from a folder or a Hub id. It unpacks as ``network, tokenizer = load(...)``.

    ``"demo"`` is the embedded demo model, in bfloat16; on a CPU, where mlx computes bfloat16
    slowly, it is in float32.

    Raises:
        UnsupportedModelError: it cannot be steered, or mlx-lm would compute something else than transformers.
        ModelError: not a model folder, or its files are damaged.
        HubError: the Hub did not deliver the files.
    """
    path = find(path_or_repo, revision=revision)
    model = load_folder(path, adapter_path=adapter_path, name=origin(path_or_repo))
    set_dtype(model.network, path)
    _ = model.end_of_turn  # told now, not within an answer
    if remark := unlike(parse_config(read_file(path), str(path))):
        note(f"{model.name}: {remark}")
    if model.baked_layers:
        where = format_layers(model.baked_layers)
        note(
            f"{model.name}: has its steering baked in (layer {where}), so unsteered means with that"
        )
    return model


def set_dtype(network: nn.Module, path: Path) -> None:
    """Set the demo model's dtype; other models keep that of their file."""
    if path == demo.MODEL and mx.default_device() == mx.Device(mx.cpu):
        network.set_dtype(mx.float32)


def load_folder(path: Path, *, adapter_path: str | None = None, name: str | None = None) -> Model:
    """Load the model of a folder in the dtype of its file; raises as ``load`` does."""
    check_memory(path)
    network, config = open_network(path, adapter_path=adapter_path)
    # Python opens the tokenizer while mlx reads the weights and looks at them: each takes a second or so. What
    # mlx does is laid out before, since the two would wait for each other's turn to run Python.
    with loading(path), ThreadPoolExecutor(1) as aside:
        looked = finite(network)
        opening = aside.submit(open_tokenizer, path, config)
        mx.eval(network.parameters())  # first: macOS ends what waits on the GPU for long
        check_finite(network, str(path), looked)
        tokenizer = opening.result()
    model = Model(network, tokenizer, origin(path) if name is None else name)
    baked = config.get(BAKED)
    if isinstance(baked, dict) and isinstance(baked.get("layers"), list):
        model.baked_layers = tuple(baked["layers"])  # a bias of the model's own may hide them
    return model


def open_network(
    path: Path, *, adapter_path: str | None = None
) -> tuple[nn.Module, dict[str, object]]:
    """Return a folder's network, with stock blocks, and its configuration.

    The weights stay on the disk until they are used.
    """
    with loading(path), mlx_lm_folder(path) as place:
        network, config = load_model(place, lazy=True)
        network.args.max_position_embeddings = config[
            "max_position_embeddings"
        ]  # some classes drop it
        if adapter_path is not None:
            with loading(Path(adapter_path)):
                check_adapter(Path(adapter_path))
                network = load_adapters(network, adapter_path)
            network.eval()
    return network, config


def open_tokenizer(path: Path, config: Mapping[str, object]) -> TokenizerWrapper:
    """Return the tokenizer of a folder whose configuration ``open_network`` returned."""
    with loading(path):
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    # Model.room refuses what transformers only warns of.
    tokenizer.deprecation_warnings[_TOO_LONG] = True
    return tokenizer


@contextlib.contextmanager
def mlx_lm_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder of links in which mlx-lm finds what ``path`` holds, and nothing else.

    mlx-lm would load every ``model*.safetensors``, and none if the folder's name has brackets; and
    it reads ``config.json`` otherwise than transformers (see ``read_config``).
    """
    config, tensors = read_folder(path)
    config = for_batches(config)
    empty_network(config, str(path))
    check_tokenizer(path)
    with tempfile.TemporaryDirectory(prefix="densesteer-") as made:
        place = Path(made)
        for number, file in enumerate(sorted({tensor.file for tensor in tensors.values()})):
            (place / f"model-{number:05d}.safetensors").symlink_to(file.absolute())
        for file in path.iterdir():
            if file.suffix not in (".safetensors", ".py") and file.name not in (
                "config.json",
                INDEX,
            ):
                (place / file.name).symlink_to(file.absolute())
        (place / "config.json").write_text(json.dumps(config), "utf-8")
        yield place


def check_memory(path: Path, *, in_use: int = 0) -> None:
    """Say before loading that a model does not fit beside ``in_use`` bytes.

    Raises:
        ModelTooLargeError: it is larger than the memory that is left.
    """
    device = gpu()
    limit = working_set(device)
    if limit is None:
        return
    weights = sum(tensor.stop - tensor.start for tensor in read_folder(path)[1].values())
    if weights + in_use <= FOR_WEIGHTS * limit:
        return
    memory = device.get("memory_size", math.inf)
    remedy = "Convert it with fewer bits (`densesteer convert --bits 4`), or choose a smaller one."
    found = f"{path}: the model takes {weights / 2**30:.1f} GiB"
    if weights + in_use > memory:
        taken = f", {in_use / 2**30:.1f} of them in use" if in_use else ""
        raise ModelTooLargeError(
            f"{found}, and this machine has {memory / 2**30:.1f} GiB{taken}. {remedy}"
        )
    note(
        f"warning: {found}, of {limit / 2**30:.1f} that the GPU can keep: it will be slow. {remedy}"
    )


def check_tokenizer(path: Path) -> None:
    """Raise ``ModelError`` unless the folder has a tokenizer: transformers would make an empty one."""
    has = {
        name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (path / name).is_file()
    }
    if "tokenizer.json" not in has and has != {"vocab.json", "merges.txt"}:
        raise ModelError(
            f"{path}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt. Copy them, and "
            "tokenizer_config.json, from the model's original folder."
        )


def finite(network: nn.Module) -> tuple[mx.array, mx.array]:
    """Return, not yet evaluated, whether the logits of one token are finite, and the sums of the embeddings.

    The logits depend on every weight but the other rows of untied embeddings, of which the sums
    are taken. The cost is that of one generated token.
    """
    logits = mx.isfinite(network(mx.array([[0]]))).all()
    sums = mx.array(True)
    if "lm_head" in network:
        for array in network.model.embed_tokens.parameters().values():
            if mx.issubdtype(array.dtype, mx.floating):
                sums &= mx.isfinite(array.sum(axis=-1)).all()
    return logits, sums


def check_finite(
    network: nn.Module, name: str, looked: tuple[mx.array, mx.array] | None = None
) -> None:
    """Raise ``ModelError`` if a weight is NaN or infinite, or the dtype is too narrow for the model.

    Args:
        looked: what ``finite`` returned, if it was called before.
    """
    logits, sums = looked or finite(network)
    if (logits & sums).item():
        return
    wrong = [
        weight
        for weight, array in tree_flatten(network.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item()
    ]
    if logits.item() and not wrong:  # a sum may overflow where no number does
        return
    found = f"{wrong[0]} has NaN or infinity in it" if wrong else "some value overflows"
    raise ModelError(
        f"{name}: its logits are not finite: {found} (dtype {dtype_name(stream_dtype(network))}). "
        "Download or convert it again, with the dtype bfloat16 or float32."
    )


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Raise ``ModelError`` for whatever mlx-lm, transformers or mlx raise if they cannot load a folder."""
    try:
        place = Path(os.environ.get("TMPDIR", "/tmp"))
        with full_disk(place, "TMPDIR"):  # mlx_lm_folder writes there
            yield
    except DenseSteerError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be loaded ({cause(error)}). Convert or download it again."
        ) from error


def find(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a model; download it if it is a Hub id.

    ``demo`` is the embedded model; a folder of that name is ``./demo``.
    """
    if str(path_or_repo) == demo.NAME:
        return demo.MODEL
    return local_folder(path_or_repo) or fetch_model(str(path_or_repo), revision=revision)


def dtype_name(dtype: mx.Dtype) -> str:
    """Return ``bfloat16`` for ``mx.bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def _too_long(what: str, tokens: int | str, context: int, *, with_response: bool = True) -> str:
    return (
        f"{what} has {tokens} tokens, and the model's context is {context}"
        f"{' with the response' if with_response else ''}. Shorten it."
    )


def _base_name(model: str) -> str:
    """Return the name of a checkpoint without its folder or organisation, and without its precision."""
    name = model[-200:].replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
    while (shorter := _PRECISION.sub("", name)) != name:
        name = shorter
    return name


def _is_baked(block: nn.Module) -> bool:
    """Tell whether a block's last bias is a vector that ``bake`` wrote: its other biases in the MLP are zero."""
    last = last_bias(block)
    if last is None or not last.any().item():
        return False
    gate = block.mlp.get("gate_proj", {})
    other = getattr(gate, "linear", gate).get("bias")
    return other is not None and not other.any().item()


def _bfloat16_bytes(array: mx.array) -> bytes:
    return bytes(memoryview(array.astype(mx.bfloat16).view(mx.uint16)))
