"""The documentation is true: its commands parse, its code runs, its files exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mlx_densesteer.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "CHANGELOG.md",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh")
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    return [line for line in lines if line.startswith("densesteer ") and "COMMAND" not in line]


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_is_one_that_exists(line, monkeypatch):
    """Parses it as the command line would, and runs nothing."""
    monkeypatch.setattr("mlx_densesteer.model.config.local_folder", lambda _: None)
    command: click.Command = main
    words = shlex.split(line, comments=True)[1:]
    context = click.Context(main)
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
    try:
        command.make_context(command.name, words)
    except click.BadParameter as error:
        assert "does not exist" in str(error)  # its files are examples


def test_the_readme_shows_commands():
    assert len(commands()) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_shown_runs(page, hf_folder, make_vector, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_folder, tmp_path / "converted/Qwen2.5-1.5B-Instruct-4bit")
    make_vector().save(tmp_path / "dense.npz")
    for code in blocks(page, "python"):
        # the tiny model has 4 layers and never stops by itself
        code = code.replace("layers=(14,)", "layers=(2,)").replace(
            "steering=steering)", "steering=steering, max_tokens=4)"
        )
        exec(compile(code, f"{page.name} (shown code)", "exec"), {})
        assert ("print(" in code) == bool(capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_that_are_named_exist(page):
    text = page.read_text("utf-8")
    names = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    names += re.findall(r"`((?:mlx_densesteer|scripts|tests|benchmarks|docs)/[\w./-]*)`", text)
    for name in names:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_the_map_of_the_readme_is_complete():
    readme = (ROOT / "README.md").read_text("utf-8")
    package = ROOT / "mlx_densesteer"
    for path in [
        *package.glob("[!_]*.py"),
        *(p for p in package.iterdir() if (p / "__init__.py").exists()),
    ]:
        assert path.name in readme, f"{path.name} is missing from the map"


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"\b[A-Z]+_TABLE\b|\bOVERDOSE\b", page.read_text("utf-8")), page


def test_the_changelog_and_the_help_name_every_command():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for name in main.commands:
        assert f"densesteer {name}" in changelog


def test_the_command_reference_is_that_of_the_commands():
    script = ROOT / "scripts" / "make-command-reference"
    environment = os.environ | {"COLUMNS": "40"}
    subprocess.run([sys.executable, script, "--check"], check=True, timeout=60, env=environment)
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    manual = (ROOT / "docs" / "densesteer.1").read_text("utf-8")
    for name in main.commands:
        assert f"\n## densesteer {name}\n" in page
        dashed = name.replace("-", "\\-")
        assert f"\n.SS densesteer {dashed}\n" in manual
