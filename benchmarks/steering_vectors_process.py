"""steering-vectors (PyTorch) in another process: the other side of ``extract.py --oracle``.

``PYTHON steering_vectors_process.py MODEL`` runs in a Python that has torch, transformers and
steering-vectors, and does not need this package.
"""

import json
import subprocess
import sys
import time
from pathlib import Path


class SteeringVectorsProcess:
    """Sends pairs to the other Python, which answers with seconds, counts and vectors.

    Raises:
        OSError: there is no such program.
        ChildProcessError: it ended; its own message is on standard error.
    """

    def __init__(self, python: str, folder: Path):
        self._process = subprocess.Popen(
            [python, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.versions = self._answer()

    def train(self, pairs: list[list[str | None]], layers: list[int], batch_size: int) -> dict:
        """Train on ``pairs`` (system, prompt, positive, negative)."""
        task = {"pairs": pairs, "layers": layers, "batch_size": batch_size}
        self._process.stdin.write(json.dumps(task) + "\n")
        return self._answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ChildProcessError(f"the process with steering-vectors ended (exit code {code}).")
        return json.loads(line)


def serve(folder: str) -> None:
    """In the other Python: train on each line, and answer with seconds and counts."""
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
        samples = [_sample(tokenizer, *pair) for pair in task["pairs"]]
        counts.update(blocks=0, head=0)
        began = time.perf_counter()
        trained = steering_vectors.train_steering_vector(
            model, tokenizer, samples, layers=task["layers"], batch_size=task["batch_size"]
        )
        seconds = time.perf_counter() - began
        vectors = {k: v.tolist() for k, v in trained.layer_activations.items()}
        print(json.dumps({"seconds": seconds, "vectors": vectors} | counts), flush=True)


def _sample(
    tokenizer, system: str | None, prompt: str, positive: str, negative: str
) -> tuple[str, str]:
    turn = [{"role": "user", "content": prompt}]
    if system is not None:
        turn.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return text + positive.strip(), text + negative.strip()


if __name__ == "__main__":
    del sys.path[0]  # this folder, so that torch does not import a benchmark
    serve(sys.argv[1])
