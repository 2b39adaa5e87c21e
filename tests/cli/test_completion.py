"""Shell completion: the scripts, in the shells themselves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner

from mlx_densesteer.cli import main
from mlx_densesteer.cli.completers import models, vectors

SHELLS = ("bash", "zsh", "fish")
TYPED = [  # what is typed before Tab, and the last word afterwards
    ("densesteer gen", "generate"),
    ("densesteer vector sh", "show"),
    ("densesteer generate --draft-t", "--draft-tokens"),
    ("densesteer generate --positions gen", "generated"),
    ("densesteer chat -m de", "demo"),
    ("densesteer chat -m converted/T", "converted/Tiny-4bit"),
    ("densesteer chat -m el", "elsewhere/"),
    ("densesteer chat -v den", "dense.npz"),
    ("densesteer chat -v vec", "vectors/"),
    ("densesteer serve -v vectors/o", "vectors/other.npz"),
    ("densesteer vector show vectors/with", "vectors/with space.npz"),
    ("densesteer eval -m demo gs", "gsm8k"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models and vectors in it, and with files that are neither."""
    folder = tmp_path_factory.mktemp("place")
    for name in (
        "converted/Tiny-4bit/config.json", "converted/README.md", "elsewhere/notes.txt", "dense.npz",
        "dense.txt", "vectors/other.npz", "vectors/other.txt", "vectors/with space.npz",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def need(shell: str) -> str:
    """Return where a shell is. CI installs all of them."""
    found = shutil.which(shell)
    if found and shell == "bash":  # click's script is for 4.4 and newer
        told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
        found = found if tuple(map(int, re.findall(r"\d+", told.stdout)[:2])) >= (4, 4) else None
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {shell} here, or an old one")
    return found


def environment() -> dict[str, str]:
    """Return an environment in which ``densesteer`` is that of this Python."""
    folder = Path(sys.executable).parent
    assert (folder / "densesteer").exists(), "the package is not installed in this environment"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TERM": "dumb", "INPUTRC": os.devnull}


def start(shell: str, place: Path) -> pexpect.spawn:
    """Start a shell as a user does, with our completion and nothing else loaded."""
    plain = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    child = pexpect.spawn(
        need(shell), plain, cwd=str(place), env=environment(), encoding="utf-8", timeout=30,
        dimensions=(24, 200),
    )  # fmt: skip
    if shell == "zsh":
        child.sendline(f"autoload -Uz compinit && compinit -u -d '{place / '.zcompdump'}'")
    child.sendline(f'eval "$(densesteer completion {shell})"')
    child.sendline("""show() { printf '<%s>' "$@"; echo '<'end'>'; }; echo 're'ady""")
    child.expect("ready\r?\n")
    return child


def pressed(child: pexpect.spawn, typed: str) -> str:
    """Type, press Tab, and return the last word that the command would get; it is not run."""
    child.send(f"{typed}\t")
    child.send("\x01show \r")  # Ctrl-A: at the front of the line
    child.expect("(<densesteer>.*)<end>")
    return re.findall("<([^<>]*)>", child.match[1])[-1]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes(shell, place):
    child = start(shell, place)
    try:
        found = {typed: pressed(child, typed) for typed, _ in TYPED}
    finally:
        child.close(force=True)
    # zsh takes the slash of a folder off again when the line is entered
    assert {t: w.rstrip("/") for t, w in found.items()} == {t: w.rstrip("/") for t, w in TYPED}


def test_fish_completes(place):
    fish = need("fish")
    script = "densesteer completion fish | source\n"
    script += "".join(f"complete -C '{typed}'; echo ---\n" for typed, _ in TYPED)
    told = subprocess.run(
        [fish, "--no-config", "-c", script],
        capture_output=True, text=True, cwd=place, env=environment(), timeout=60, check=True,
    )  # fmt: skip
    assert told.stderr == ""
    offered = [text.split("\n") for text in told.stdout.split("---\n")]
    for (typed, word), lines in zip(TYPED, offered, strict=False):
        names = [line.split("\t")[0].replace("\\", "") for line in lines if line]
        assert names == [word], typed


def test_zsh_finds_the_script_in_its_path(place, tmp_path):
    """As Homebrew installs it: a file named _densesteer, loaded at the first Tab."""
    zsh, env = need("zsh"), environment()
    with (tmp_path / "_densesteer").open("w") as file:
        subprocess.run(["densesteer", "completion", "zsh"], stdout=file, env=env, check=True)
    child = pexpect.spawn(zsh, ["-f", "-i"], cwd=str(place), env=env, encoding="utf-8", timeout=30)
    try:
        child.sendline(f"fpath=('{tmp_path}' $fpath); autoload -Uz compinit && compinit -u -D")
        child.sendline("""show() { printf '<%s>' "$@"; echo '<'end'>'; }; echo 're'ady""")
        child.expect("ready\r?\n")
        assert pressed(child, "densesteer gen") == "generate"
    finally:
        child.close(force=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_of_the_environment_is_the_default(shell):
    named = CliRunner().invoke(main, ["completion", shell])
    found = CliRunner().invoke(main, ["completion"], env={"SHELL": f"/usr/local/bin/{shell}"})
    assert named.exit_code == found.exit_code == 0
    assert named.stdout == found.stdout
    assert "_DENSESTEER_COMPLETE" in found.stdout


def test_other_shells_are_told_which_there_are():
    for shell in ("/bin/tcsh", None):
        told = CliRunner().invoke(main, ["completion"], env={"SHELL": shell})
        assert told.exit_code == 2
        assert f"$SHELL is {shell or 'not set'}; name the shell: bash, zsh, fish" in told.stderr


def test_names_that_a_shell_would_run_are_never_inserted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "$(touch owned).npz",
        "a;b.npz",
        "a b.npz",
        "-v.npz",
        "`id`.npz",
        "~root.npz",
        ".h.npz",
    ):
        Path(name).touch()
    Path("converted/$(id)").mkdir(parents=True)
    Path("converted/$(id)/config.json").touch()
    assert [(i.type, i.value) for i in vectors(None, None, "")] == [("file", ""), ("plain", "demo")]
    assert [(i.type, i.value) for i in models(None, None, "")] == [("dir", ""), ("plain", "demo")]


def test_the_home_folder_stays_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dense.npz").touch()
    assert [i.value for i in vectors(None, None, "~/d")][1:] == ["~/dense.npz"]
    assert [i.value for i in vectors(None, None, "~/nowhere/d")][1:] == []


def test_a_key_press_imports_no_mlx():
    code = (
        "import sys\n"
        "from mlx_densesteer.cli import main\n"
        "try: main(prog_name='densesteer')\n"
        "except SystemExit: pass\n"
        "print(sorted({'mlx', 'mlx_lm', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    for words, number, offered in (
        ("generate -v d", 3, "plain,demo"),
        ("generate -m d", 3, "plain,demo"),
        ("eval -m demo gs", 4, "plain,gsm8k"),
    ):
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
            env=os.environ | {
                "_DENSESTEER_COMPLETE": "bash_complete", "COMP_CWORD": str(number),
                "COMP_WORDS": f"densesteer {words}",
            },
        )  # fmt: skip
        assert told.stdout.splitlines()[-2:] == [offered, "[]"], words
