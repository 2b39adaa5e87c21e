import hashlib
import io
import json
import pickle
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED, VALUES, opcodes, pt_file, run_with_torch

from mlx_densesteer.errors import VectorFormatError
from mlx_densesteer.steering.formats import import_vector
from mlx_densesteer.steering.vector import SteeringVector

VECTORS = SHARED / "vectors"
# What torch 2.13 loads, by scripts/make-pt-fixture: file sha256, and sha256 of every layer.
TORCH = json.loads((Path(__file__).parents[1] / "fixtures" / "pt-vectors.json").read_text())


def reference(name: str) -> Path:
    if not (VECTORS / name).is_file():
        pytest.skip(f"the authors' vector files are not in {VECTORS}; none is in the project")
    return VECTORS / name


@pytest.mark.parametrize("name", sorted(TORCH))
def test_reference_vectors_equal_what_torch_loads(name, tmp_path):
    path = reference(name)
    expected = TORCH[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["file_sha256"]
    vector = import_vector(path, model="Qwen/Qwen2.5")
    loaded = SteeringVector.load(vector.save(tmp_path / "v.npz"))
    found = {str(k): hashlib.sha256(a.tobytes()).hexdigest() for k, a in loaded.layers.items()}
    assert found == expected["layers_float32_sha256"]
    assert loaded.meta.hidden_size == expected["hidden_size"]
    assert loaded.meta.layer_count == len(found)
    assert expected["file_sha256"] in loaded.meta.source


@pytest.mark.parametrize("name", sorted(TORCH))
def test_reference_vectors_equal_torch_itself(name):
    """Where torch is installed; elsewhere the fixture above takes its place."""
    torch = pytest.importorskip(
        "torch", reason="torch is not installed; the fixture takes its place"
    )
    modules = pytest.importorskip("steering_vectors")
    with torch.serialization.safe_globals([modules.SteeringVector]):
        theirs = torch.load(reference(name), weights_only=True).layer_activations
    ours = import_vector(reference(name), model="x").layers
    assert sorted(theirs) == sorted(ours)
    for layer, tensor in theirs.items():
        assert np.array_equal(ours[layer], tensor.float().numpy())


def test_the_hand_made_file_is_read(tmp_path):
    """Each refusal below changes one thing of this file."""
    path = pt_file(tmp_path / "v.pt", opcodes(), {"0": VALUES.tobytes()})
    vector = import_vector(path, model="Qwen/Qwen2.5-1.5B-Instruct")
    assert np.array_equal(vector.layers[0], VALUES.astype(np.float32))
    assert vector.meta.model == "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("posix.system", 0), ("posix.system", 2), ("posix.system", 4), ("builtins.eval", 4)],
)
def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path, name, protocol):
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self):
            import builtins
            import os

            if name == "builtins.eval":
                return builtins.eval, (f"open({str(witness)!r}, 'w').close()",)
            return os.system, (f"touch {witness}",)

    path = pt_file(tmp_path / "evil.pt", pickle.dumps(Hostile(), protocol=protocol))
    expected = name.replace("builtins", "__builtin__") if protocol < 3 else name
    with pytest.raises(
        VectorFormatError, match=f"refused, its pickle asks for the global {expected}"
    ):
        import_vector(path, model="x")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls": b"cos\nsystem\n"}, "the global os.system"),
        ({"cls": b"csteering_vectors.steering_vector\nSteeringVector.__init__\n"}, "the global"),
        ({"cls": b"ccollections\nOrderedDict\n"}, "holds no vectors by layer"),
        (
            {"rebuild": b"ctorch._utils\n_rebuild_tensor\n"},
            "the global torch._utils._rebuild_tensor",
        ),
        (
            {"storage": b"ctorch\nLongStorage\n"},
            "holds a tensor of 'LongStorage'; expected float16",
        ),
        ({"storage": b"ctorch\nUntypedStorage.x\n"}, "the global torch.UntypedStorage.x"),
        ({"storage": b"ccollections\nOrderedDict\n"}, "the persistent id"),
        ({"count": 9}, "a storage '0' of 9 values that is not in the file"),
        ({"size": 9}, r"a tensor of size \(9,\) and stride \(1,\) at 0 in a storage of 8"),
        ({"size": -1}, r"a tensor of size \(-1,\)"),
        ({"offset": 4}, "at 4 in a storage of 8"),
        ({"offset": -4}, "at -4 in a storage of 8"),
        ({"stride": 0}, r"and stride \(0,\) at 0"),
        ({"stride": -1}, r"and stride \(-1,\) at 0"),
        ({"size": 5, "stride": 2}, r"stride \(2,\) at 0 in a storage of 8"),
        ({"size": 2**31 - 1, "stride": 2**31 - 1}, "in a storage of 8"),
        (
            {"size": (2, 4), "stride": (4, 1)},
            "layer 0 is not one vector",
        ),
        ({"size": (1, 8), "stride": 1}, r"a tensor of size \(1, 8\) and stride \(1,\)"),
        ({"size": (), "stride": ()}, "expected one vector"),
        ({"layer": -1}, "would be layer -1"),
        ({"layer": b"direction"}, "layer .direction. is not one vector"),
        ({"layer_type": b"self_attn"}, "layer type 'self_attn', expected 'decoder_block'"),
    ],
)
def test_whatever_is_not_such_a_vector_is_refused(tmp_path, changes, message):
    path = pt_file(tmp_path / "v.pt", opcodes(**changes), {"0": VALUES.tobytes()})
    with pytest.raises(VectorFormatError, match=message):
        import_vector(path, model="x")


