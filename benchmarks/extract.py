"""``extract`` against steering-vectors (PyTorch): the same weights, the same pairs, the same vector.

    python benchmarks/extract.py MODEL --oracle PYTHON [--pairs pairs.jsonl] [--limit N]
                                 [--layers all] [--batch-size 1] [--rounds 2] [--json]

MODEL is a folder in float32 that Hugging Face transformers reads too (scripts/fetch-test-model);
PYTHON has torch, transformers and steering-vectors. steering-vectors runs in a process of its
own, as its users call it (one sequence after the other by default, as the DenseSteer authors do),
and the two take turns, so that a machine whose speed drifts favours neither side. Loading the
models is not counted, tokenising is.

Positions are counted on both sides by a hook on the decoder blocks, padding included. A *token*
is a position through every block of the model; work is counted in multiply-adds of weights, with
the vocabulary head, which only steering-vectors computes.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def serve_reference(folder: str) -> None:
    """In the other Python: train on each line of samples, and answer with seconds and counts."""
    import steering_vectors
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    counts = {"blocks": 0, "head": 0}

    def count(name):
        def hook(_, inputs):
            counts[name] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    for block in model.model.layers:
        block.register_forward_pre_hook(count("blocks"))
    model.lm_head.register_forward_pre_hook(count("head"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        samples = []
        began = time.perf_counter()
        for system, prompt, positive, negative in task["pairs"]:
            turn = [{"role": "user", "content": prompt}]
            if system is not None:
                turn.insert(0, {"role": "system", "content": system})
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            samples.append((text + positive.strip(), text + negative.strip()))
        counts.update(blocks=0, head=0)
        trained = steering_vectors.train_steering_vector(
            model, tokenizer, samples, layers=task["layers"], batch_size=task["batch_size"]
        )
        seconds = time.perf_counter() - began
        vectors = {k: v.tolist() for k, v in trained.layer_activations.items()}
        print(json.dumps({"seconds": seconds, "vectors": vectors} | counts), flush=True)


class Reference:
    """steering-vectors in a process of its own."""

    def __init__(self, python: str, folder: str):
        command = [python, __file__, "--serve", folder]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the reference's process ended; its message is above.")
        return json.loads(line)

    def run(self, pairs: list, layers: list[int], batch_size: int) -> dict:
        rows = [[pair.system, pair.prompt, pair.positive, pair.negative] for pair in pairs]
        task = {"pairs": rows, "layers": layers, "batch_size": batch_size}
        self._process.stdin.write(json.dumps(task) + "\n")
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Ours:
    """``extract`` in this process, its blocks' positions counted."""

    def __init__(self, folder: str):
        from mlx_densesteer import load
        from mlx_densesteer.patch import SteeredBlock

        self.model, self.tokenizer = load(folder)
        self._blocks = 0
        forward = SteeredBlock.__call__

        def counted(block, x, *rest):
            self._blocks += x.shape[0] * x.shape[1]
            return forward(block, x, *rest)

        SteeredBlock.__call__ = counted

    def run(self, pairs: list, layers: list[int]) -> dict:
        from mlx_densesteer.extraction import extract_with_report

        self._blocks = 0
        began = time.perf_counter()
        found = extract_with_report(self.model, self.tokenizer, pairs, layers=layers)
        seconds = time.perf_counter() - began
        assert self._blocks == found.tokens * (max(layers) + 1), "the report miscounts"
        vectors = found.vector.layers
        return {"seconds": seconds, "vectors": vectors, "blocks": self._blocks, "head": 0}


def shares(tokenizer, pairs: list) -> dict[str, int]:
    """Return how many positions sharing each part saves, and how many padding costs."""
    from mlx_densesteer.extraction import ReadOut, encode_pairs
    from mlx_densesteer.token_tree import TokenTree

    token_pairs = encode_pairs(tokenizer, pairs, ReadOut.of(-1))
    tree = TokenTree.of(token_pairs)
    stems = [stem for batch in tree.batches for stem in batch.stems]
    saved = {
        "prompt_once": sum(len(pair.prompt) for pair in token_pairs),
        "template_once": (len(pairs) - 1) * len(tree.root),
        "common_beginnings": sum(stem.stop - stem.prompt for stem in stems),
    }
    padding = tree.tokens - (tree.tokens_apart - sum(saved.values()))
    responses = sum(len(pair.positive) + len(pair.negative) for pair in token_pairs)
    return {"apart": tree.tokens_apart, **saved, "padding": padding, "responses": responses}


