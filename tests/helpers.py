"""Constants and functions that tests of several rooms share."""

import contextlib
import json
import os
import resource
import subprocess
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask

from mlx_densesteer.model.block import make_cache
from mlx_densesteer.model.families import decoder_blocks
from mlx_densesteer.model.machine import rounds_to_tf32
from mlx_densesteer.model.marks import Marks
from mlx_densesteer.steering.steering import Steering

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
QUICK_RETRIES = ROOT / "tests" / "quick_retries"
HIDDEN, LAYERS, VOCABULARY = 64, 4, 128
THOUGHT = 7, 11  # the tokens that open and close a thought of a tiny network
CALL = 8, 13  # and a tool call


def run_with_torch(*arguments, timeout=300):
    """Run Python's ``arguments`` in .venv-torch; skip without it, or fail where it must be (CI)."""
    python = ROOT / ".venv-torch/bin/python"
    if not python.exists():
        message = "no .venv-torch: make it with scripts/make-torch-env"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=timeout,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def at_every_layer(vector, strength=1.0, positions="all"):
    """Return the steering at all layers that the vector holds."""
    return Steering(vector, strength, tuple(vector.layers), positions)


def every_third_ends_a_step(network, tokenizer=None):
    """Let every third token of a tiny network end a step, ``THOUGHT`` and ``CALL`` be marks; return the network.

    It has no tokenizer, or one that writes a blank line as two tokens.
    """
    marks = network.model.marks = Marks(tokenizer, network.args.vocab_size)
    marks.step_ends = np.arange(network.args.vocab_size) % 3 == 0
    marks.thought, marks.call = THOUGHT, CALL
    return network


def rounding(logits):
    """Return of how many logits two ways to compute them may differ.

    2^-17 of the largest one, 2^-5 in bfloat16, 1e-3 where float32 products are rounded to TF32.
    """
    share = 1e-3 if rounds_to_tf32() else 2**-17
    return mx.abs(logits).max().item() * (2**-5 if logits.dtype == mx.bfloat16 else share)


def same_but_for_ties(got, expected, logits_after):
    """Tell whether two answers have the same tokens; fail where they part and it is no near tie.

    ``logits_after(tokens)`` returns the logits after the prompt and the tokens that are the same.
    """
    if got == expected:
        return True
    same = next(i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
    logits = logits_after(got[:same])
    margin = mx.abs(logits[expected[same]] - logits[got[same]]).item()
    assert margin < rounding(logits), f"token {same}: {got} {expected}"
    return False


def same_answer(model, prompt, got, expected):
    """Assert that two results for the prompt's token ids are the same, up to the first near tie."""
    network = getattr(model, "network", model)

    def logits_after(tokens):
        cache = make_cache(network, expected.steering, prompt=prompt)
        return network(mx.array([[*prompt, *tokens]]), cache)[0, -1]

    names = ["prompt_tokens", "steering"]
    if same_but_for_ties(got.token_ids, expected.token_ids, logits_after):
        names += ["text", "finish_reason"]
    for name in names:
        assert getattr(got, name) == getattr(expected, name), (name, prompt)


def streams(network, tokens, deltas=None, within=lambda position: True):
    """Return the residual stream after every block, worked out by hand: ``h_l + delta_l``."""
    h = network.model.embed_tokens(mx.array([tokens]))
    mask = create_attention_mask(h)
    steered = mx.array([[float(within(p))] for p in range(len(tokens))])
    found = []
    for layer, block in decoder_blocks(network).items():
        h = block(h, mask, None)
        if deltas and layer in deltas:
            h = h + steered * mx.array(deltas[layer])
        found.append(h)
    return found


def without_added_tokens(tokenizer):
    """Return the tokenizer that the same file gives without its added tokens, special or not."""
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}
    return Tokenizer.from_str(json.dumps(document))


def checkpoint_cache() -> Path:
    """Where ``scripts/fetch-test-model`` puts the real checkpoint."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mlx-densesteer"


def pt_file(
    path: Path, body: bytes, storages: dict[str, bytes] | None = None, root="archive"
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", body)
        archive.writestr(f"{root}/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", data)
    return path


def opcodes(
    *, cls=b"csteering_vectors.steering_vector\nSteeringVector\n", rebuild=b"ctorch._utils\n_rebuild_tensor_v2\n",
    storage=b"ctorch\nHalfStorage\n", count=8, offset=0, size=8, stride=1, layer=None, layer_type=b"decoder_block",
) -> bytes:  # fmt: skip
    """Return the pickle of a vector with one layer, as torch.save writes it; ``layer``: of a dict."""

    def number(n: int) -> bytes:
        return b"J" + n.to_bytes(4, "little", signed=True)

    def numbers(of: int | tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, of if isinstance(of, tuple) else (of,))) + b"t"

    def text(t: bytes) -> bytes:
        return b"X" + len(t).to_bytes(4, "little") + t

    tensor = (
        rebuild + b"((" + text(b"storage") + storage + text(b"0") + text(b"cpu") + number(count)
        + b"tQ" + number(offset) + numbers(size) + numbers(stride) + b"\x89"
        + b"ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    if layer is not None:  # {layer: tensor}
        name = number(layer) if isinstance(layer, int) else text(layer)
        return b"\x80\x02}" + name + tensor + b"s."
    return (
        b"\x80\x02" + cls + b")\x81}(" + text(b"layer_activations") + b"}" + number(0) + tensor + b"s"
        + text(b"layer_type") + text(layer_type) + b"ub."
    )  # fmt: skip


VALUES = np.arange(8, dtype="<f2")


@contextlib.contextmanager
def disk_of(size):
    """Let no file grow beyond ``size`` bytes, as on a disk that is full by then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
