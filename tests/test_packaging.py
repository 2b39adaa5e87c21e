"""What a release consists of: built, looked into, installed as a user installs it, and run."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from mlx_densesteer._version import __version__
from mlx_densesteer.demo.problems import held_out

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CI_ONLY = (".ci/", ".github/")  # what a source distribution does not need
NAME = f"mlx_densesteer-{__version__}"
WHEEL = f"{NAME}-py3-none-any.whl"
UNREACHABLE = re.compile(r"Failed to fetch|Could not connect|Connection(Error|Refused)|dns error")


def needed(condition: object, message: str) -> None:
    """Skip where something is not at hand; in CI it is a failure."""
    if not condition:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def run(
    *words: object, cwd: Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command without this checkout in its environment."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env | environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    if done.returncode != code:
        needed(not UNREACHABLE.search(done.stderr), f"no package registry here: {done.stderr}")
    assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which(
        "uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    needed(found, "no uv here: pip install -e '.[dev]'")
    return found


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Every file of the project that git knows, and new ones beside them."""
    needed((ROOT / ".git").exists(), "no git checkout")
    known = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    new = run("git", "ls-files", "-o", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    places = {name.split("/")[0] for name in known}
    names = known + [name for name in new if name.split("/")[0] in places]
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def checkout(tracked, tmp_path_factory) -> Path:
    """The work tree as it is now, as a commit in a repository of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    who = ("-c", "user.name=a test", "-c", "user.email=test@localhost")
    run("git", "init", "-q", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", *who, "commit", "-q", "--no-verify", "-m", "as it is", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def dist(checkout, uv) -> Path:
    done = run("scripts/build", uv, cwd=checkout)
    assert done.stdout.split() == [f"dist/{WHEEL}", f"dist/{NAME}.tar.gz"]
    assert "warning" not in done.stderr
    assert done.stderr.count("PASSED") == 2  # twine
    return checkout / "dist"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_the_same_commit_gives_the_same_bytes(dist, uv, tmp_path):
    """In another folder, at another time, with another umask, from another clone."""
    run("git", "clone", "-q", dist.parent, "elsewhere", cwd=tmp_path)
    clone = tmp_path / "elsewhere"
    run("sh", "-c", f"umask 077 && scripts/build {uv}", cwd=clone)
    assert hashes(clone / "dist") == {n: h for n, h in hashes(dist).items() if NAME in n}
    (clone / "mlx_densesteer" / "stray.py").touch()
    told = run("scripts/build", uv, cwd=clone)
    assert "no build of a commit" in told.stderr
    assert "?? mlx_densesteer/stray.py" in told.stderr


def test_a_build_that_fails_leaves_the_last_one(dist, uv, tmp_path):
    run("git", "clone", "-q", dist.parent, "broken", cwd=tmp_path)
    clone = tmp_path / "broken"
    (clone / "dist").mkdir()
    (clone / "dist" / "of-before").touch()
    (clone / "README.md").unlink()
    run("scripts/build", uv, cwd=clone, code=2)
    assert [p.name for p in (clone / "dist").iterdir()] == ["of-before"]


def test_the_wheel_holds_the_package_and_the_manual_page(dist, tracked):
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        names = set(wheel.namelist())
    ours = {name for name in tracked if name.startswith("mlx_densesteer/")}
    manual = f"{NAME}.data/data/share/man/man1/densesteer.1"
    assert {n for n in names if not n.startswith(f"{NAME}.dist-info/")} == ours | {manual}
    assert names >= {
        "mlx_densesteer/demo/dense.npz", "mlx_densesteer/demo/model/model.safetensors",
        "mlx_densesteer/demo/model/tokenizer.json", "mlx_densesteer/server/page/index.html",
        "mlx_densesteer/py.typed", f"{NAME}.dist-info/licenses/LICENSE",
    }  # fmt: skip


def test_the_metadata_says_what_is_installed(dist):
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        told = message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
        entry_points = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert (told["Name"], told["Version"]) == ("mlx-densesteer", __version__)
    assert told["Requires-Python"] == ">=3.11"
    assert told["License-Expression"] == "MIT"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload().startswith("# mlx-densesteer")
    assert "densesteer = mlx_densesteer.cli:main" in entry_points
    extras = set(told.get_all("Provides-Extra")) - {"dev", "docs", "lm-eval", "menubar"}
    shown = re.search(r"\.whl\)\[(.*?)\]", (ROOT / "docs" / "install.md").read_text("utf-8"))
    assert set(shown[1].split(",")) == extras, "docs/install.md shows how to install all of them"
    base = {r.split(";")[0].rstrip() for r in told.get_all("Requires-Dist") if "extra ==" not in r}
    assert {re.match(r"[\w.-]+", r)[0] for r in base} == {
        "mlx", "mlx-lm", "numpy", "huggingface-hub", "click", "safetensors",  # the last one mlx-lm's own
    }  # fmt: skip


def test_the_sdist_holds_what_git_holds(dist, tracked):
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist if member.isfile()}
    assert names - {"PKG-INFO"} == {n for n in tracked if not n.startswith(CI_ONLY)}


def test_the_sdist_can_be_tested(dist, tmp_path):
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        sdist.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    folder = tmp_path / NAME
    done = run(  # every module of tests is imported, one of them run
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", "test_public",
        cwd=folder, PYTHONPATH=str(folder),
    )  # fmt: skip
    assert re.search(r"\d+ passed", done.stdout)


def install_with_uv(uv: str, wheel: Path, home: Path) -> tuple[Path, Path]:
    """Return the command and its Python; with extras, as docs/install.md shows it."""
    run(
        uv, "tool", "install", "--python", sys.executable, f"{wheel}[chat,serve]", cwd=home,
        UV_TOOL_DIR=str(home / "tools"), UV_TOOL_BIN_DIR=str(home / "bin"),
    )  # fmt: skip
    return home / "bin" / "densesteer", home / "tools" / "mlx-densesteer" / "bin" / "python"


def install_with_pipx(uv: str, wheel: Path, home: Path) -> tuple[Path, Path]:
    """Likewise. pipx takes uv to install where it finds one; most people's has pip alone."""
    run(
        uv, "tool", "run", "pipx", "install", "--backend", "pip", "--python", sys.executable, wheel,
        cwd=home, PIPX_HOME=str(home / "pipx"), PIPX_BIN_DIR=str(home / "bin"),
        PIPX_MAN_DIR=str(home / "man"), PIP_NO_COMPILE="1",
    )  # fmt: skip
    assert ".TH DENSESTEER 1" in (home / "man" / "man1" / "densesteer.1").read_text("utf-8")
    venv = home / "pipx" / "venvs" / "mlx-densesteer"
    return home / "bin" / "densesteer", venv / "bin" / "python"


@pytest.mark.parametrize("install", [install_with_uv, install_with_pipx])
def test_it_installs_and_runs_outside_the_repository(install, dist, uv, tmp_path):
    home, empty = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    empty.mkdir()
    densesteer, python = install(uv, dist / WHEEL, home)
    where = run(python, "-c", "import mlx_densesteer; print(mlx_densesteer.__file__)", cwd=empty)
    assert Path(where.stdout.strip()).is_relative_to(home)

    told = run(densesteer, "--version", cwd=empty)
    assert told.stdout == f"densesteer, version {__version__}\n"
    question = held_out(1)[0].question
    steered = run(
        densesteer, "generate", "-m", "demo", "-v", "demo", "-n", "120", "--json", question,
        cwd=empty,
    )  # fmt: skip
    answer = json.loads(steered.stdout)
    assert re.search(r"#### \d+$", answer["text"])
    assert answer["finish_reason"] == "stop"
    assert answer["steering"]["dose"]
    assert "mlx-lm" in run(densesteer, "doctor", cwd=empty).stdout
    assert "compdef" in run(densesteer, "completion", "zsh", cwd=empty).stdout
    place = shlex.quote(f"{dist / WHEEL}[gguf]")
    tool = "uv tool" if install is install_with_uv else "pipx"
    import_it = "from mlx_densesteer.errors import install_command; print(install_command('gguf'))"
    told = run(python, "-c", import_it, cwd=empty).stdout
    assert told == f"{tool} install --force {place} (and name what other extras you use)\n"
    if install is install_with_uv:
        run(python, "-c", "import starlette, uvicorn, prompt_toolkit, rich", cwd=empty)
    assert list(empty.iterdir()) == []


def test_a_command_reference_that_is_out_of_date_is_noticed(checkout):
    page = checkout / "docs" / "commands.md"
    text = page.read_text("utf-8")
    page.write_text(text.replace("--positions", "--position"), "utf-8")
    script = checkout / "scripts" / "make-command-reference"
    told = run(sys.executable, script, "--check", cwd=checkout, code=1)
    assert "out of date: commands.md in docs/" in told.stderr
    run(sys.executable, script, cwd=checkout)
    assert page.read_text("utf-8") == text


@pytest.fixture(scope="module")
def formula(dist, uv) -> Path:
    made = run_formula(dist, uv, "https://densesteer.example/files/")
    assert [Path(line).name for line in made.stdout.split()] == [
        "densesteer-requirements.txt", "densesteer.rb",
    ]  # fmt: skip
    return dist / "densesteer.rb"


def run_formula(dist: Path, uv: str, url: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    script = dist.parent / "scripts" / "make-homebrew-formula"
    return run(
        sys.executable, script, "--url", url, "--homepage", "https://densesteer.example",
        cwd=dist, code=code, PATH=f"{Path(uv).parent}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip


def test_the_homebrew_formula_names_what_was_built(formula, dist, uv):
    text = formula.read_text("utf-8")
    assert not re.search(r"@[A-Z_]+@", text)
    assert f'version "{__version__}"' in text
    named = re.findall(r'url "https://densesteer.example/files/(.+?)"', text)
    assert named == [WHEEL, "densesteer-requirements.txt"]
    built = hashes(dist)
    assert re.findall(r'sha256 "(.+?)"', text) == [built[name] for name in named]
    refused = run_formula(dist, uv, 'https://a.example/"; x', code=2)
    assert "no plain https:// address" in refused.stderr


def test_the_homebrew_formula_pins_everything_with_hashes(formula):
    pins = formula.with_name("densesteer-requirements.txt").read_text("utf-8")
    lines = pins.replace("\\\n", " ").splitlines()
    assert {line.split("==")[0] for line in lines} >= {
        "mlx", "mlx-metal", "mlx-lm", "gguf", "math-verify", "matplotlib", "rich", "starlette",
    }  # fmt: skip
    for line in lines:  # nothing of this machine either
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( +--hash=sha256:[0-9a-f]{64})+", line), line


def test_the_homebrew_formula_is_ruby(formula):
    ruby = shutil.which("ruby")
    needed(ruby, "no ruby here")
    assert run(ruby, "-wc", formula, cwd=formula.parent).stdout == "Syntax OK\n"
