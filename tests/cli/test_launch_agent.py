import os
import plistlib
import stat
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_densesteer import SteeringVector, VectorMeta
from mlx_densesteer.cli import launch_agent, main
from mlx_densesteer.errors import DenseSteerError, InputError


@pytest.fixture
def launchctl(tmp_path, monkeypatch):
    """A launchctl that records its arguments, and fails where ``failing`` says so."""
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    script = folder / "launchctl"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$1" = print ] && {{ [ -f {tmp_path}/ending ] && rm {tmp_path}/ending; exit; }}\n'
        'case "$1" in "$FAILING") echo "Load failed: 5" >&2; exit 5;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAILING", "bootout")  # as when there is none yet
    return lambda: calls.read_text().splitlines()


def test_the_agent_is_what_launchd_reads(tmp_path):
    environment = {"HF_HOME": "/models", "DENSESTEER_API_KEY": "secret", "PATH": "/bin"}
    made = launch_agent.agent(["-m", "demo"], home=tmp_path, environment=environment)
    document = plistlib.loads(made)
    assert document["ProgramArguments"] == [
        sys.executable,
        "-m",
        "mlx_densesteer",
        "serve",
        "-m",
        "demo",
    ]
    # the keys and their types, from launchd.plist(5)
    assert {name: type(value) for name, value in document.items()} == {
        "Label": str, "ProgramArguments": list, "RunAtLoad": bool, "KeepAlive": dict,
        "ThrottleInterval": int, "ExitTimeOut": int, "ProcessType": str, "WorkingDirectory": str,
        "StandardErrorPath": str, "StandardOutPath": str, "EnvironmentVariables": dict,
    }  # fmt: skip
    assert document["RunAtLoad"] is True
    assert document["KeepAlive"] == {"SuccessfulExit": False}  # restarts on any other status than 0
    assert document["EnvironmentVariables"] == {"HF_HOME": "/models"}
    assert b"secret" not in made
    assert document["ExitTimeOut"] > 10  # the grace of answers that run
    assert document["StandardErrorPath"].startswith(str(tmp_path))


def test_the_program_survives_an_upgrade_of_homebrew(tmp_path, monkeypatch):
    def program(name):
        monkeypatch.setattr(sys, "executable", str(name))
        return plistlib.loads(launch_agent.agent([], home=tmp_path))["ProgramArguments"][0]

    versioned = tmp_path / "Cellar/densesteer/0.2.0/libexec/bin/python"
    versioned.parent.mkdir(parents=True)
    versioned.touch()
    assert program(versioned) == str(versioned)  # not linked: no other path is there
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/densesteer").symlink_to(versioned.parents[2])
    assert program(versioned) == f"{tmp_path}/opt/densesteer/libexec/bin/python"
    assert program("/usr/bin/python3") == "/usr/bin/python3"


def test_paths_that_macos_protects_are_found(tmp_path, monkeypatch):
    kept, moved = tmp_path / "Documents/model", tmp_path / "models"
    cloud = tmp_path / "Library/Mobile Documents/com~apple~CloudDocs/v.npz"
    kept.mkdir(parents=True)
    moved.symlink_to(kept.parent)
    program = str(tmp_path / "Documents/clone/.venv/bin/python")
    monkeypatch.setattr(sys, "executable", program)
    safe = [str(tmp_path / name) for name in ("Models", "Documents and more")]
    paths = [str(kept), str(moved / "model"), str(cloud), "/Volumes/Disk/model"]
    arguments = ["-m", "Documents/model", *safe, *paths]
    made = launch_agent.agent(arguments, home=tmp_path)
    assert launch_agent.protected(made, home=tmp_path) == [program, *paths]


def test_a_text_that_no_property_list_holds_is_refused(tmp_path):
    with pytest.raises(InputError, match="property list"):
        launch_agent.agent(["-m", "a\0b"], home=tmp_path)