@pytest.mark.parametrize("values", [VALUES, VALUES.astype("<f4") / 3, VALUES.astype("<f8") / 3])
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"size": (1, 8), "stride": (8, 1)}, {"size": (8, 1), "stride": (1, 1)}, {"size": 1},
        {"size": 4, "stride": 2, "offset": 1}, {"size": (1, 1, 3), "stride": (5, 7, 3)},
        {"size": (1,), "stride": (9,), "offset": 7},
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", [None, 0, b"0", b"layer_0", b"model.layers.0"])
def test_float_tensors_of_any_layout_are_read(tmp_path, values, shape, layer):
    kind = {2: b"Half", 4: b"Float", 8: b"Double"}[values.dtype.itemsize]
    body = opcodes(storage=b"ctorch\n" + kind + b"Storage\n", layer=layer, **shape)
    path = pt_file(tmp_path / "v.pt", body, {"0": values.tobytes()})
    vector = import_vector(path, model="x")
    size, stride = (
        np.ravel(shape.get(key, default)) for key, default in (("size", 8), ("stride", 1))
    )
    at = shape.get("offset", 0) + np.arange(size.max()) * stride[size.argmax()]
    assert list(vector.layers) == [0]
    assert np.array_equal(vector.layers[0], values[at].astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    values = np.array([1.5, -0.0, 3e38, 1e-40, -2.0, 0.5, 7.0, 8.0], "<f4")
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    body = opcodes(storage=b"ctorch\nBFloat16Storage\n")
    vector = import_vector(pt_file(tmp_path / "v.pt", body, {"0": halves.tobytes()}), model="x")
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    assert vector.layers[0].tobytes() == expected.tobytes()


def test_layers_that_share_their_bytes_do_not_fill_the_memory(tmp_path):
    """100 layers of 1 MiB each are one storage: the file has 1 MiB, as float32 they were 200."""
    one = opcodes(layer=1, count=2**20, size=2**20)
    tensor = one[one.index(b"ctorch._utils") : -2]
    items = b"".join(b"J" + n.to_bytes(4, "little") + tensor + b"s" for n in range(100))
    path = pt_file(tmp_path / "v.pt", b"\x80\x02}" + items + b".", {"0": bytes(2**21)})
    with pytest.raises(VectorFormatError, match="its layers have 419,430,400 bytes as float32"):
        import_vector(path, model="x")


TORCH_FILES = """
import sys, torch
v, base, folder = torch.arange(8) / 3, torch.randn(4, 16), sys.argv[1]
cases = {
    "float32": v, "float16": v.half(), "bfloat16": v.bfloat16(), "float64": v.double(),
    "row": v[None], "column": v[:, None], "strided": base[1, ::2], "transposed": base.T.contiguous().T[2],
    "parameter": torch.nn.Parameter(v), "gradient": v.clone().requires_grad_(),
}
for name, tensor in cases.items():
    for protocol in (2, 3, 4, 5):
        torch.save({3: tensor, "layer_1": tensor}, f"{folder}/{name}{protocol}.pt", pickle_protocol=protocol)
    print(name, tensor.detach().float().flatten().tolist())
torch.save(torch.nn.ParameterDict({"3": v, "1": v}).state_dict(), f"{folder}/state2.pt")
print("state", v.tolist())
torch.save({3: v, 1: v}, f"{folder}/older.pt", _use_new_zipfile_serialization=False)
"""


@pytest.mark.slow
def test_what_torch_itself_writes(tmp_path):
    done = run_with_torch("-c", TORCH_FILES, tmp_path)
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    expected = {name: json.loads(values) for name, _, values in lines}
    assert len(expected) == 11
    for path in sorted(tmp_path.glob("*[2-5].pt")):
        vector = import_vector(path, model="x")
        assert list(vector.layers) == [1, 3], path
        for array in vector.layers.values():
            assert np.array_equal(array, np.array(expected[path.stem[:-1]], np.float32)), path
    with pytest.raises(VectorFormatError, match="format from before 1.6"):
        import_vector(tmp_path / "older.pt", model="x")


BARE = """
import sys, torch
out = sys.argv[1]
table = torch.arange(24, dtype=torch.float32).reshape(3, 8) / 7
torch.save(table[1].clone(), out + "/one.pt")
torch.save(table.bfloat16(), out + "/table.pt")
torch.save(table.T.contiguous().T, out + "/turned.pt")
torch.save(table[:, None, :], out + "/deep.pt")
torch.save(torch.nn.Parameter(table[1:2].clone()), out + "/parameter.pt")
torch.save(table.reshape(1, 3, 2, 4), out + "/cube.pt")
torch.save({1: table}, out + "/nested.pt")
torch.save(table[:1].expand(10**9, 8), out + "/bomb.pt")
"""


@pytest.mark.slow
def test_a_bare_tensor_needs_a_layer_and_a_direction(tmp_path):
    """As SEAL, ASC and ReBalance publish: nothing in the file says what it is."""
    run_with_torch("-c", BARE, tmp_path)
    row = np.arange(8, 16, dtype=np.float32) / 7
    for name, layer in (("one", 20), ("table", 1), ("turned", 1), ("deep", 1), ("parameter", 5)):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(VectorFormatError, match="without a layer and a sign"):
            import_vector(path, model="x")
        with pytest.raises(VectorFormatError, match="without a layer and a sign"):
            import_vector(path, model="x", layer=layer)
        found = import_vector(path, model="x", layer=layer, towards="dense")
        assert list(found.layers) == [layer]
        expected = (
            row if name != "table" else (row.view(np.uint32) + 0x7FFF >> 16 << 16).view(np.float32)
        )
        assert found.layers[layer] == pytest.approx(expected, rel=2**-8)
        assert name == "table" or np.array_equal(found.layers[layer], row)
        sparse = import_vector(path, model="x", layer=layer, towards="sparse")
        assert np.array_equal(sparse.layers[layer], -found.layers[layer])
    refused = {"cube": "expected one vector", "bomb": "refused, its pickle asks for a tensor"}
    for name, message in refused.items():
        with pytest.raises(VectorFormatError, match=message):
            import_vector(tmp_path / f"{name}.pt", model="x", layer=1, towards="dense")
    with pytest.raises(VectorFormatError, match="layer 1 is not one vector"):
        import_vector(tmp_path / "nested.pt", model="x")
    with pytest.raises(VectorFormatError, match="no row for layer 3"):
        import_vector(tmp_path / "table.pt", model="x", layer=3, towards="dense")


def test_a_file_with_layers_takes_none(tmp_path):
    path = pt_file(tmp_path / "v.pt", opcodes(), {"0": VALUES.tobytes()})
    with pytest.raises(VectorFormatError, match="names its layers"):
        import_vector(path, model="x", layer=1, towards="dense")
    with pytest.raises(VectorFormatError, match=r"of a \.pt file with a bare tensor only"):
        import_vector(tmp_path / "v.gguf", model="x", layer=1)


def test_infinity_is_refused(tmp_path):
    values = np.full(8, np.inf, dtype="<f2")
    path = pt_file(tmp_path / "v.pt", opcodes(), {"0": values.tobytes()})
    with pytest.raises(VectorFormatError, match="layer 0 holds NaN or infinity"):
        import_vector(path, model="x")


def test_nothing_of_a_pickle_outlives_it(tmp_path):
    """BUILD with a slot state sets attributes: once, and on stand-ins made for this file."""
    from mlx_densesteer.steering.formats import pt

    text = b"X\x03\x00\x00\x00xyz"
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n"):
        body = b"\x80\x02" + target + b"}}" + text + b"K\x05s\x86b."
        with pytest.raises(VectorFormatError):
            import_vector(pt_file(tmp_path / "v.pt", body), model="x")
        twice = b"\x80\x02" + target + (b"}}" + text + b"K\x05s\x86b") * 2 + b"."
        with pytest.raises(VectorFormatError, match="the operation BUILD"):
            import_vector(pt_file(tmp_path / "v.pt", twice), model="x")
    for stand_in in (*pt._GLOBALS.values(),):
        assert not hasattr(stand_in, "xyz")


def test_a_billion_laughs_are_not_spelled_out(tmp_path):
    body = (
        b"\x80\x02)"
        + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
        + b"Q."
    )
    with pytest.raises(VectorFormatError, match="a tuple in two places"):
        import_vector(pt_file(tmp_path / "v.pt", body), model="x")
    many = b"\x80\x04)" + b"\x94h\x00\x86" + b"Q."
    with pytest.raises(VectorFormatError, match="a tuple in two places"):
        import_vector(pt_file(tmp_path / "v.pt", many), model="x")


def test_a_large_pickle_is_not_unpickled(tmp_path):
    path = pt_file(tmp_path / "v.pt", b"\x80\x02" + b"}" * 2**21 + b".")
    with pytest.raises(VectorFormatError, match="bytes of objects"):
        import_vector(path, model="x")


def test_a_far_memo_slot_is_not_given_room(tmp_path):
    body = b"\x80\x02}r" + (2**32 - 1).to_bytes(4, "little") + b"."
    with pytest.raises(VectorFormatError, match="memo slot 4294967295"):
        import_vector(pt_file(tmp_path / "v.pt", body), model="x")


@pytest.mark.parametrize(
    "body", [b"", b"\x80\x02", b".", b"\x80\x02}b.", b"\x80\x02)R.", b"\x80\xff.", b"not a pickle"]
)
def test_a_damaged_pickle(tmp_path, body):
    with pytest.raises(VectorFormatError, match=r"damaged|holds no|refused"):
        import_vector(pt_file(tmp_path / "v.pt", body), model="x")


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_one_damaged_byte_is_a_vector_format_error_or_harmless(tmp_path):
    body = bytearray(opcodes())
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(body)):
        damaged = bytearray(body)
        damaged[at] = int(rng.integers(256))
        try:
            import_vector(
                pt_file(tmp_path / "v.pt", bytes(damaged), {"0": VALUES.tobytes()}), model="x"
            )
        except VectorFormatError:
            refused += 1
    assert refused > len(body) // 2


def test_files_of_other_kinds(tmp_path):
    legacy = tmp_path / "old.pt"
    legacy.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C))  # how torch.save began before 1.6
    with pytest.raises(VectorFormatError, match="format from before 1.6. Load it with torch, and"):
        import_vector(legacy, model="x")
    with pytest.raises(VectorFormatError, match="no data.pkl"):
        np.savez(tmp_path / "v.npz", a=np.zeros(1))
        (tmp_path / "v.npz").rename(tmp_path / "v.pt")
        import_vector(tmp_path / "v.pt", model="x")
    with pytest.raises(VectorFormatError, match="unknown ending '.bin', expected .pt"):
        import_vector(tmp_path / "v.bin", model="x")


def test_the_opcodes_are_those_of_torch():
    """The hand-made pickle differs from a real file only in values and memo slots."""
    with zipfile.ZipFile(reference("dense-rewritten/Qwen2.5-1.5B-Instruct.pt")) as archive:
        real = archive.read("steering_vector/data.pkl")
    kinds = {op.name for op, *_ in pickletools.genops(io.BytesIO(real))}
    ours = {op.name for op, *_ in pickletools.genops(io.BytesIO(opcodes()))}
    assert ours - {"BININT", "SETITEM"} <= kinds
