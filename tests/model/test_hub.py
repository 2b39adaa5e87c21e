"""The Hub path through the real huggingface_hub, against a Hub on this machine.

huggingface_hub reads its environment when it is imported: every test runs a process of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import pytest
from helpers import QUICK_RETRIES, ROOT
from hub_server import HubServer

REPO, BIG, MAMBA = "Org/Tiny-Qwen2", "Org/Big-Qwen2", "Org/Tiny-Mamba"
ADAPTER = "Org/Tiny-Adapter"
CHUNK = 10 * 2**20  # huggingface_hub writes pieces of this size
CUT = CHUNK + 2**20

# Prints what each [function, arguments ..., revision] of a JSON list returned or our error said.
ASK = """
import json, sys
from mlx_densesteer.model import hub
from mlx_densesteer.errors import HubError
answers = []
for name, *arguments, revision in json.loads(sys.argv[1]):
    try:
        answers.append(str(getattr(hub, name)(*arguments, revision=revision)))
    except HubError as error:
        answers.append(f"HubError: {error}")
print(json.dumps(answers))
"""

RAISE = """
import errno, sys
from mlx_densesteer.model import hub
from mlx_densesteer.errors import HubError
def failing(*arguments, **options):
    raise {}
hub.hf_hub_download = failing
try:
    hub.fetch_model(sys.argv[1])
except HubError as error:
    print(error)
"""

FULL = """
import shutil, sys, types
from mlx_densesteer.model import hub
from mlx_densesteer.errors import DiskError
shutil.disk_usage = lambda place: types.SimpleNamespace(free=0)
try:
    hub.fetch_model(sys.argv[1])
except DiskError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def big_folder(hf_folder, tmp_path_factory) -> Path:
    """The tiny model with a vocabulary so large that its weights come in more than one piece."""
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("big") / "Big-Qwen2"
    shutil.copytree(hf_folder, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = mx.tile(rows, (500, 1))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500 * len(rows)}))
    assert CUT < (folder / "model.safetensors").stat().st_size < 2 * CHUNK
    return folder


