"""Vectors in llama.cpp's format and as safetensors, read here and by a real llama.cpp."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import mlx_densesteer as ds
from mlx_densesteer import demo
from mlx_densesteer.cli import main
from mlx_densesteer.errors import DiskError, VectorFormatError
from mlx_densesteer.steering.formats import export_vector, import_vector

gguf = pytest.importorskip("gguf")  # of the extra dev, so it is there in CI


@pytest.mark.parametrize("ending", ["gguf", "pt", "safetensors"])
def test_a_file_that_cannot_be_one_is_named(tmp_path, ending):
    path = tmp_path / f"v.{ending}"
    with pytest.raises(VectorFormatError, match=r"no such file\. Make one"):
        import_vector(path, model="x")
    path.mkdir()
    with pytest.raises(VectorFormatError, match="is a folder; expected a"):
        import_vector(path, model="x")


@pytest.fixture
def vector(make_vector):
    """Every layer, and every field of the metadata that a file can lose."""
    made = make_vector(size=3.0)
    meta = replace(
        made.meta, model="Qwen/Qwen2.5-1.5B-Instruct", fingerprint="0123456789abcdef", method="mean difference",
        token="-1 of the response", pair_count=50, pairs_sha256="ab" * 32, quantization="none",
        tested=({"layers": [2], "strength": 0.1, "accuracy": 0.5},), residual_norms={"0": 1.5, "3": 1e-9},
        recommended={"layers": [2], "strength": 0.25}, extra={"note": "Grüße, 日本"},
    )  # fmt: skip
    return ds.SteeringVector(made.layers, meta)


@pytest.mark.parametrize("name", ["v.gguf", "v.safetensors"])
@pytest.mark.parametrize("offset", [0, 1, -1])
def test_the_way_out_and_back_loses_nothing(vector, tmp_path, name, offset):
    if name == "v.safetensors" and offset < 0:
        with pytest.raises(VectorFormatError, match="gives a layer below 0"):
            export_vector(vector, tmp_path / name, layer_offset=offset)
        return
    export_vector(vector, tmp_path / name, layer_offset=offset)
    back = import_vector(tmp_path / name)
    assert back.describe() == vector.describe()
    assert back.sha256() == vector.sha256()
    assert all(back.layers[k].tobytes() == a.tobytes() for k, a in vector.layers.items())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_llama_cpp_cannot_do_is_said(vector, tmp_path):
    told = " ".join(export_vector(vector, tmp_path / "v.gguf"))
    assert "layer 0 is kept" in told and "every layer of a file" in told and "position" in told
    told = " ".join(export_vector(vector.select([2]), tmp_path / "v.gguf"))
    assert "is kept" not in told and "every layer" not in told
    told = " ".join(export_vector(vector, tmp_path / "v.gguf", layer_offset=1))
    assert "layer 3 is beyond the last block" in told and "is kept" not in told
    with pytest.raises(VectorFormatError, match="steers no layer below 1"):
        export_vector(vector.select([0]), tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_a_file_of_another_program(tmp_path):
    """As repeng and llama.cpp's generator write it: directions and a hint alone."""
    directions = {k: np.full(8, k, np.float32) for k in (1, 2, 5)}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_uint32("controlvector.layer_count", 3)
    for k, array in directions.items():
        writer.add_tensor(f"direction.{k}", array.astype(np.float16) if k == 5 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VectorFormatError, match="does not say which model"):
        import_vector(tmp_path / "theirs.gguf")
    plain = import_vector(tmp_path / "theirs.gguf", model="Qwen/Qwen2.5-1.5B")
    assert sorted(plain.layers) == [1, 2, 5] and plain.layers[5][0] == 5
    assert plain.meta.layer_count == 6 and "sha256" in plain.meta.source
    shifted = import_vector(tmp_path / "theirs.gguf", model="Qwen/Qwen2.5-1.5B", layer_offset=1)
    assert sorted(shifted.layers) == [0, 1, 4] and shifted.layers[0][0] == 1
    with pytest.raises(VectorFormatError, match="would be layer -1"):
        import_vector(tmp_path / "theirs.gguf", model="x", layer_offset=2)


