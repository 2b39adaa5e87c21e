"""Several real processes over mlx's ring on loopback, started by mlx.launch: the same as one process."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, at_every_layer

import mlx_densesteer as ds
from mlx_densesteer.cli import main
from mlx_densesteer.distributed.loading import check_pipeline, check_tensor, check_way
from mlx_densesteer.distributed.ranks import Ranks, launched_rank
from mlx_densesteer.errors import DistributedError
from mlx_densesteer.model.families import empty_network

QUESTION = "Rosa has 3 boxes with 8 shells in each. Then Rosa sells 6. How many shells are left?"
DENSESTEER = (sys.executable, "-m", "mlx_densesteer")


def free_ports(count: int) -> int:
    """Return the first of ``count`` neighbouring free ports."""
    for first in range(20000 + os.getpid() % 10000, 40000, count):
        with socket.socket() as a, socket.socket() as b:
            try:
                a.bind(("127.0.0.1", first))
                b.bind(("127.0.0.1", first + count - 1))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports")


def launch(ranks: int, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    launcher = Path(sys.executable).with_name("mlx.launch")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    reader, writer = os.pipe()  # mlx.launch takes a whole core once its standard input has ended
    try:
        return subprocess.run(
            [launcher, "-n", str(ranks), "--backend", "ring", "-p", str(free_ports(ranks)), "--",
             *map(str, command)],
            stdin=reader, capture_output=True, text=True, timeout=120, cwd=cwd,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    finally:
        os.close(reader)
        os.close(writer)


def warned(done: subprocess.CompletedProcess) -> bool:
    """mlx.launch ends with 0 whatever its ranks did; it warns of those that failed."""
    return "exited with code" in done.stderr or "was killed" in done.stderr


def answer(*options: object, ranks: int, model: object, prompt: str = QUESTION) -> dict:
    done = launch(ranks, *DENSESTEER, "generate", "-m", model, "--json", *options, prompt)
    assert not warned(done) and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout) | {"told": done.stderr}  # one object: one rank speaks


@pytest.fixture(scope="module")
def vector():
    return ds.SteeringVector.load("demo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strength", "positions", "split"),
    [(2, "-40%", "all", "rank 0: 3-5; rank 1: 0-2"),
     (3, "4", "generated", "rank 0: 4-5; rank 1: 2-3; rank 2: 0-1")],
)  # fmt: skip
def test_a_pipeline_writes_what_one_process_does(
    demo_model, vector, ranks, strength, positions, split, tmp_path
):
    """Steered layers on every rank; the norms for the dose are those of all ranks' layers."""
    unmeasured = ds.SteeringVector(vector.layers, replace(vector.meta, residual_norms=None))
    unmeasured.save(tmp_path / "v.npz")
    found = answer(
        "-v", tmp_path / "v.npz", "-l", "1,3,5", f"--strength={strength}", "--positions", positions,
        "-n", 40, "--pipeline", ranks=ranks, model="demo",
    )  # fmt: skip
    steering = ds.resolve(demo_model, unmeasured, strength, [1, 3, 5], positions)
    expected, stock = (
        ds.generate(demo_model, QUESTION, steering=one, max_tokens=40, brake=ds.Brake())
        for one in (steering, None)
    )
    assert found["text"] == expected.text != stock.text
    assert found["tokens"] == expected.tokens and split in found["told"]
    assert found["steering"]["strength"] == pytest.approx(steering.strength, rel=1e-4)
    assert found["steering"]["dose"] == pytest.approx(demo_model.dose(steering), rel=1e-4)


@pytest.mark.slow
def test_tensor_parallel_writes_what_one_process_does(hf_folder, make_vector, tmp_path):
    vector = make_vector()
    vector.save(tmp_path / "v.npz")
    model = ds.load(hf_folder)
    found = answer(
        "-v", tmp_path / "v.npz", "-l", "all", "-s", 0.5, "-n", 12, "--no-brake",
        ranks=2, model=hf_folder, prompt="hello",
    )  # fmt: skip
    steering = at_every_layer(vector, 0.5)
    expected = ds.generate(model, "hello", steering=steering, max_tokens=12)
    assert found["text"] == expected.text and "tensor-parallel on 2 ranks" in found["told"]
    assert found["steering"]["dose"] == pytest.approx(model.dose(steering), rel=1e-3)