def test_installing_replaces_and_uninstalling_removes(tmp_path, launchctl):
    made = launch_agent.agent(["-m", "demo"], home=tmp_path)
    file = launch_agent.install(made, home=tmp_path)
    assert file.read_bytes() == made and stat.S_IMODE(file.stat().st_mode) == 0o644
    domain = f"gui/{os.getuid()}"
    service = f"{domain}/{launch_agent.LABEL}"
    once = [f"bootout {service}", f"print {service}", f"bootstrap {domain} {file}"]
    assert launchctl() == once
    (tmp_path / "ending").touch()  # the old one takes a moment to end
    launch_agent.install(made, home=tmp_path)
    assert launchctl() == [*once, once[0], once[1], once[1], once[2]]
    assert launch_agent.uninstall(home=tmp_path) is True
    assert not file.exists() and launchctl()[-2].startswith("bootout")
    assert launch_agent.uninstall(home=tmp_path) is False


def test_what_launchd_says_is_told(tmp_path, launchctl, monkeypatch):
    monkeypatch.setenv("FAILING", "bootstrap")
    with pytest.raises(DenseSteerError, match="Load failed: 5"):
        launch_agent.install(launch_agent.agent([], home=tmp_path), home=tmp_path)


def other_vector(folder):
    meta = VectorMeta(model="other", hidden_size=8, layer_count=2)
    return SteeringVector({1: np.ones(8)}, meta).save(folder / "other.npz")


@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac this would install it")
def test_elsewhere_the_command_prints_the_agent(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "key").write_text("k" * 20)
    arguments = ["serve", "-m", "demo", "--vectors", "vectors", "--api-key-file", "key", "--port", "9000",
                 "-s", "2.5", "--allow-host", "mac.local", "--install-agent"]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    given = plistlib.loads(done.stdout.encode())["ProgramArguments"][4:]
    assert given == [
        "--model", "demo", "--vectors", str(tmp_path / "vectors"), "--strength", "2.5", "--port", "9000",
        "--api-key-file", str(tmp_path / "key"), "--allow-host", "mac.local",
    ]  # fmt: skip
    assert "k" * 20 not in done.stdout and "Library/LaunchAgents" in done.stderr
    assert "warning" not in done.stderr
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Desktop").mkdir()
    done = CliRunner().invoke(main, [*arguments[:4], "Desktop", "--install-agent"])
    assert f"may not let an agent read {tmp_path}/Desktop." in " ".join(done.stderr.split())
    done = CliRunner().invoke(main, ["serve", "-m", "demo", "--vectors", "demo", "--install-agent"])
    assert plistlib.loads(done.stdout.encode())["ProgramArguments"][4:] == [
        "--model", "demo", "--vectors", str(tmp_path / "demo"),
    ]  # fmt: skip
    for option, amount in (("--kl", "0.1234567nats"), ("--strength", "12.34567%")):
        words = ["serve", "-m", "demo", "-v", "demo", option, amount, "--install-agent"]
        done = CliRunner().invoke(main, words)
        assert plistlib.loads(done.stdout.encode())["ProgramArguments"][-2:] == [option, amount]
    for wrong, words in ((["-m", "no/such/folder"], "no such folder"), (["-m", "demo", "--port", "0"], "clients know"),
                         (["-m", "demo", "-v", str(other_vector(tmp_path))], "hidden size")):  # fmt: skip
        done = CliRunner().invoke(main, ["serve", *wrong, "--install-agent"])
        assert done.exit_code and words in done.stderr and not done.stdout
    monkeypatch.setenv("DENSESTEER_API_KEY", "x" * 20)
    done = CliRunner().invoke(main, ["serve", "-m", "demo", "--install-agent"])
    assert done.exit_code == 2 and "--api-key-file" in done.stderr
    done = CliRunner().invoke(main, ["serve", "--uninstall-agent"])
    assert done.exit_code == 1 and "only macOS" in done.stderr