def test_safetensors_of_other_programs(tmp_path):
    file = tmp_path / "theirs.safetensors"
    save_file({"model.layer_3": np.ones(8, np.float16), "4": np.ones(8)}, file)
    assert sorted(import_vector(file, model="x/y").layers) == [3, 4]
    body = np.array([1.0, -2.5, 3.140625], np.float32).view(np.uint32) >> 16
    head = json.dumps({"layer.1": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + body.astype("<u2").tobytes())
    assert import_vector(file, model="x/y").layers[1].tolist() == [1.0, -2.5, 3.140625]
    for bad, message in (
        ({"layer_3": np.ones((2, 4), np.float32)}, "expected one float vector"),
        ({"layer_3": np.ones(4, np.int32)}, "expected one float vector"),
        ({"mean": np.ones(4, np.float32)}, "expected one float vector"),
        ({"layer_3": np.ones(4, np.float32), "layer.3": np.ones(4, np.float32)}, "there twice"),
        ({"layer_3": np.full(4, np.nan, np.float32)}, "NaN or infinity"),
        (
            {"layer_3": np.ones(4, np.float32), "layer_4": np.ones(5, np.float32)},
            "expected one width",
        ),
    ):
        save_file(bad, file)
        with pytest.raises(VectorFormatError, match=message):
            import_vector(file, model="x/y")


@pytest.mark.parametrize("name", ["v.gguf", "v.safetensors"])
def test_damage_anywhere_is_a_vector_format_error_or_harmless(vector, tmp_path, name):
    """Truncated and with bits changed: an error that names the file, or a vector."""
    file = tmp_path / name
    export_vector(vector.select([0, 1, 2]), file)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    cuts = [whole[:n] for n in [*range(0, 64, 3), *rng.integers(64, len(whole), 30)]]
    changed = []
    for _ in range(80):
        data = bytearray(whole)
        data[rng.integers(len(whole) // 2)] ^= 1 << int(rng.integers(8))
        changed.append(bytes(data))
    refused = 0
    for data in [*cuts, *changed]:
        file.write_bytes(data)
        try:
            import_vector(file, model="x/y")
        except VectorFormatError as error:
            refused += 1
            assert str(file) in str(error) or name in str(error)
    assert refused > len(cuts)


def field(name: bytes, kind: int, body: bytes) -> bytes:
    return len(name).to_bytes(8, "little") + name + kind.to_bytes(4, "little") + body


@pytest.mark.parametrize("of", [0, 4, 8, 9])
def test_a_file_that_claims_more_than_it_holds(tmp_path, of):
    """A hundred bytes that claim 2^40 numbers, texts or arrays: refused, at once and in no memory."""
    head = (
        b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (2).to_bytes(8, "little")
    )
    text = (13).to_bytes(8, "little") + b"controlvector"
    array = of.to_bytes(4, "little") + (2**40).to_bytes(8, "little")
    file = tmp_path / "endless.gguf"
    file.write_bytes(head + field(b"general.architecture", 8, text) + field(b"x", 9, array))
    with pytest.raises(VectorFormatError, match="not a complete GGUF file"):
        import_vector(file, model="x/y")


def test_a_layer_twice_and_a_number_too_large(vector, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "twice.gguf", "controlvector")
    for name in ("direction.1", "direction.01"):
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VectorFormatError, match="layer 1 is there twice"):
        import_vector(tmp_path / "twice.gguf", model="x/y")
    for name in ("v.gguf", "v.safetensors"):
        with pytest.raises(VectorFormatError, match="9999 at most"):
            export_vector(vector, tmp_path / name, layer_offset=9999)
        with pytest.raises(DiskError, match="there is no folder"):
            export_vector(vector, tmp_path / "nodir" / name)


@pytest.mark.parametrize("name", ["v.gguf", "v.safetensors"])
def test_a_model_that_is_named_counts_for_more_than_the_file(vector, tmp_path, name):
    export_vector(vector, tmp_path / name)
    assert import_vector(tmp_path / name, model=vector.meta.model).describe() == vector.describe()
    other = import_vector(tmp_path / name, model="Other/Model").meta
    assert (other.model, other.fingerprint) == ("Other/Model", None)


def test_the_command_line(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(main, ["vector", *map(str, arguments)])

    out = tmp_path / "dense.gguf"
    done = run("export", "demo", "-o", out, "-l", "4,5")
    assert (done.exit_code, done.stdout.strip()) == (0, str(out)), done.output
    assert f"--control-vector-scaled {out}:4.756 --control-vector-layer-range 5 5\n" in done.stderr
    for layers, offset, numbers in [("4,5", -1, "4 4"), ("3,4", 1, "5 5")]:
        shifted = ("--layer-offset", offset, "--force")
        done = run("export", "demo", "-o", out, "-l", layers, *shifted)
        assert f"--control-vector-layer-range {numbers}\n" in done.stderr
    for layers, offset in [("4,5", 1), ("5", 1)]:  # the default layer is not steered there
        shifted = ("--layer-offset", offset, "--force")
        done = run("export", "demo", "-o", tmp_path / "no.gguf", "-l", layers, *shifted)
        assert done.exit_code == 0 and "llama-cli" not in done.stderr, done.stderr
    assert run("export", "demo", "-o", out, "-l", "4,5", "--force").exit_code == 0
    assert run("export", "demo", "-o", out).exit_code == 1
    assert run("export", "demo", "-o", tmp_path / "dense.bin").exit_code == 1
    done = run("export", "demo", "-o", tmp_path / "dense.bin", "--to", "safetensors")
    assert done.exit_code == 0 and "layer.5" in load_file(tmp_path / "dense.bin")
    done = run("import", out, "-o", tmp_path / "back.npz")
    assert done.exit_code == 0, done.output
    back = ds.SteeringVector.load(tmp_path / "back.npz")
    assert back.sha256() == ds.SteeringVector.load(demo.VECTOR).select([4, 5]).sha256()
    assert "ends in .npz" in run("import", out, "-o", tmp_path / "back.gguf").output
    done = run("import", out, "-o", tmp_path / "x.npz", "-m", demo.NAME, "--layer-offset", 1)
    assert done.exit_code == 1 and "layer offset does not fit" in done.output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the layout of libstdc++ is Linux's")
@pytest.mark.parametrize("offset", [0, 1])
def test_llama_cpp_reads_the_file(vector, tmp_path, offset):
    from llama_cpp import read_control_vector

    export_vector(vector, tmp_path / "v.gguf", layer_offset=offset)
    found = read_control_vector(tmp_path / "v.gguf", strength=2.0)
    rows = {number: found[number - 1] for number in range(1, len(found) + 1)}
    assert sorted(rows) == [k + offset for k in range(4) if k + offset > 0]
    for number, row in rows.items():
        assert np.array_equal(row, 2 * vector.layers[number - offset])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the layout of libstdc++ is Linux's")
def test_llama_cpp_refuses_direction_0(tmp_path):
    """Why layer 0 is not written as a direction."""
    from llama_cpp import read_control_vector

    for first in (1, 0):
        writer = gguf.GGUFWriter(tmp_path / f"{first}.gguf", "controlvector")
        writer.add_tensor(f"direction.{first}", np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert read_control_vector(tmp_path / "1.gguf").shape == (1, 8)
    assert read_control_vector(tmp_path / "0.gguf") is None


@pytest.mark.checkpoint
@pytest.mark.skipif(sys.platform != "linux", reason="the layout of libstdc++ is Linux's")
def test_it_moves_the_gguf_checkpoint_as_run_time_steering_moves_it_here(real_model, tmp_path):
    """Q4_K_M in llama.cpp, its dequantised weights here: compared is what the vector moves."""
    import mlx.core as mx
    from helpers import at_every_layer, checkpoint_cache
    from llama_cpp import LlamaCpp, read_control_vector

    from mlx_densesteer.export.closeness import reference

    model, tokenizer = real_model
    tokens = real_model.solutions()[0][0][:48]
    rng = np.random.default_rng(0)
    layers = {k: rng.normal(size=896) for k in (8, 16, 23)}
    meta = ds.VectorMeta(model="random", hidden_size=896, layer_count=24)
    random = ds.SteeringVector(layers, meta)
    steering = at_every_layer(random, 0.5)
    ours = reference(model, tokens, steering)
    export_vector(random, tmp_path / "v.gguf")
    (file,) = checkpoint_cache().glob("*-0.5B-*Q4_K_M.gguf")
    with LlamaCpp(file) as theirs:
        assert theirs.tokenize("It's 1234.\n\nOK") == tokenizer.encode("It's 1234.\n\nOK")
        plain = theirs.logits(tokens)
        theirs.steer(read_control_vector(tmp_path / "v.gguf", strength=0.5))
        steered = theirs.logits(tokens)
        export_vector(random.select([8, 16]), tmp_path / "off.gguf", layer_offset=1)
        theirs.steer(read_control_vector(tmp_path / "off.gguf", strength=0.5))
        shifted = theirs.logits(tokens)
        theirs.steer(None)
        assert np.array_equal(theirs.logits(tokens), plain)
    moved = (steered - plain).ravel()
    expected = np.array((ours.steered - ours.unsteered).astype(mx.float32)).ravel()
    apart = float(np.linalg.norm(moved - expected) / np.linalg.norm(expected))
    floor = float(
        np.linalg.norm(plain - np.array(ours.unsteered)) / np.linalg.norm(np.array(ours.unsteered))
    )
    slope = float(moved @ expected / (expected @ expected))
    cosine = slope * float(np.linalg.norm(expected) / np.linalg.norm(moved))
    print(
        f"\nmoved by llama.cpp against here: cosine {cosine:.4f}, slope {slope:.4f}, relative distance "
        f"{apart:.3f}; unsteered logits are {floor:.3f} apart"
    )
    assert cosine > 0.99 and abs(slope - 1) < 0.05
    astray = (shifted - plain).ravel()  # a layer further on is another steering
    assert float(astray @ expected / np.linalg.norm(astray) / np.linalg.norm(expected)) < 0.97