def compare(tmp_path, vector, models, known=()):
    """Print and return the largest difference of each ``(kind, folder)`` from one process."""
    vector.save(tmp_path / "v.npz")
    script, out = Path(__file__).with_name("logits_of_ranks.py"), tmp_path / "out.npz"
    specs = [f"{kind}={folder}" for kind, folder in models]
    done = launch(2, sys.executable, script, tmp_path / "v.npz", out, *specs)
    assert not warned(done), done.stderr
    differences = []
    with np.load(out) as found:
        for number, (kind, folder) in enumerate(models):
            model = dict(known).get(folder) or ds.load(folder)
            cache = ds.make_cache(model, at_every_layer(vector, 1.5))
            expected = np.array(model.network(mx.array([list(range(3, 16))]), cache)[0])
            differences.append(float(np.abs(found[f"arr_{number}"] - expected).max()))
            norms = list(model.measured_norms.values())
            assert found["norms"][number].tolist() == pytest.approx(norms, rel=1e-3)
            print(
                f"\n{kind}, {folder.name}: largest difference {differences[-1]:.1e} at logits up to "
                f"{np.abs(expected).max():.1f}"
            )
    return differences


@pytest.mark.slow
def test_logits_and_norms_are_those_of_one_process(hf_folder, make_vector, tmp_path):
    """In float32, and quantised: the ranks add in another order, and that is all."""
    folders = [
        ds.convert(hf_folder, tmp_path / f"{bits} bits", bits=bits, group_size=32, dtype="float32")
        for bits in (None, 4)
    ]
    models = [(kind, folder) for kind in ("tensor", "pipeline") for folder in folders]
    assert max(compare(tmp_path, make_vector(), models)) < 1e-4


def test_a_family_that_mlx_lm_does_not_cut():
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2,
        "rope_theta": 1e4, "max_position_embeddings": 64,
    }  # fmt: skip
    llama, gemma = (
        empty_network(sizes | {"model_type": kind}, kind) for kind in ("llama", "gemma3_text")
    )
    check_way(llama, "x", pipeline=False)
    with pytest.raises(
        DistributedError, match="x: mlx-lm cannot cut a llama model into a pipeline"
    ):
        check_way(llama, "x", pipeline=True)
    with pytest.raises(DistributedError, match="cannot cut a gemma3_text model into slices"):
        check_way(gemma, "x", pipeline=False)


def test_what_cannot_be_cut_is_said():
    class Three(Ranks):
        def __init__(self):
            super().__init__()
            self.size = 3

    config = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896,
              "intermediate_size": 4864, "num_hidden_layers": 2}  # fmt: skip
    with pytest.raises(
        DistributedError, match="14 attention heads, 2 key and value heads, 4864 MLP"
    ):
        check_tensor(config, Three())
    with pytest.raises(DistributedError, match="2 blocks are too few for 3 ranks"):
        check_pipeline(config, Three())
    even = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192,
            "intermediate_size": 768, "quantization": {"group_size": 64, "bits": 4}}  # fmt: skip
    check_tensor(even, Three())
    with pytest.raises(DistributedError, match="1 groups of the attention"):
        check_tensor(even | {"hidden_size": 64}, Three())


EVAL = ("eval", "-m", "demo", "demo", "--limit", 5, "-n", 32, "-v", "demo", "-s", "20%", "--json")


def figures(text: str) -> dict:
    document = json.loads(text)
    for score in document["scores"].values():
        score.pop("seconds")
    return document


def same(found: object, expected: object) -> bool:
    """Equal but for the last bits of float32, which on some machines differ between processes."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    return found == (pytest.approx(expected, rel=1e-4) if type(expected) is float else expected)


def answers(path: Path) -> list[tuple]:
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return sorted((r["problem"], r["steering"], r["text"]) for r in records if "text" in r)


@pytest.mark.slow
def test_an_evaluation_is_split(tmp_path):
    """The same figures and the same file as of one process."""
    alone = CliRunner().invoke(main, [*map(str, EVAL), "-o", str(tmp_path / "a.jsonl")])
    assert alone.exit_code == 0, alone.output
    done = launch(2, *DENSESTEER, *EVAL, "-o", tmp_path / "b.jsonl")
    assert not warned(done), done.stderr
    split = figures(done.stdout)
    assert (
        same(split["scores"], figures(alone.stdout)["scores"])
        and "split over 2 ranks" in done.stderr
    )
    assert answers(tmp_path / "b.jsonl") == answers(tmp_path / "a.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.slow
def test_a_sweep_is_split(tmp_path):
    sweep = ("sweep", "-m", "demo", "demo", "--limit", 2, "-n", 16, "-v", "demo", "-l", "4,5",
             "--strengths=10%,20%", "--json", "--no-nll", "-o")  # fmt: skip
    alone = CliRunner().invoke(main, [*map(str, sweep), str(tmp_path / "a")])
    assert alone.exit_code == 0, alone.output
    done = launch(2, *DENSESTEER, *sweep, tmp_path / "b")
    assert not warned(done), done.stderr
    renamed = alone.stdout.replace(str(tmp_path / "a"), str(tmp_path / "b"))  # in the next command
    assert json.loads(done.stdout) == json.loads(renamed)
    assert json.loads((tmp_path / "b/table.json").read_text()) == json.loads(done.stdout)
    assert not list((tmp_path / "b").glob("*.rank*"))


LOST = """
import os, sys
from mlx_densesteer.cli import main
from mlx_densesteer.generation.stream import Stream
pieces, real = [], Stream.__next__
def next_piece(self):
    pieces.append(real(self))
    if len(pieces) == 3 and os.environ["MLX_RANK"] == sys.argv[1]:
        os.kill(os.getpid(), 9)
    return pieces[-1]
