import json
import os
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_densesteer.errors import ConversionError, DiskError, ModelError, UnsupportedModelError
from mlx_densesteer.files import check_disk, partial_prefix
from mlx_densesteer.model import convert as conversion
from mlx_densesteer.model.convert import convert
from mlx_densesteer.model.model import Model, load


def weights(folder):
    return dict(tree_flatten(mlx_lm.load(str(folder))[0].parameters()))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "models" / "out"


@pytest.fixture
def source(hf_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(hf_folder, tmp_path / "Tiny-Qwen2")


def test_without_quantisation_every_weight_is_kept(hf_folder, out):
    convert(hf_folder, out, bits=None)
    stock = mx.load(str(hf_folder / "model.safetensors"))
    found = weights(out)
    assert found.keys() == stock.keys()
    assert all(found[k].dtype == mx.bfloat16 and mx.array_equal(found[k], stock[k]) for k in stock)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(hf_folder, out, bits):
    convert(hf_folder, out, bits=bits, group_size=32)
    quantised = load(out)
    model, tokenizer = quantised
    assert model.model.layers[0].mlp.down_proj.bits == bits
    assert quantised.info.quantization == f"{bits}-bit, group 32"
    logits = model(mx.array([tokenizer.encode("hello")])).astype(mx.float32)
    stock = load(hf_folder)[0](mx.array([tokenizer.encode("hello")])).astype(mx.float32)
    assert float(mx.abs(logits - stock).mean()) < {4: 0.2, 8: 0.05}[bits] * float(
        mx.abs(stock).mean()
    )


def test_dtype_and_the_config_agree(hf_folder, out):
    convert(hf_folder, out, bits=None, dtype="float32")
    assert {a.dtype for a in weights(out).values()} == {mx.float32}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_record_and_one_fingerprint_for_every_precision(hf_folder, tmp_path):
    records = []
    for bits, dtype in [(4, None), (8, "float16"), (None, "float32")]:
        folder = convert(hf_folder, tmp_path / f"{bits}{dtype}", bits=bits, dtype=dtype)
        records.append(json.loads((folder / "densesteer.json").read_text()))
    assert [r["bits"] for r in records] == [4, 8, None]
    assert [r["dtype"] for r in records] == ["bfloat16", "float16", "float32"]
    assert {r["fingerprint"] for r in records} == {load(hf_folder).fingerprint}
    assert {r["source"] for r in records} == {"Tiny-Qwen2"}


def test_the_name_says_what_it_is(hf_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        str(convert(hf_folder, bits=b, dtype=d))
        for b, d in [(4, None), (None, None), (None, "float32")]
    ]
    assert names == [f"converted/Tiny-Qwen2-{x}" for x in ("4bit", "bfloat16", "float32")]
    assert sorted(p.name for p in (tmp_path / "converted").iterdir()) == sorted(
        name.removeprefix("converted/") for name in names
    )


def test_an_existing_target_is_refused_and_kept_unless_forced(hf_folder, out):
    convert(hf_folder, out)
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ConversionError, match=r"exists already.*replace it .force"):
        convert(hf_folder, out)
    assert (out / "mine.txt").read_text() == "precious"
    convert(hf_folder, out, force=True)
    assert not (out / "mine.txt").exists()
    load(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_force_replaces_nothing_but_a_converted_model(hf_folder, source, tmp_path):
    thesis = tmp_path / "papers" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    file = tmp_path / "weights.gguf"
    file.write_text("")
    inside = convert(hf_folder, tmp_path / "models" / "one")
    for out, message in [
        (thesis.parent, "is no model that densesteer wrote"),
        (file, "is no model that densesteer wrote"),
        (inside.parent, "is no model that densesteer wrote"),
        (source, "holds the source itself"),
        (source.parent, "holds the source itself"),
    ]:
        with pytest.raises(ConversionError, match=message):
            convert(source, out, force=True)
    for spelling in (source.parent / "." / source.name, source / ".." / source.name):
        with pytest.raises(ConversionError, match="holds the source itself"):
            convert(source, spelling, force=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(ConversionError, match="or a link"):
        convert(source, link, force=True)
    assert thesis.exists() and file.exists() and (inside / "config.json").exists()
    assert (source / "model.safetensors").exists()


def test_a_target_that_appears_meanwhile_is_kept(hf_folder, out, monkeypatch):
    finish = conversion._finish

    def another_process_is_faster(*arguments):
        finish(*arguments)
        out.mkdir()
        (out / "theirs").touch()

    monkeypatch.setattr(conversion, "_finish", another_process_is_faster)
    with pytest.raises(DiskError, match="another process has made it meanwhile"):
        convert(hf_folder, out)
    assert [p.name for p in out.iterdir()] == ["theirs"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_places_that_cannot_be_written(hf_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written"):
        convert(hf_folder, tmp_path / "file" / "out")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="or a link"):
        convert(hf_folder, tmp_path / "dangling")
    with pytest.raises(ConversionError, match="expected the name of a folder"):
        convert(hf_folder, ".", force=True)


def test_a_model_that_brings_code_is_refused_and_the_code_not_run(source, out, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w').close()")
    for action in (lambda: convert(source, out), lambda: load(source)):
        with pytest.raises(UnsupportedModelError, match="has its own model code"):
            action()
    assert not (tmp_path / "witness").exists()


def test_rotary_embeddings_that_differ_between_layers_are_refused(source, out):
    config = json.loads((source / "config.json").read_text())
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": nested}))
    for action in (lambda: convert(source, out), lambda: load(source)):
        with pytest.raises(UnsupportedModelError, match="expected one rotary embedding"):
            action()


def test_a_failed_replacement_keeps_the_old_model(hf_folder, source, out):
    convert(hf_folder, out, bits=None)
    weights_file = mx.load(str(source / "model.safetensors"))
    weights_file["model.norm.weight"] = weights_file["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), weights_file)
    with pytest.raises(ConversionError, match="not finite"):
        convert(source, out, force=True)
    load(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_interrupted_run_leaves_nothing(hf_folder, out, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(hf_folder, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_on_the_command_line(hf_folder, tmp_path, number):
    """A real process, a real signal, while the checkpoint is being written."""
    slow = (
        "import signal, time, mlx_lm, mlx_densesteer.cli as cli\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # a test run under nohup ignores it
        "real = mlx_lm.convert\n"
        "def slow(*a, **k):\n"
        "    real(*a, **k); print('WRITTEN', flush=True); time.sleep(60)\n"
        "mlx_lm.convert = slow\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "convert", str(hf_folder), "-o", "out"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "WRITTEN" in line:
            break
    (partial,) = tmp_path.iterdir()
    assert f"-{process.pid}-" in partial.name
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + number, "")
    assert "nothing half-done was left" in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_swept_away_by_the_next(hf_folder, out):
    out.parent.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = out.parent / f"{partial_prefix(out)}{dead.pid}-x"
    left.mkdir()
    running = out.parent / f"{partial_prefix(out)}{os.getppid()}-x"
    running.mkdir()
    elsewhere = out.parent / f".out.partial-0-{dead.pid}-x"  # of another machine
    elsewhere.mkdir()
    convert(hf_folder, out)
    assert not left.exists() and running.exists() and elsewhere.exists()


def test_a_quantization_of_null_is_none(hf_folder, out, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "null")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization": None, "quantization_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(convert(folder, out, bits=4, group_size=32)).info.quantization == "4-bit, group 32"


def test_a_full_disk_is_noticed_before(hf_folder, out, monkeypatch):
    usage = shutil.disk_usage(out.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskError, match=r"needs about 0\.\d MB of disk, but 0\.0 MB are free"):
        convert(hf_folder, out)
    assert not out.parent.exists()


def test_the_estimate_covers_what_is_written(hf_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(conversion, "check_disk", lambda folder, need, what: asked.append(need))
    for number, (bits, dtype) in enumerate([(4, None), (8, None), (None, None), (None, "float32")]):
        out = convert(hf_folder, tmp_path / str(number), bits=bits, dtype=dtype)
        size = (out / "model.safetensors").stat().st_size
        assert 0.8 * size < asked[-1] + 20_000 and asked[-1] < 1.5 * size


def test_disk_check_looks_at_the_nearest_folder_that_exists(tmp_path):
    check_disk(tmp_path / "a" / "b", 1, "this")
    with pytest.raises(DiskError, match="GB are free"):
        check_disk(tmp_path / "a" / "b", 10**18, "this")


def test_a_model_that_cannot_be_steered_is_refused(source, out):
    config = json.loads((source / "config.json").read_text()) | {"model_type": "bert"}
    (source / "config.json").write_text(json.dumps(config))
    for action in (lambda: convert(source, out), lambda: load(source)):
        with pytest.raises(
            UnsupportedModelError, match="is a bert model, which mlx-lm does not have"
        ):
            action()


def test_sources_that_cannot_be_used(source, hf_folder, out, tmp_path):
    def refused(what, message, error=ConversionError, **options):
        with pytest.raises(error, match=message):
            convert(what, out, **options)
        assert not out.exists()

    refused(tmp_path / "nowhere", "no such file or folder. Expected a Hub id")
    refused("nowhere", "no such file or folder. Expected a Hub id")
    refused("models/qwen.gguf", "no such file or folder. Expected a Hub id")
    refused(source, "is local, so it has no revision 'v1'", revision="v1")
    refused(tmp_path, "no config.json", ModelError)
    quantised = convert(hf_folder, tmp_path / "quantised")
    refused(quantised, "is quantised already")
    (source / "config.json").write_text("{")
    refused(source, "config.json: is not JSON that can be read", ModelError)
    (source / "config.json").write_text("[]")
    refused(source, "config.json: is list, expected a JSON object", ModelError)
    (source / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(source, "damaged or incomplete", ModelError)
    (source / "model.safetensors").unlink()
    refused(source, "no model.safetensors or numbered shards", ModelError)
    (source / "m.gguf").write_bytes(b"")
    (source / "config.json").unlink()
    refused(source, "name one of m.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "3 bits: expected 4, 8 or none"),
        ({"group_size": 48}, "group size 48"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"group_size": 128}, "group size 128 does not divide its hidden_size 64"),
    ],
)
def test_options_that_do_not_fit(hf_folder, out, options, message):
    with pytest.raises(ConversionError, match=message):
        convert(hf_folder, out, **options)
    assert not out.exists()


def test_a_home_folder_is_spelled_out(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(hf_folder, "~/models/tiny") == tmp_path / "models" / "tiny"


def test_progress_is_told(hf_folder, out):
    told = []
    convert(hf_folder, out, progress=lambda *event: told.append(event[0]))
    assert told == ["converting to out", "checking with one forward pass"]


def test_the_fingerprint_tells_models_apart(tiny):
    before = Model(tiny, None, "tiny").fingerprint
    tiny.model.layers[2].input_layernorm.weight = mx.array(np.linspace(0.5, 2, 64))
    assert Model(tiny, None, "tiny").fingerprint != before
    assert len(before) == 16
