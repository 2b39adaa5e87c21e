import io
import json
import zipfile
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_densesteer import demo
from mlx_densesteer.errors import DiskError, VectorFormatError, VectorMismatchError
from mlx_densesteer.steering.vector import FORMAT_VERSION, SteeringVector, VectorMeta, format_layers

POINT = {"layers": [0], "positions": "all", "kl": 0.1, "strength": 2.0}
META = VectorMeta(
    model="Qwen/Tiny",
    hidden_size=8,
    layer_count=4,
    fingerprint="f" * 16,
    method="mean difference",
    token="-1 of the response",
    pair_count=50,
    pairs_sha256="a" * 64,
    chat_template_sha256="b" * 64,
    quantization="4-bit, group 64",
    tested=({"layers": [2], "strength": 1.5, "accuracy": 0.5},),
    extra={"later_key": [1, 2]},
)


@pytest.fixture
def vector():
    rng = np.random.default_rng(0)
    return SteeringVector({k: rng.normal(size=8).astype(np.float32) for k in (0, 2, 3)}, META)


@pytest.fixture
def file(vector, tmp_path):
    return vector.save(tmp_path / "v.npz")


def rewrite(file, change):
    """Rewrite the members of a zip file: ``change`` edits a dict of name -> bytes."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def edit_meta(file, **changes):
    def change(members):
        document = json.loads(np.load(io.BytesIO(members["meta.npy"])).tobytes())
        document.update(changes)
        data = json.dumps({k: v for k, v in document.items() if v != "DELETE"}).encode()
        members["meta.npy"] = npy(np.frombuffer(data, dtype=np.uint8))

    rewrite(file, change)


def test_round_trip_keeps_every_value(vector, file):
    loaded = SteeringVector.load(file)
    assert loaded.meta == META
    assert list(loaded.layers) == [0, 2, 3]
    for layer, array in vector.layers.items():
        assert loaded.layers[layer].dtype == np.float32
        assert np.array_equal(loaded.layers[layer], array)
    assert loaded.sha256() == vector.sha256()


@settings(max_examples=50, deadline=None)
@given(
    arrays=st.dictionaries(
        st.integers(0, 3),
        hnp.arrays(
            np.float32, 8, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        ),
        min_size=1,
    )
)
def test_any_finite_values_survive(arrays, tmp_path_factory):
    file = SteeringVector(arrays, META).save(tmp_path_factory.mktemp("v") / "v.npz")
    loaded = SteeringVector.load(file).layers
    assert {k: a.tobytes() for k, a in loaded.items()} == {
        k: a.tobytes() for k, a in arrays.items()
    }


def test_same_vector_gives_same_bytes(vector, file, tmp_path):
    assert vector.save(tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_numpy_and_mlx_read_the_file_without_us(vector, file):
    with np.load(file, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["layer.2"], vector.layers[2])
        assert json.loads(arrays["meta"].tobytes())["format_version"] == FORMAT_VERSION
    arrays = mx.load(str(file))
    assert arrays["layer.2"].dtype == mx.float32
    assert np.array_equal(np.array(arrays["layer.2"]), vector.layers[2])


def test_the_documented_bytes_are_the_bytes(tmp_path):
    """docs/vector-format.md, read by hand: no numpy, no code of ours."""
    file = SteeringVector({1: np.arange(8, dtype=np.float32)}, META).save(tmp_path / "v.npz")
    with zipfile.ZipFile(file) as archive:
        data = archive.read("layer.1.npy")
    assert data[:8] == b"\x93NUMPY\x01\x00"
    header_length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + header_length].decode("latin1")
    assert "'descr': '<f4'" in header and "'fortran_order': False" in header
    assert "'shape': (8,)" in header
    body = data[10 + header_length :]
    assert list(memoryview(body).cast("f")) == list(range(8))


def test_saving_where_there_is_no_folder(vector, tmp_path):
    with pytest.raises(DiskError, match="there is no folder .*nowhere. Make it first"):
        vector.save(tmp_path / "nowhere" / "v.npz")


def test_norms_of_huge_vectors_are_finite():
    vector = SteeringVector({0: np.full(8, 3e38)}, META)
    assert vector.norms()[0] == pytest.approx(3e38 * 8**0.5)


def test_saving_is_atomic_and_leaves_no_litter(vector, tmp_path, monkeypatch):
    file = vector.save(tmp_path / "v.npz")
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        vector.save(file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.npz"]


def test_arrays_cannot_be_changed_and_are_copies():
    mine = np.zeros(8, dtype=np.float32)
    vector = SteeringVector({0: mine}, META)
    mine[0] = 5
    assert vector.layers[0][0] == 0
    with pytest.raises(ValueError, match="read-only"):
        vector.layers[0][0] = 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "holds no layer"),
        ({0: np.zeros(9)}, r"layer 0 has shape \(9,\), expected \(8,\)"),
        ({0: np.zeros((1, 8))}, r"layer 0 has shape \(1, 8\)"),
        ({1: np.array([np.nan] * 8)}, "layer 1 holds NaN or infinity"),
        ({1: np.full(8, np.inf)}, "layer 1 holds NaN or infinity"),
        ({1: np.full(8, 1e39)}, "layer 1 holds NaN or infinity"),
        ({4: np.zeros(8)}, r"layer 4 is outside 0\.\.3"),
        ({-1: np.zeros(8)}, r"layer -1 is outside 0\.\.3"),
    ],
)
def test_bad_layers_are_refused(layers, message):
    with pytest.raises(VectorFormatError, match=message):
        SteeringVector(layers, META)


def test_every_problem_is_named_at_once():
    with pytest.raises(VectorFormatError, match=r"layer 0 .*; layer 1 .*; layer 7 is outside"):
        SteeringVector({0: np.zeros(9), 1: np.full(8, np.nan), 7: np.zeros(8)}, META)


def test_missing_layers_are_named_with_what_there_is(vector):
    with pytest.raises(VectorMismatchError, match="no vector for layer 1; it holds 0, 2-3"):
        vector.select([0, 1])
    assert list(vector.select([3, 0]).layers) == [0, 3]


def test_a_vector_of_another_width_is_refused_with_both_widths(vector):
    vector.check_fits(hidden_size=8, layer_count=4, model="Qwen2.5-1.5B")
    with pytest.raises(
        VectorMismatchError,
        match=r"layer 0 has width 8, but Qwen2.5-1.5B has hidden size 1536; it holds layer 3, but",
    ):
        vector.check_fits(hidden_size=1536, layer_count=3, model="Qwen2.5-1.5B")


class TestHostileFiles:
    def test_truncated(self, file):
        data = file.read_bytes()
        for length in (0, 10, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            with pytest.raises(VectorFormatError, match="truncated|not a complete zip"):
                SteeringVector.load(file)

    def test_one_flipped_bit(self, file):
        data = bytearray(file.read_bytes())
        at = data.index(b"\x93NUMPY") + 200
        data[at] ^= 1
        file.write_bytes(bytes(data))
        with pytest.raises(VectorFormatError, match="CRC"):
            SteeringVector.load(file)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_damage_is_an_error_of_ours_or_harmless(self, data, tmp_path_factory):
        rng = np.random.default_rng(0)
        good = SteeringVector({1: rng.normal(size=8).astype(np.float32)}, META)
        file = good.save(tmp_path_factory.mktemp("v") / "v.npz")
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(bytes(content))
        try:
            loaded = SteeringVector.load(file)
        except VectorFormatError:
            return
        assert loaded.sha256() == good.sha256()

    def test_any_flipped_bit(self, tmp_path):
        """Every second bit of a small file, one by one: an error of ours, or no difference."""
        good = SteeringVector({1: np.arange(8, dtype=np.float32)}, META)
        file = good.save(tmp_path / "v.npz")
        content = file.read_bytes()
        body = content.index(b"\x93NUMPY")
        for at in [*range(body + 200), *range(content.index(b"PK\x01\x02"), len(content))]:
            for bit in range(at % 2, 8, 2):
                damaged = bytearray(content)
                damaged[at] ^= 1 << bit
                file.write_bytes(damaged)
                try:
                    loaded = SteeringVector.load(file)
                except VectorFormatError:
                    continue
                assert loaded.sha256() == good.sha256()

    @pytest.mark.parametrize(
        "header",
        [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -8), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999999), }",
            "{'descr': '|V0', 'fortran_order': False, 'shape': (8,), }",
            "{'descr': ('<f4',), 'fortran_order': False, 'shape': (8,), }",
            "{'descr': 'f4,(', 'fortran_order': False, 'shape': (8,), }",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (8,), }",
            "{[1]: 2}",
            "(" * 100,
            "-" * 100 + "4",
            "__import__('os').system('true')",
        ],
    )
    def test_headers_that_no_writer_of_ours_makes(self, file, header):
        text = header.encode() + b"\n"
        member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(32)
        rewrite(file, lambda members: members.update({"layer.0.npy": member}))
        with pytest.raises(VectorFormatError, match="is not a .npy array of one dimension"):
            SteeringVector.load(file)

    def test_a_directory_that_lies_about_the_size_does_not_fill_the_memory(self, tmp_path):
        """The member unpacks to 300 MiB, but says 100 bytes: no more than those are unpacked."""
        import tracemalloc

        file = tmp_path / "liar.npz"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("meta.npy", bytes(300 * 2**20))
        content = file.read_bytes()
        true, lie = (300 * 2**20).to_bytes(4, "little"), (100).to_bytes(4, "little")
        assert content.count(true) == 2
        file.write_bytes(content.replace(true, lie))
        tracemalloc.start()
        with pytest.raises(VectorFormatError):
            SteeringVector.load(file)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compressions(self, tmp_path, method):
        file = tmp_path / "v.npz"
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("meta.npy", bytes(100))
        with pytest.raises(VectorFormatError, match="neither stored nor deflated"):
            SteeringVector.load(file)

    def test_what_is_no_file(self, tmp_path):
        with pytest.raises(VectorFormatError, match="is a folder; expected a vector's file"):
            SteeringVector.load(tmp_path)
        with pytest.raises(VectorFormatError, match="is not a regular file"):
            SteeringVector.load("/dev/zero")
        (tmp_path / "file").touch()
        for nowhere in ("nowhere.npz", "nowhere/v.npz", "file/v.npz"):
            with pytest.raises(VectorFormatError, match="no such file. Make one with"):
                SteeringVector.load(tmp_path / nowhere)
        with pytest.raises(VectorFormatError, match="cannot be read"):
            SteeringVector.load(tmp_path / ("long" * 1000))

    def test_a_number_of_a_million_digits(self, file):
        def change(members):
            document = np.load(io.BytesIO(members["meta.npy"])).tobytes()
            document = document.replace(b'"hidden_size": 8', b'"hidden_size": ' + b"9" * 6000)
            members["meta.npy"] = npy(np.frombuffer(document, dtype=np.uint8))

        rewrite(file, change)
        with pytest.raises(VectorFormatError, match="`meta`: is not"):
            SteeringVector.load(file)

    def test_zip_bomb_is_not_unpacked(self, tmp_path):
        file = tmp_path / "bomb.npz"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("layer.0.npy", bytes(200 * 2**20))
        assert file.stat().st_size < 2**20
        with pytest.raises(VectorFormatError, match=r"would unpack to 209,715,200 bytes.*zip bomb"):
            SteeringVector.load(file)

    def test_many_members(self, tmp_path):
        file = tmp_path / "many.npz"
        with zipfile.ZipFile(file, "w") as archive:
            for number in range(5000):
                archive.writestr(f"layer.{number}.npy", b"")
        with pytest.raises(VectorFormatError, match="5000 members"):
            SteeringVector.load(file)

    def test_a_header_that_claims_terabytes(self, file):
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
        header += b" " * (118 - len(header) - 1) + b"\n"
        lie = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(32)
        rewrite(file, lambda members: members.update({"layer.0.npy": lie}))
        with pytest.raises(VectorFormatError, match="is not a .npy array of one dimension"):
            SteeringVector.load(file)

    def test_a_pickle_inside_is_not_read(self, file):
        objects = npy(np.array([{"a": 1}], dtype=object))
        rewrite(file, lambda members: members.update({"layer.0.npy": objects}))
        with pytest.raises(VectorFormatError, match=r"is not a .npy array .*'\|O'"):
            SteeringVector.load(file)

    def test_the_same_name_twice(self, file):
        with (
            pytest.warns(UserWarning, match="Duplicate"),
            zipfile.ZipFile(file, "a") as archive,
        ):
            archive.writestr("layer.0.npy", npy(np.zeros(8, dtype=np.float32)))
        with pytest.raises(
            VectorFormatError, match=r"layer\.0\.npy is in the archive more than once"
        ):
            SteeringVector.load(file)

    def test_a_layer_that_the_metadata_lists_is_missing(self, file):
        rewrite(file, lambda members: members.pop("layer.2.npy"))
        with pytest.raises(VectorFormatError, match="lists layer 2, but the file holds no such"):
            SteeringVector.load(file)

    def test_something_that_is_no_part_of_the_format(self, file):
        rewrite(file, lambda members: members.update({"evil.py": b"x"}))
        with pytest.raises(VectorFormatError, match=r"evil\.py is not part"):
            SteeringVector.load(file)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, ">f4"])
    def test_another_dtype(self, file, dtype):
        other = npy(np.zeros(8, dtype=dtype))
        rewrite(file, lambda members: members.update({"layer.0.npy": other}))
        with pytest.raises(VectorFormatError, match=r"dtype <f4 \(float32\); it begins with"):
            SteeringVector.load(file)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 2}, "format version 2, .*Install a newer"),
            ({"format_version": "DELETE"}, "format version None"),
            ({"operator": "multiply"}, "operator 'multiply'"),
            ({"hook_point": "attention"}, "hook point 'attention'"),
            ({"hidden_size": 9}, r"layer 0 has shape \(8,\), expected \(9,\)"),
            ({"hidden_size": "eight"}, "`hidden_size` .* expected int"),
            ({"hidden_size": True}, "`hidden_size` .* expected int"),
            ({"layer_count": 3}, r"layer 3 is outside 0\.\.2"),
            ({"layer_count": 0}, "layer count 0"),
            ({"layer_count": 10**9}, "no model has hidden size 8 and layer count 1000000000"),
            ({"hidden_size": 10**400}, "more than 64 bits"),
            ({"hidden_size": 2**60}, "no model has hidden size"),
            ({"model": "\ud800"}, "half of a surrogate"),
            ({"format_version": True}, "format version True"),
            ({"layers": [0, 0]}, "not a list of layer numbers"),
            ({"layers": "all"}, "not a list of layer numbers"),
            ({"layers": []}, "holds no layer|not part of the format"),
            ({"model": "DELETE"}, "lacks `model`"),
            ({"model": None}, "`model` .* expected str"),
            ({"tested": 3}, "`tested` .* expected list"),
            ({"tested": [3]}, "`tested` is not a list of settings"),
            ({"model": "x" * 5000}, "`model` .* has 5000 characters"),
            ({"residual_norms": {"0": 1e-320}}, "`residual_norms` does not give"),
            ({"residual_norms": {"0": "x" * 9999}}, "`residual_norms` does not give"),
            ({"residual_norms": {"9" * 5000: 1.0}}, "`residual_norms` does not give"),
            ({"margin_gain": {"\u0663": 1.0}}, "`margin_gain` does not give"),
            ({"margin_gain": {"0": [1]}}, "`margin_gain` does not give"),
            ({"recommended": {}}, "`recommended` has no layer"),
            (
                {"recommended": {"layers": [0], "strength": 1, "positions": []}},
                "`recommended` has no",
            ),
            ({"recommended": {"layer": 0, "strength": 1, "text": 5}}, "`recommended` has no"),
            ({"recommended": {"layers": [], "strength": 1}}, "`recommended` has no"),
            ({"recommended": {"layers": [1, 1], "strength": 1}}, "`recommended` has no"),
            ({"recommended": {"layers": 1, "strength": 1}}, "`recommended` has no"),
            ({"calibration": {}}, "`calibration` has no points"),
            (
                {"calibration": {"points": [{"layers": [0], "positions": "all", "kl": 0.1}]}},
                "`calibration` has",
            ),
            (
                {"calibration": {"points": [POINT | {"kl": -0.1}]}},
                "`calibration` has no points that can be looked up",
            ),
            ({"calibration": {"points": [POINT | {"strength": 0}]}}, "`calibration` has"),
            ({"calibration": {"points": [POINT | {"layers": ["0"]}]}}, "`calibration` has"),
            ({"calibration": {"points": [POINT | {"positions": "here"}]}}, "`calibration` has"),
            ({"later_key": {"a": 2**80}}, "more than 64 bits"),
            ({"later_key": json.loads("[" * 500 + "]" * 500)}, "nested too deeply"),
            ({"layers": list(range(0, 9999, 2))}, r"lists layer 4, .*, \.\.\., but the file holds"),
        ],
    )
    def test_metadata_that_cannot_be_true(self, file, changes, message):
        edit_meta(file, **changes)
        with pytest.raises(VectorFormatError, match=message):
            SteeringVector.load(file)

    def test_metadata_that_is_no_json(self, file):
        junk = npy(np.frombuffer(b"\xff{", dtype=np.uint8))
        rewrite(file, lambda members: members.update({"meta.npy": junk}))
        with pytest.raises(VectorFormatError, match="`meta`: is not"):
            SteeringVector.load(file)

    def test_somebody_elses_npz(self, tmp_path):
        np.savez(tmp_path / "other.npz", weights=np.zeros(3))
        with pytest.raises(VectorFormatError, match="no `meta` entry.*vector import"):
            SteeringVector.load(tmp_path / "other.npz")


ODD = (
    None, True, 0, -1, 2**63, 1e300, "", "x", "\x1b[2J", [], [[]], [None], [{"layer": 0}], ["x"], {},
    {"0": 1}, {"0": None}, {"x": {}}, {"layer": 0, "strength": 1}, {"layer": 9, "strength": 1e9},
    {"layer": None, "strength": None}, {"layers": [0], "strength": 1}, {"points": []}, {"points": [{}]}, {"0": {"agreement": "x"}}, {"0": {"agreement": 0.5, "noise": 1}},
)  # fmt: skip


@pytest.mark.parametrize(
    "key", sorted({one.name for one in fields(VectorMeta)} | {"layers", "format", "stability"})
)
def test_metadata_of_any_shape_is_refused_or_can_be_shown(file, tmp_path, key):
    from mlx_densesteer.cli.vector import (
        _calibration,
        _recommended,
        default_setting,
        layer_table,
    )

    whole = file.read_bytes()
    for value in ODD:
        file.write_bytes(whole)
        edit_meta(file, **{key: value})
        try:
            vector = SteeringVector.load(file)
        except VectorFormatError as error:
            assert len(str(error)) < 400 + len(str(file))
            continue
        json.dumps(vector.describe(), allow_nan=False)
        assert layer_table(vector) and default_setting(vector)
        _recommended(vector.meta.recommended)
        _calibration(vector.meta.calibration)
        assert SteeringVector.load(vector.save(tmp_path / "again.npz")).meta == vector.meta


def test_older_files_have_one_layer(file):
    edit_meta(file, recommended={"layer": 0, "strength": 2}, tested=[{"layer": None}, {"layer": 1}])
    meta = SteeringVector.load(file).meta
    assert meta.recommended == {"layers": [0], "strength": 2}
    assert meta.tested == ({"layers": None}, {"layers": [1]})


def test_unknown_metadata_keys_are_kept(file, tmp_path):
    edit_meta(file, invented_in_2030={"a": 1})
    loaded = SteeringVector.load(file)
    assert loaded.meta.extra["invented_in_2030"] == {"a": 1}
    again = SteeringVector.load(loaded.save(tmp_path / "again.npz"))
    assert again.meta.extra == loaded.meta.extra


def test_layers_are_written_the_way_people_read_them():
    assert format_layers([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"
    assert format_layers([]) == ""


def test_the_embedded_vector_has_a_name(tmp_path, monkeypatch, file):
    """As the embedded model has; a file of that name is reached with a folder before it."""
    embedded = SteeringVector.load("demo")
    assert (
        embedded.name == "demo" and embedded.sha256() == SteeringVector.load(demo.VECTOR).sha256()
    )
    monkeypatch.chdir(file.rename(tmp_path / "demo").parent)
    assert SteeringVector.load("demo").sha256() == embedded.sha256()
    for path in ("./demo", Path("demo")):
        assert SteeringVector.load(path).meta.model == "Qwen/Tiny"