Stream.__next__ = next_piece
main(["generate", "-m", "demo", "--pipeline", sys.argv[2]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_lost_ends_the_others(rank):
    """It dies in the middle of an answer: no rank waits for ever, and the launcher names it."""
    done = launch(2, sys.executable, "-c", LOST, rank, QUESTION)
    assert f"rank {rank} exited with code -9" in done.stderr
    assert f"rank {1 - rank} exited with code" in done.stderr or "killed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sampling_and_the_brake_on_two_ranks(demo_model, vector):
    """Both ranks go on with rank 0's tokens; a brake reads the kept beginning again on both."""
    found = answer("--temp", 0.8, "--seed", 7, "-n", 30, "--pipeline", ranks=2, model="demo")
    expected = ds.generate(demo_model, QUESTION, max_tokens=30, sampling=ds.Sampling(0.8, seed=7))
    assert found["text"] == expected.text
    over = ds.Steering(vector, 30.0, layers=(5,))
    braked = answer("-v", "demo", "-l", 5, "-s", 30, "-n", 120, "--pipeline", ranks=2, model="demo")
    expected = ds.generate(demo_model, QUESTION, steering=over, max_tokens=120, brake=ds.Brake())
    assert braked["brakes"] and braked["text"] == expected.text


@pytest.mark.slow
def test_ranks_that_differ_are_told(tmp_path):
    """Other problems on one rank: nothing is answered, on any."""
    for rank in (0, 1):
        (tmp_path / f"{rank}.jsonl").write_text(
            json.dumps({"question": f"{rank} and 1?", "answer": "#### 2"}) + "\n"
        )
    script = f'exec {" ".join(DENSESTEER)} eval -m demo "$MLX_RANK.jsonl" -o out.jsonl'
    done = launch(2, "sh", "-c", script, cwd=tmp_path)
    assert warned(done) and "the ranks have different problems" in done.stderr
    assert "Traceback" not in done.stderr


def test_refusals(monkeypatch):
    """What cannot run on several ranks says so at once, on a rank or off it."""
    run = CliRunner().invoke
    found = run(main, ["generate", "-m", "demo", "--pipeline", "hello"])
    assert found.exit_code == 2 and "mlx.launch -n 2" in found.output
    monkeypatch.setenv("MLX_RANK", "0")
    for command in ("chat", "serve", "bake", "doctor"):
        found = run(main, [command, "-m", "demo"])
        assert found.exit_code == 2 and "runs on one machine" in found.output, command
    found = run(main, ["generate", "-m", "demo"], input="hello")
    assert found.exit_code == 2 and "the prompt is an argument" in found.output
    found = run(main, ["generate", "-m", "demo", "--draft-model", "demo", "hello"])
    assert found.exit_code == 2 and "does not go with mlx.launch" in found.output


def test_one_rank_is_a_process_alone(tmp_path, monkeypatch):
    """mlx.launch -n 1 gives an empty host file, which mlx itself cannot read."""
    (tmp_path / "hosts").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert launched_rank() is None and Ranks.connect().size == 1
    assert Ranks().gather({"a": 1}) == [{"a": 1}] and Ranks().mine([1, 2, 3]) == [1, 2, 3]


@pytest.mark.checkpoint
def test_the_real_checkpoint_on_two_ranks(checkpoint, real_model, tmp_path):
    """Tensor-parallel; half of the heads and of the MLP on each."""
    rng = np.random.default_rng(0)
    vector = ds.SteeringVector(
        {k: rng.normal(size=896) for k in (4, 16)},
        ds.VectorMeta(model="random", hidden_size=896, layer_count=24),
    )
    known = [(checkpoint, real_model)]
    assert compare(tmp_path, vector, [("tensor", checkpoint)], known)[0] < 1e-3
