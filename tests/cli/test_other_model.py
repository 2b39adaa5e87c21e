"""A vector that was made for another model, of the same size: every door warns, and refuses with --strict."""

import json
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_densesteer import SteeringVector, VectorMeta, load
from mlx_densesteer.cli import main
from mlx_densesteer.errors import VectorMismatchError
from mlx_densesteer.steering.request import resolve

WARNING = "seems to be made for another model (Org/Other, 4 layers; this model is Tiny-Qwen2"


def vector_of(model, layers=4, fingerprint=None):
    meta = VectorMeta(model=model, hidden_size=64, layer_count=layers, fingerprint=fingerprint)
    return SteeringVector({1: np.ones(64)}, meta)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder, now the current one, with ``other.npz`` and problems; each command's arguments."""
    monkeypatch.chdir(tmp_path)
    vector_of("Org/Other").save(tmp_path / "other.npz")
    record = {"question": "1 + 1?", "answer": "#### 2"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


COMMANDS = {
    "generate": ["-n", "1", "Hi"],
    "chat": ["-n", "1"],
    "eval": ["-n", "1", "--no-nll", "p.jsonl"],
    "sweep": ["-n", "1", "--no-nll", "--strengths=1", "p.jsonl"],
    "bake": ["-s", "1", "-o", "baked"],
    "export-function": ["-s", "1", "-o", "f.mlxfn", "--capacity", "32"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_warns_or_refuses(files, hf_folder, command):
    arguments = [command, "-m", str(hf_folder), "-v", "other.npz", *COMMANDS[command]]
    before = sorted(files.iterdir())
    refused = CliRunner().invoke(main, [*arguments, "--strict"], input="")
    assert (
        refused.exit_code == 1
        and WARNING in refused.stderr
        and "leave strict out" in refused.stderr
    )
    assert sorted(files.iterdir()) == before, "nothing was made"
    warned = CliRunner().invoke(main, arguments, input="")
    assert warned.exit_code == 0 and f"warning: other.npz {WARNING}" in warned.stderr


def test_another_fingerprint_is_refused_too(files, hf_folder):
    vector_of("Tiny-Qwen2", fingerprint="0" * 16).save(files / "v.npz")
    arguments = ["generate", "-m", str(hf_folder), "-v", "v.npz", "-n", "1", "Hi"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    refused = CliRunner().invoke(main, [*arguments, "--strict"])
    assert refused.exit_code == 1 and "was extracted from other weights" in refused.stderr


@pytest.mark.parametrize("strict", [False, True])
def test_the_chat_looks_at_later_vectors_too(files, hf_folder, strict):
    lines = "/vector other.npz\n/vector off\n"
    options = ["--strict"] if strict else []
    done = CliRunner().invoke(main, ["chat", "-m", str(hf_folder), *options], input=lines)
    assert done.exit_code == strict and ("vector other.npz, layer" in done.stderr) != strict
    assert f"{'error' if strict else 'warning'}: other.npz {WARNING}" in done.stderr


def test_a_session_with_such_a_vector(files, hf_folder):
    from mlx_densesteer import Session, resolve

    model = load(hf_folder)
    Session(model, resolve(model, vector_of("Org/Other"), 1.0)).save(files / "s.json")
    for arguments, lines in ((["--load", "s.json"], ""), ([], "/load s.json\n")):
        chat = ["chat", "-m", str(hf_folder), *arguments]
        assert WARNING in CliRunner().invoke(main, chat, input=lines).stderr
        refused = CliRunner().invoke(main, [*chat, "--strict"], input=lines)
        assert refused.exit_code == 1 and WARNING in refused.stderr


@pytest.mark.parametrize(
    ("named", "model", "alike"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", True),
        ("Qwen/Qwen2.5-1.5B-Instruct", "mlx-community/Qwen2.5-1.5B-Instruct-4bit", True),
        ("qwen2.5-1.5b-instruct-q4_k_m.gguf", "Qwen2.5-1.5B-Instruct", True),
        ("/models/Qwen2.5-1.5B-Instruct-bf16/", "Qwen2.5-1.5B-Instruct-MLX-8bit", True),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", False),
        ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-1.5B", False),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "Qwen2.5-1.5B", False),
        ("", "Qwen2.5-1.5B", False),
    ],
)
def test_names_are_compared_without_organisation_and_precision(hf_folder, named, model, alike):
    loaded = load(hf_folder)
    loaded.name = model
    assert (loaded.other_weights(vector_of(named), strict=False) is None) == alike
    assert loaded.other_weights(vector_of(named, layers=5)) is not None, "another layer count"
    ours = vector_of("anything", fingerprint=loaded.fingerprint)
    assert loaded.other_weights(ours, strict=True) is None, "the weights are what counts"
    with pytest.raises(VectorMismatchError, match=r"Use a vector .*strict"):
        loaded.other_weights(vector_of(named, fingerprint="0" * 16), strict=True)


def test_an_imported_layer_does_not_tell_how_many_the_model_has(hf_folder):
    model = load(str(hf_folder))
    vector = vector_of("Org/Tiny-Qwen2", layers=2)
    assert "2 layers" in model.other_weights(vector)
    meta = replace(vector.meta, source="v.pt (a file of torch, sha256 ...)")
    assert model.other_weights(SteeringVector(vector.layers, meta)) is None


def test_python_warns_or_refuses_too(hf_folder):
    model, vector = load(str(hf_folder)), vector_of("Org/Other")
    with pytest.warns(UserWarning, match=re.escape(WARNING)):
        resolve(model, vector, 1.0)
    with pytest.raises(VectorMismatchError, match=re.escape(WARNING)):
        resolve(model, vector, 1.0, strict=True)


def test_a_name_of_a_mebibyte_costs_and_says_little(hf_folder):
    warning = load(hf_folder).other_weights(vector_of("_q1" * 2**18 + "!"))
    assert "another model (_q1_q1" in warning and len(warning) < 400


@pytest.mark.slow
def test_the_server_tells_it_at_start_and_in_its_log(tmp_path, hf_folder):
    pytest.importorskip("starlette")
    from server_process import ServerProcess

    vector_of("Org/Other").save(tmp_path / "other.npz")
    folder = tmp_path / "folder"
    folder.mkdir()
    vector_of("Org/Other").save(folder / "first.npz")
    options = ["-m", str(hf_folder), "--port", "0", "-v", str(tmp_path / "other.npz")]
    server = ServerProcess([*options, "--vectors", str(folder)], {})
    try:
        url = server.await_url()
        vector_of("Org/Other").save(folder / "later.npz")
        import urllib.request

        listed = json.load(urllib.request.urlopen(f"{url}/v1/steering", timeout=60))["vectors"]
        assert [one["name"] for one in listed] == ["other", "first", "later"]
        server.stop(signal.SIGTERM)
        for name in ("other", "first", "later"):
            assert (
                len(re.findall(f"warning: {name} seems to be made for another", server.said)) == 1
            )
    finally:
        server.process.kill()
    refused = ServerProcess([*options, "--strict"], {})
    assert refused.stop(0) == 1 and f"Error: other {WARNING}" in refused.said


def test_a_strict_server_does_not_use_such_files(tmp_path, hf_folder):
    pytest.importorskip("starlette")
    from serving import serving

    vector_of("Org/Other").save(tmp_path / "other.npz")
    vector_of("Tiny-Qwen2").save(tmp_path / "ours.npz")
    with serving(hf_folder, [], folder=tmp_path, strict=True) as server:
        assert [one["name"] for one in server.ask("/v1/steering")[2]["vectors"]] == ["ours"]
        status, message = server.refusal({"steering": {"vector": "other", "strength": 1}})
        assert status == 400 and WARNING in message and str(tmp_path) not in message


def test_lm_eval(tmp_path, hf_folder, caplog):
    pytest.importorskip("lm_eval")
    from mlx_densesteer.errors import InputError
    from mlx_densesteer.evaluation.harness import DenseSteerLM

    file = str(vector_of("Org/Other").save(tmp_path / "other.npz"))
    DenseSteerLM(str(hf_folder), vector=file, strength=1)
    assert WARNING in caplog.text
    with pytest.raises(VectorMismatchError, match="seems to be made for another"):
        DenseSteerLM(str(hf_folder), vector=file, strength=1, strict="true")
    with pytest.raises(InputError, match="strict 'maybe': expected true or false"):
        DenseSteerLM(str(hf_folder), vector=file, strength=1, strict="maybe")
