"""Every reader of files and of texts from outside, with whole inputs for it."""

import asyncio
import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers import VALUES, opcodes, pt_file
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from starlette.requests import Request

from mlx_densesteer import demo
from mlx_densesteer.cli.doctor import tiny_model
from mlx_densesteer.evaluation.answers import read_answers
from mlx_densesteer.evaluation.grading import grade, stated_answer
from mlx_densesteer.evaluation.journal import Journal
from mlx_densesteer.evaluation.tasks import Problem, load_task
from mlx_densesteer.extraction.pairs import read_pairs
from mlx_densesteer.extraction.verification import new_numbers
from mlx_densesteer.generation.answer import split_steps, step_starts
from mlx_densesteer.generation.session import Session
from mlx_densesteer.model import gguf as gguf_model
from mlx_densesteer.model.config import read_config
from mlx_densesteer.model.model import Model, check_finite, load, loading, mlx_lm_folder
from mlx_densesteer.model.weights import weight_files
from mlx_densesteer.server.body import read_json
from mlx_densesteer.server.schema import ChatRequest, CompletionRequest
from mlx_densesteer.steering.formats import export_vector, import_vector
from mlx_densesteer.steering.request import Amount, parse_layers, resolve
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta


@dataclass(frozen=True)
class Reader:
    """A reader: ``read`` takes the path of a damaged file.

    ``form`` is one of ``mutation.FORMS``; ``whole`` are inputs that it reads without an error.
    """

    name: str
    form: str
    file: str
    whole: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]


READERS: dict[str, Reader] = {}


def reader(form: str, file: str, whole: Callable[[Path], list[bytes]]) -> Callable:
    def register(read: Callable[[Path], object]) -> Callable[[Path], object]:
        name = read.__name__
        READERS[name] = Reader(name, form, file, whole, read)
        return read

    return register


def vectors() -> Iterator[SteeringVector]:
    rng = np.random.default_rng(0)
    for width, layers in ((4, [1]), (8, [1, 3])):
        meta = VectorMeta(
            model="Qwen/Qwen2.5-1.5B-Instruct", hidden_size=width, layer_count=4, fingerprint="0123456789abcdef",
            method="mean difference", token="-1 of the response", pair_count=50, pairs_sha256="ab" * 32,
            tested=({"layers": [1], "strength": 0.1, "accuracy": 0.5},), residual_norms={"0": 1.5, "3": 2.5},
            recommended={"layers": [1], "strength": 0.25}, margin_gain={"1": 0.5}, extra={"note": "Grüße"},
        )  # fmt: skip
        yield SteeringVector({n: rng.normal(size=width).astype(np.float32) for n in layers}, meta)


def exported(ending: str) -> Callable[[Path], list[bytes]]:
    """Return a function that makes the files of one format."""

    def make(folder: Path) -> list[bytes]:
        path = folder / f"whole{ending}"
        files = []
        for vector in vectors():
            vector.save(path) if ending == ".npz" else export_vector(vector, path)
            files.append(path.read_bytes())
        return files

    return make


def show(vector: SteeringVector) -> None:
    """Do what every door does with a vector first."""
    vector.describe(), vector.norms(), vector.residual_norms, vector.margin_gain
    with contextlib.suppress(KeyError):
        demo_model().other_weights(vector)


@functools.cache
def demo_model() -> Model:
    return load("demo")


@reader("zip", "v.npz", exported(".npz"))
def npz(path: Path) -> None:
    show(SteeringVector.load(path))


@reader("safetensors", "v.safetensors", exported(".safetensors"))
def safetensors(path: Path) -> None:
    show(import_vector(path))


@reader("bytes", "v.gguf", exported(".gguf"))
def control_vector(path: Path) -> None:
    show(import_vector(path))


def pt_files(folder: Path) -> list[bytes]:
    storage = {"0": VALUES.tobytes()}
    return [pt_file(folder / "whole.pt", opcodes(), storage).read_bytes()]


@reader("zip", "v.pt", pt_files)
def pt(path: Path) -> None:
    show(import_vector(path, model="m"))


def configs(folder: Path) -> list[bytes]:
    plain = json.loads((demo.MODEL / "config.json").read_bytes())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    return [
        json.dumps(document).encode()
        for document in (plain, plain | {"rope_scaling": yarn}, plain | {"rope_parameters": yarn})
    ]


@reader("json", "config.json", configs)
def config(path: Path) -> None:
    beside(path, "model.safetensors", lambda to: shutil.copy(demo.MODEL / to.name, to))
    read_config(path.parent)


def beside(path: Path, name: str, make: Callable[[Path], object]) -> None:
    """Make the file ``name`` beside a damaged file, unless it is there."""
    if not (path.parent / name).exists():
        make(path.parent / name)


TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1,
    "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
    "vocab_size": 8, "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip


def weights_files(folder: Path) -> list[bytes]:
    network = tiny_model(layers=1, hidden=8, vocabulary=8)
    arrays = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "whole.safetensors"), arrays, metadata={"format": "pt"})
    return [(folder / "whole.safetensors").read_bytes()]


@reader("safetensors", "model.safetensors", weights_files)
def weights(path: Path) -> None:
    """What mlx makes of the weights, too: one forward pass."""
    args = tiny_model(layers=1, hidden=8, vocabulary=8).args
    known = {name: getattr(args, name) for name in TINY if hasattr(args, name)}
    beside(path, "config.json", lambda to: to.write_text(json.dumps(TINY | known)))
    beside(path, "tokenizer.json", lambda to: to.write_text("{}"))
    with loading(path.parent), mlx_lm_folder(path.parent) as place:
        network, _ = load_model(place)
    check_finite(network, str(path.parent))