def work(run: dict, model) -> float:
    """Return multiply-adds of weights: positions times parameters, of blocks and of the head."""
    from mlx.utils import tree_flatten

    block = sum(a.size for _, a in tree_flatten(model.model.layers[0].parameters()) if a.ndim == 2)
    return run["blocks"] * block + run["head"] * model.args.vocab_size * model.args.hidden_size


def largest_difference(one: dict, other: dict) -> float:
    import numpy as np

    return max(
        float(np.linalg.norm(array - np.array(other[str(layer)])) / np.linalg.norm(array))
        for layer, array in one.items()
    )


def measure(options: argparse.Namespace) -> dict:
    import mlx.core as mx

    from mlx_densesteer.pairs import read_pairs
    from mlx_densesteer.steering import parse_layers

    pairs = read_pairs(options.pairs)[: options.limit]
    ours, reference = Ours(options.model), Reference(options.oracle, options.model)
    count = ours.model.args.num_hidden_layers
    layers = list(parse_layers([options.layers], range(count)))
    ours.run(pairs[:1], layers)  # warm up
    reference.run(pairs[:1], layers, 1)
    rounds = []
    for number in range(options.rounds):
        theirs = None
        if number % 2 == 0:
            theirs = reference.run(pairs, layers, options.batch_size)
        mine = ours.run(pairs, layers)
        if theirs is None:
            theirs = reference.run(pairs, layers, options.batch_size)
        rounds.append((mine, theirs))
    reference.close()
    mine, theirs = rounds[0]
    tokens = mine["blocks"] / (max(layers) + 1), theirs["blocks"] / count
    times = [b["seconds"] / a["seconds"] for a, b in rounds]
    return {
        "extract_token_ratio": tokens[1] / tokens[0],
        "extract_block_ratio": theirs["blocks"] / mine["blocks"],
        "extract_work_ratio": work(theirs, ours.model) / work(mine, ours.model),
        "extract_time_ratio": statistics.median(times),
        "time_ratios": times,
        "tokens": {"ours": round(tokens[0]), "steering_vectors": round(tokens[1])},
        "seconds": {
            "ours": [a["seconds"] for a, _ in rounds],
            "steering_vectors": [b["seconds"] for _, b in rounds],
        },
        "shares": shares(ours.tokenizer, pairs),
        "largest_relative_difference": largest_difference(mine["vectors"], theirs["vectors"]),
        "pairs": len(pairs),
        "layers": len(layers),
        "last_layer": max(layers),
        "model_layers": count,
        "batch_size_of_steering_vectors": options.batch_size,
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"mlx": mx.__version__, **reference.versions},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["benchmarks/extract.py", *sys.argv[1:]]),
    }


def tell(r: dict) -> None:
    print(f"{r['pairs']} pairs, layers up to {r['last_layer']} of {r['model_layers']}, steering-vectors "
          f"with batch size {r['batch_size_of_steering_vectors']}; {r['device']}, {r['machine']}")  # fmt: skip
    print(
        f"largest relative difference of a layer's vector: {r['largest_relative_difference']:.1e}"
    )
    print("                       ours  steering-vectors  ratio")
    print(f"tokens computed  {r['tokens']['ours']:>10,}{r['tokens']['steering_vectors']:>18,}"
          f"{r['extract_token_ratio']:>7.2f}")  # fmt: skip
    seconds = [statistics.median(r["seconds"][name]) for name in ("ours", "steering_vectors")]
    print(f"seconds          {seconds[0]:>10.1f}{seconds[1]:>18.1f}{r['extract_time_ratio']:>7.2f}")
    print(f"positions through a block, ratio {r['extract_block_ratio']:.2f}; "
          f"multiply-adds, ratio {r['extract_work_ratio']:.2f}")  # fmt: skip
    s = r["shares"]
    print(f"of {s['apart']:,} tokens: prompt once saves {s['prompt_once']:,}, template once "
          f"{s['template_once']:,}, common beginnings {s['common_beginnings']:,}; padding costs "
          f"{s['padding']:,}; {s['responses']:,} are in the responses")  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve_reference(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--oracle", required=True, metavar="PYTHON")
    parser.add_argument("--pairs", default=ROOT / "scripts" / "demo-pairs.jsonl")
    parser.add_argument("--limit", type=int, default=50, help="pairs at most")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--batch-size", type=int, default=1, help="of steering-vectors")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        tell(result)


if __name__ == "__main__":
    main()
