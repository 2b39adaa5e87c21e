"""Make the demo's steering vector: mean difference over the pairs in demo-pairs.jsonl.

python scripts/demo_vector.py MODEL OUT.npz
"""

import sys
from pathlib import Path

from mlx_densesteer import Pair, SteeringVector, extract, load
from mlx_densesteer.errors import VectorError
from mlx_densesteer.extraction.pairs import pairs_sha256, read_pairs
from mlx_densesteer.model.config import recorded


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    pairs = read_pairs(Path(__file__).parent / "demo-pairs.jsonl")
    if is_current(out, pairs, recorded(folder).get("fingerprint")):
        print(f"demo: using {out}", file=sys.stderr)
        return
    print(f"demo: reading {len(pairs)} pairs with {folder.name} ...", file=sys.stderr)
    extract(load(folder), pairs).save(out)
    print(f"demo: saved {out}", file=sys.stderr)


def is_current(out: Path, pairs: list[Pair], fingerprint: object) -> bool:
    try:
        meta = SteeringVector.load(out).meta
    except (OSError, VectorError):
        return False
    return meta.pairs_sha256 == pairs_sha256(pairs) and meta.fingerprint == fingerprint


if __name__ == "__main__":
    main()
