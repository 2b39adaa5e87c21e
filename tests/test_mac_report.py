"""The report of scripts/mac-report: complete, with what failed, and with nothing private in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "scripts"))

import mac_report


@pytest.fixture
def anna(monkeypatch):
    """Give this machine a user and a name."""
    monkeypatch.setattr(mac_report.getpass, "getuser", lambda: "anna")
    monkeypatch.setattr(mac_report.platform, "node", lambda: "Annas-Mini.local")
    monkeypatch.setattr(mac_report.Path, "home", lambda: Path("/Users/anna"))


@pytest.mark.parametrize(
    ("private", "shown"),
    [
        ("ok  python  3.13.1 (/Users/anna/My Clone/.venv/bin/python)", "ok  python  3.13.1 (python)"),
        ("/Users/anna/My Clone/tests/x.py:3: in f", "./tests/x.py:3: in f"),
        ("$ densesteer bench -m /Users/anna/Models/Q-4bit", "$ densesteer bench -m Q-4bit"),
        ("'/Users/anna/secret/a.txt', /Users/anna", "'(path)', (path)"),
        ("/Volumes/Annas Disk/x", "(path) Disk/x"),
        ("/private/var/folders/zz/T/pytest-of-anna/pytest-0", "(path)"),
        ("pytest-of-anna on Annas-Mini, annas-mini.local", "pytest-of-USER on HOST, HOST"),
        ("bananas, joanna, annal", "bananas, joanna, annal"),
    ],
)  # fmt: skip
def test_nothing_private_is_left(anna, private, shown):
    known = {
        "/Users/anna/My Clone": ".", "/Users/anna/My Clone/.venv/bin/python": "python",
        "/Users/anna/Models/Q-4bit": "Q-4bit",
    }  # fmt: skip
    assert mac_report.scrub(private, known) == shown


def test_a_report_tells_what_failed_and_goes_on(anna, monkeypatch, tmp_path, capfd):
    code = "import sys; print('at ' + '/Users/anna/x' + ' ```'); sys.exit(3)"
    long = f"print('first'); print('x' * {mac_report.LONGEST})"
    made = [
        mac_report.Part("Tests", [sys.executable, "-c", code]),
        mac_report.Part("Speed", [sys.executable, "-c", long]),
        mac_report.Part("A real model", reason="could not be fetched"),
    ]
    monkeypatch.setattr(mac_report, "parts", lambda model, **options: made)
    monkeypatch.setattr(mac_report, "FILE", tmp_path / "report.md")
    monkeypatch.setattr(sys, "argv", ["mac-report", "--quick"])
    with pytest.raises(SystemExit) as end:
        mac_report.main()
    assert end.value.code == 1
    out, shown = capfd.readouterr()
    assert (
        out == f"{tmp_path}/report.md\n" and "at /Users/anna/x" in shown
    )  # to the person, as it comes
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| Tests \| \*\*exit status 3\*\* \| 0\.\d \|$", text, re.M)
    assert "| Speed | passed |" in text and "| A real model | not run |" in text
    assert "at (path) '''\n" in text and "anna" not in text
    assert "first" not in text and "(the beginning was cut off)" in text
    assert text.count("```text") == text.count("```") / 2 == 3
    assert sys.platform == "darwin" or "which is no Mac" in text


def test_its_parts():
    titles = [part.title for part in mac_report.parts("/m/Q-4bit", every=False, quick=False)]
    assert titles == [
        "Environment", "Tests", "Speed against stock mlx-lm: the demo", "Texts that should be equal: the demo",
        "Speed against stock mlx-lm: Q-4bit", "Texts that should be equal: Q-4bit",
    ]  # fmt: skip
    assert mac_report.parts(None, every=False, quick=False)[-1].reason
    assert "--all" in mac_report.parts(None, every=True, quick=False)[1].command
    for room in mac_report.ROOMS:
        assert (ROOT / room).exists()


@pytest.mark.slow
def test_the_script_runs_here():
    done = subprocess.run(
        [ROOT / "scripts/mac-report", "--quick"], capture_output=True, text=True, timeout=600,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    text = Path(done.stdout.strip()).read_text()
    assert text.count("| passed |") == 4 and " passed in " in text
    assert "decode" in text and "rows of a batch are answers by themselves  yes" in text
    assert str(ROOT) not in text
