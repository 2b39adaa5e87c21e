"""A prefix's caches in a file (safetensors), for the weights that filled them and no others."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..files import atomic_file, file_sha256
from ..model.model import weights_digest
from ..model.prefix import Prefix

FORMAT = "mlx-densesteer caches 1"


def save_prefix(prefix: Prefix, path: Path) -> str:
    """Write the caches, the kept residual stream and what they belong to; return the SHA-256.

    Raises:
        DiskError: the file cannot be written.
    """
    arrays = dict(tree_flatten(prefix.state))
    about = {
        "format": FORMAT,
        "weights": weights_digest(prefix.model),
        "identity": json.dumps(prefix.identity),
    }
    with atomic_file(path) as file:
        mx.save_safetensors(file, arrays, metadata=about)
    return file_sha256(path)


def load_prefix(prefix: Prefix, path: Path, sha256: str) -> bool:
    """Fill ``prefix`` from a file; ``False``, and nothing is changed, if it is not for it.

    Not for it: another file than the one with this SHA-256, other weights, another dtype, other
    quantisation of keys and values.
    """
    if not path.is_file() or file_sha256(path) != sha256:
        return False
    arrays, about = mx.load(str(path), format="safetensors", return_metadata=True)
    if about.get("format") != FORMAT or about.get("weights") != weights_digest(prefix.model):
        return False
    return prefix.restore(tree_unflatten(list(arrays.items())), json.loads(about["identity"]))