def indexes(folder: Path) -> list[bytes]:
    names = list(mx.load(str(demo.MODEL / "model.safetensors")))
    places = dict.fromkeys(names, "model.safetensors")
    return [json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()]


@reader("json", "model.safetensors.index.json", indexes)
def weights_index(path: Path) -> None:
    beside(path, "model.safetensors", lambda to: shutil.copy(demo.MODEL / to.name, to))
    weight_files(path.parent)


def gguf_files(folder: Path) -> list[bytes]:
    from gguf_model import write_gguf

    network = tiny_model(layers=1, hidden=32, vocabulary=263)
    return [write_gguf(folder / "whole.gguf", network).read_bytes()]


@reader("bytes", "m.gguf", gguf_files)
def gguf_of_a_model(path: Path) -> None:
    found = gguf_model.open_gguf(path)
    with gguf_model.damage(path):
        gguf_model.read_config(found, "float32", str(path))


def sessions(folder: Path) -> list[bytes]:
    made = []
    model = demo_model()
    for steering in (None, resolve(model, demo.NAME)):
        session = Session(model, steering, max_tokens=4)
        for question in ("Tom has 4 eggs. How many eggs?", "And now?"):
            list(session.send(question))
        made.append(session.save(folder / "whole.json").read_bytes())
        (folder / "whole.json").unlink()
    return made


@reader("json", "talk.json", sessions)
def session(path: Path) -> None:
    Session.load(path, demo_model())


HEADER = {"format": "answers", "model": "demo"}


def journals(folder: Path) -> list[bytes]:
    key = {"problem": "p-1", "content": "0" * 12, "steering": "unsteered"}
    answer = key | {
        "text": "12+5=17.\n\n17", "token_ids": [1, 2, 3], "steps": 2, "finish_reason": "stop", "seconds": 0.5,
        "found": "17", "correct": True, "by_reference": True, "by_math_verify": None,
    }  # fmt: skip
    lines = (
        HEADER,
        answer,
        answer | {"problem": "p-2"},
        {"nll_of": list(key.values()), "nll": 0.5},
    )
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


@reader("jsonl", "run.jsonl", journals)
def journal(path: Path) -> None:
    with Journal(path, HEADER) as opened:
        read_answers(opened, 512)


def lines(*documents: object) -> Callable[[Path], list[bytes]]:
    """Return a function that makes one JSON lines file."""
    return lambda folder: ["".join(json.dumps(one) + "\n" for one in documents).encode()]


@reader(
    "jsonl",
    "pairs.jsonl",
    lines(
        {"prompt": "What is 1+2?", "positive": "3", "negative": "Let us see.\n\n3", "system": None},
        {"doc": {"question": "What is 2+2?"}, "resp_after": ["4"], "resp_before": [["Well.\n\n4"]]},
    ),
)
def pairs(path: Path) -> None:
    read_pairs(path)


@reader(
    "jsonl",
    "task.jsonl",
    lines(
        {"question": "What is 1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"},
        {"problem": "What is $1/2$?", "answer": "\\frac{1}{2}", "unique_id": "a/1"},
        {"question": "And?", "final_answer": ["$2$"], "context": "c", "unit": "m", "id": 7},
    ),
)
def task(path: Path) -> None:
    for problem in load_task(path):
        grade(problem, problem.answer)


ANSWERS = (
    "12+5=17.\n\n17*2=34.\n\n#### 34",
    "So we get \\boxed{9{,}500} eggs, that is \\boxed{\\frac{19000}{2}}.",
    "The **answer** is $1,234.50 or \\text{about} 1/2 of it.\n\n```\nx = 1\n\ny = 2\n```\n- a\n\n- b",
)


@reader("text", "answer.txt", lambda folder: [text.encode() for text in ANSWERS])
def answer(path: Path) -> None:
    text = path.read_text("utf-8", "surrogateescape")
    number = Problem("p", "q", "q", "34", "number")
    grade(number, text)
    if len(text) < 2000:  # the boxed rule asks math-verify, in a process of its own
        grade(Problem("p", "q", "q", "9500", "boxed"), text.replace("\\boxed", "\\fbox"))
    split_steps(text)
    step_starts(text)
    stated_answer(text)
    # pairs cuts a rewrite to what the context holds
    new_numbers(number, ANSWERS[0], text[:200_000])


def body(kind: type, documents: list[object]) -> None:
    """Register the reader of one kind of request."""

    def read(path: Path) -> None:
        data = path.read_bytes()

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": data, "more_body": False}

        headers = [(b"content-type", b"application/json")]
        request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
        asyncio.run(read_json(request, kind, limit=2**20, seconds=60))

    read.__name__ = kind.__name__
    reader("json", "body.json", lambda folder: [json.dumps(one).encode() for one in documents])(
        read
    )


body(
    ChatRequest,
    [
        {
            "model": "demo", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "steering": {"vector": "demo", "strength": "20%", "layers": [5], "positions": "all"},
            "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "n": 2, "logprobs": True,
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}], "stream": True},
    ],
)  # fmt: skip
body(
    CompletionRequest,
    [
        {"prompt": "a", "max_tokens": 4, "stop": "x"},
        {"prompt": [1, 2, 3], "logprobs": 2, "seed": 1},
    ],
)


@reader("text", "amount.txt", lambda folder: [b"20%", b"-1.5", b"+0.25 %", b"1e-3"])
def amount(path: Path) -> None:
    Amount.parse(path.read_text("utf-8", "surrogateescape"))


@reader("text", "layers.txt", lambda folder: [b"5", b"3-4", b"0,2,4-6"])
def layers(path: Path) -> None:
    parse_layers(path.read_text("utf-8", "surrogateescape").split(","), range(6))