@pytest.fixture(scope="module")
def mamba_folder(hf_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mamba") / "Tiny-Mamba"
    shutil.copytree(hf_folder, folder)
    config = {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 64, "hidden_size": 64,
        "intermediate_size": 128, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 4,
        "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folders(hf_folder, big_folder, mamba_folder, tmp_path) -> dict[str, Path]:
    adapter = tmp_path / "Tiny-Adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    return {REPO: hf_folder, BIG: big_folder, MAMBA: mamba_folder, ADAPTER: adapter}


@pytest.fixture
def hub(folders):
    with HubServer(folders) as server:
        yield server


class User:
    """Somebody with an empty cache and no token, for whom ``hub`` is the Hub."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.home = home
        ours = re.compile(r"HF_|HUGGING|TRANSFORMERS_|XDG_CACHE|.*_PROXY$", re.IGNORECASE)
        self.environment = {k: v for k, v in os.environ.items() if not ours.match(k)} | {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), str(QUICK_RETRIES), os.environ.get("PYTHONPATH")])
            ),
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.home, env=self.environment | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def densesteer(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Run the command line; whatever happens, it shows no traceback."""
        done = finish(self.start("-m", "mlx_densesteer", *arguments, **environment))
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ask(self, *calls: list, **environment: str) -> list[str]:
        """Return what functions of ``mlx_densesteer.model.hub`` answer, called in one process."""
        done = finish(self.start("-c", ASK, json.dumps(calls), **environment))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def blobs(self) -> Path:
        return self.home / "hf" / "hub" / f"models--{BIG.replace('/', '--')}" / "blobs"


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def user(hub, tmp_path) -> User:
    return User(hub, tmp_path)


def same(got: Path, expected: Path) -> bool:
    return got.read_bytes() == expected.read_bytes()


def test_convert_and_generate_from_a_hub_id(user, hub, hf_folder):
    done = user.densesteer("convert", REPO, "--bits", "none", "-o", "X")
    assert (done.returncode, done.stdout) == (0, "X\n"), done.stderr
    record = json.loads((user.home / "X" / "densesteer.json").read_text())
    assert record["source"] == REPO
    assert record["revision"] == hub.commit(REPO)
    assert len(hub.gets("/cdn/")) == 1
    from_folder = user.densesteer(
        "generate", "-m", "X", "--max-tokens", "4", "--temp", "0", "hello"
    )

    done = user.densesteer("generate", "-m", REPO, "--max-tokens", "4", "--temp", "0", "hello")
    assert (done.returncode, done.stdout) == (0, from_folder.stdout), done.stderr
    assert len(hub.gets("/cdn/")) == 1  # from the cache


def test_generate_downloads_what_is_not_in_the_cache(user, hub, hf_folder):
    done = user.densesteer("generate", "-m", REPO, "--max-tokens", "4", "hello")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^densesteer: [1-4] tokens, ", done.stderr, re.MULTILINE)
    assert len(hub.gets("/cdn/")) == 1
    snapshot = user.home / "hf/hub/models--Org--Tiny-Qwen2/snapshots" / hub.commit(REPO)
    assert {f.name for f in snapshot.iterdir()} == {f.name for f in hf_folder.iterdir()}
    assert all(same(snapshot / f.name, f) for f in hf_folder.iterdir())


def test_refusals(user, hub):
    gated = {"X-Error-Code": "GatedRepo"}
    hub.faults.refuse = {
        "Org/Gated": (401, gated),
        "Org/Waiting": (403, gated),
        "Org/Gone": (404, {"X-Error-Code": "RepoNotFound"}),
        "Org/Token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    }
    calls = {
        ("fetch_file", "Org/Gated", "config.json", None): r"Org/Gated: .*gated.*`hf auth login`",
        ("fetch_model", "Org/Gated", None): r"Org/Gated: .*gated.*`hf auth login`",
        ("fetch_model", "Org/Waiting", None): r"Org/Waiting: .*gated.*Accept its terms",
        ("fetch_model", "Org/Gone", None): r"Org/Gone: is not on the Hub, or it is private",
        ("fetch_model", "Org/Never", None): r"Org/Never: is not on the Hub, or it is private",
        ("fetch_file", "Org/Never", "config.json", None): r"Org/Never: is not on the Hub",
        ("fetch_model", REPO, "v9"): rf"{REPO}: has no revision 'v9'\. Expected a branch",
        (
            "fetch_file",
            REPO,
            "config.json",
            "v9",
        ): rf"{REPO}: has no revision 'v9'\. Expected a branch",
        ("fetch_file", REPO, "none.json", None): rf"{REPO}: has no file none\.json",
        ("fetch_model", ADAPTER, None): rf"{ADAPTER}: has no config\.json.*adapter must be merged",
        ("fetch_file", "Org/Token", "config.json", None): r"answered with 401. Check your token",
        ("fetch_model", "Org/bad name", None): r"Org/bad name: neither a folder here nor a Hub id",
    }
    answers = user.ask(*calls)
    for call, answer, pattern in zip(calls, answers, calls.values(), strict=True):
        assert answer.startswith("HubError: "), call
        assert "\n" not in answer, call
        assert re.search(pattern, answer), call
    assert not hub.gets("/cdn/")


def test_a_gated_repository_on_the_command_line(user, hub):
    hub.faults.refuse[REPO] = (401, {"X-Error-Code": "GatedRepo"})
    done = user.densesteer("generate", "-m", REPO, "hello")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Error: {REPO}: is gated.")
    assert "hf auth login" in last


def test_a_model_that_cannot_be_steered_is_refused_after_one_small_file(user, hub):
    done = user.densesteer("convert", MAMBA)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        f"{MAMBA}: is a mamba model, which cannot be steered: it is no single stack of text"
        in done.stderr
    )
    assert {Path(r.path).name for r in hub.requests} == {"config.json"}
    assert not (user.home / "converted").exists()


def test_mistyped_ids_ask_nobody(user, hub):
    code = """
import sys
from mlx_densesteer.model.convert import convert
from mlx_densesteer.errors import DenseSteerError
from mlx_densesteer.model.model import load
for name in sys.argv[1:]:
    for function in convert, load:
        try:
            function(name)
        except DenseSteerError as error:
            print(error)
"""
    names = ["no such thing", "a/b/c", "Org/bad name", "Org/Tiny--Qwen2", "Org/Tiny-Qwen2.git"]
    done = finish(user.start("-c", code, *names))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(names), done.stdout
    for line, name in zip(lines, [name for name in names for _ in range(2)], strict=True):
        assert line.startswith(f"{name}: ")
        assert "Hub id" in line
    assert not hub.requests


def test_without_a_network_the_cache_is_used(user, hub, hf_folder):
    [folder] = user.ask(["fetch_model", REPO, None])
    calls = [
        ["fetch_file", REPO, "config.json", None],
        ["fetch_model", REPO, None],
        ["fetch_model", REPO, hub.commit(REPO)],
        ["fetch_file", BIG, "config.json", None],
        ["fetch_model", BIG, None],
    ]

    def check(answers):
        assert answers[:3] == [f"{folder}/config.json", folder, folder]
        for answer in answers[3:]:
            assert answer.startswith(f"HubError: {BIG}: the Hub cannot be reached")
            assert "HF_HUB_OFFLINE" in answer

    before = len(hub.requests)
    check(user.ask(*calls, HF_HUB_OFFLINE="1"))
    assert len(hub.requests) == before

    hub.faults.silent = True  # a network that swallows everything
    check(user.ask(*calls, HF_HUB_ETAG_TIMEOUT="1"))
    assert len(hub.requests) - before <= 2 * len(calls)  # not asked again and again

    hub.stop()
    check(user.ask(*calls))
    done = user.densesteer("generate", "-m", REPO, "--max-tokens", "4", "hello")
    assert done.returncode == 0, done.stderr
    done = user.densesteer("generate", "-m", BIG, "--max-tokens", "4", "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"Error: {BIG}: the Hub cannot be reached")


def test_an_incomplete_copy_is_no_copy(user, hub):
    user.ask(["fetch_file", REPO, "config.json", None])
    [answer] = user.ask(["fetch_model", REPO, None], HF_HUB_OFFLINE="1")
    assert "there is no complete copy in its cache" in answer


def test_the_weights_are_the_files_that_the_index_names(user, hub, folders, tmp_path):
    folder = shutil.copytree(folders[REPO], tmp_path / "Named")
    name = "pytorch_model-00001-of-00001.safetensors"
    shutil.copy(folder / "model.safetensors", folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    damaged = shutil.copytree(folders[REPO], tmp_path / "Damaged")
    (damaged / index.name).write_text('{"weight_map": {"a": "../x.safetensors"}}')
    hub.folders |= {"Org/Named": folder, "Org/Damaged": damaged}
    done = user.densesteer("generate", "-m", "Org/Named", "--max-tokens", "4", "hello")
    assert done.returncode == 0, done.stderr
    [snapshot] = user.ask(["fetch_model", "Org/Named", None], HF_HUB_OFFLINE="1")
    assert [file.name for file in Path(snapshot).glob("*.safetensors")] == [name]
    (Path(snapshot) / name).unlink()
    [answer] = user.ask(["fetch_model", "Org/Named", None], HF_HUB_OFFLINE="1")
    assert "there is no complete copy in its cache" in answer
    done = user.densesteer("generate", "-m", "Org/Damaged", "hello")
    assert f"Error: Org/Damaged: {index.name} names '../x.safetensors'" in done.stderr
    assert len(hub.gets("/cdn/")) == 1


def test_a_failing_hub_does_not_matter_with_a_complete_copy(user, hub):
    [folder] = user.ask(["fetch_model", REPO, None])
    hub.faults.status = 503
    calls = ["fetch_file", REPO, "config.json", None], ["fetch_model", REPO, None]
    assert user.ask(*calls) == [f"{folder}/config.json", folder]


def test_a_hub_that_always_fails(user, hub):
    hub.faults.status = 500
    [answer] = user.ask(["fetch_model", REPO, None])
    assert answer == f"HubError: {REPO}: the Hub answered with 500. Try again later."


def test_a_connection_that_drops_once_is_resumed_in_the_same_run(user, hub, big_folder):
    hub.faults.stop_at, hub.faults.breaks = CUT, iter(["close"])
    [folder] = user.ask(["fetch_model", BIG, None])
    assert [r.start for r in hub.gets("/cdn/")] == [0, CHUNK]
    assert same(Path(folder) / "model.safetensors", big_folder / "model.safetensors")


def test_a_download_that_broke_off_is_made_anew_by_the_next_run(user, hub, big_folder):
    hub.faults.stop_at, hub.faults.breaks = CUT, repeat("reset")
    command = "convert", BIG, "--bits", "none", "-o", "X"
    done = user.densesteer(*command)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Error: {BIG}: the download broke off (ReadError: ")
    assert last.endswith("Files that came whole are kept; start the same command again.")
    assert not (user.home / "X").exists()
    assert not list(user.blobs.glob("*.incomplete"))
    # the files come side by side: which of them are whole when one breaks off depends on the time
    [snapshot] = user.blobs.parent.glob("snapshots/*")
    whole = {f.name for f in snapshot.iterdir()}
    assert "config.json" in whole and "model.safetensors" not in whole

    hub.faults.stop_at = None
    before = len(hub.requests)
    done = user.densesteer(*command)
    assert (done.returncode, done.stdout) == (0, "X\n"), done.stderr
    fetched = {r.path.rsplit("/", 1)[1] for r in hub.requests[before:] if r.method == "GET"}
    assert not whole & fetched
    [weights] = user.blobs.parent.glob("snapshots/*/model.safetensors")
    assert same(weights, big_folder / "model.safetensors")


def test_two_processes_download_a_file_once(user, hub, big_folder):
    hub.faults.stop_at, hub.faults.breaks = CUT, iter(["close"])  # the first one waits a second
    calls = json.dumps([["fetch_model", BIG, None]])
    for done in [finish(p) for p in [user.start("-c", ASK, calls) for _ in range(2)]]:
        assert done.returncode == 0, done.stderr
        [folder] = json.loads(done.stdout)
        assert same(Path(folder) / "model.safetensors", big_folder / "model.safetensors")
    assert [r.start for r in hub.gets("/cdn/")] == [0, CHUNK]


def test_an_interrupt_ends_a_download_at_once(user, hub, big_folder):
    hub.faults.stop_at, hub.faults.breaks = CUT, repeat("hang")
    process = user.start("-m", "mlx_densesteer", "convert", BIG)
    wait_until(
        lambda: (
            any(f.stat().st_size == CHUNK for f in user.blobs.glob("*.incomplete"))
            or process.poll() is not None
        ),
        "no partial file",
    )
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert time.monotonic() - began < 5
    assert done.returncode == 130, done.stderr
    assert "Files that were downloaded whole are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(user.blobs.glob("*.incomplete"))

    hub.faults.stop_at = None
    [folder] = user.ask(["fetch_model", BIG, None])
    assert same(Path(folder) / "model.safetensors", big_folder / "model.safetensors")


def test_a_file_of_another_size_is_not_kept(user, hub):
    hub.faults.sizes["model.safetensors"] = 1
    [answer] = user.ask(["fetch_model", BIG, None])
    assert re.search("the download broke off .*should be of size .* but has size", answer)
    assert not list(user.blobs.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("OSError(errno.ENOSPC, 'No space left on device')", "is full. Make room, or set HF_HOME"),
        (
            "RuntimeError('Data processing error: CAS service error')",
            "broke off (RuntimeError: Data",
        ),
    ],
)
def test_what_the_disk_and_xet_raise(user, hub, raised, said):
    done = finish(user.start("-c", RAISE.format(raised), BIG))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_a_disk_that_is_too_small_is_told_before_the_download(user, hub):
    done = finish(user.start("-c", FULL, BIG))
    assert done.returncode == 0, done.stderr
    assert re.search(
        "the download needs about 1[0-9].[0-9] MB of disk, but 0.0 MB are free", done.stdout
    )
    assert not hub.gets("/cdn/")


def test_where_no_terminal_is_no_progress_is_shown(user, hub):
    done = finish(user.start("-c", ASK, json.dumps([["fetch_model", REPO, None]])))
    assert (done.returncode, done.stderr) == (0, "")
