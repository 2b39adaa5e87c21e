"""The documentation is true: its commands parse, its code runs, its files exist."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import mlx_densesteer
from mlx_densesteer.cli import main
from mlx_densesteer.evaluation.intervals import paired_difference, wilson

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_densesteer"
PICTURES = ROOT / "docs" / "pictures"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "CHANGELOG.md",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def shell_blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return for each block of shell commands why it is not run ("" if it is), itself, and what it shows."""
    found = re.findall(
        r"(?:<!-- not run: ([^\n]+?) -->\n)? *```(sh|py)\n(.*?)```(?:\n\n```text\n(.*?)```)?",
        page.read_text("utf-8"),
        re.DOTALL,
    )
    assert all(why or language == "sh" for why, language, _, _ in found), page
    return [(why, code, shown) for why, _, code, shown in found]


RUN = [page for page in PAGES if any(not why for why, _, _ in shell_blocks(page))]


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


def test_the_readme_shows_commands_and_fits_two_screens():
    assert len(commands()) >= 4
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


def without_figures(text: str) -> list[str]:
    """Return the words of each line; those of tables without figures, which differ between processors."""
    return [
        (
            line if "=" in line or line.startswith("#") else re.sub(r"[-+]?\d[\d.,]*%?", "#", line)
        ).split()
        for line in text.splitlines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_shell_commands_shown_run_and_print_what_is_shown(page, tmp_path):
    """In one folder, as a reader runs them; a block that is not run says why."""
    binary = tmp_path / "bin"
    binary.mkdir()
    (binary / "densesteer").symlink_to(Path(sys.executable).parent / "densesteer")
    environment = os.environ | {"PATH": f"{binary}:{os.environ['PATH']}", "COLUMNS": "120"}
    folder = tmp_path / "reader"
    folder.mkdir()
    for why, code, shown in shell_blocks(page):
        if why:
            continue
        done = subprocess.run(
            ["bash", "-ec", "set -o pipefail\n" + code],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}"
        printed = without_figures(done.stdout)
        for line in without_figures(shown):
            assert line in [*printed, [], ["..."]], f"{' '.join(line)!r} is not in\n{done.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_shown_runs(page, hf_folder, make_vector, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_folder, tmp_path / "converted/Qwen2.5-1.5B-Instruct-4bit")
    make_vector().save(tmp_path / "dense.npz")
    for code in blocks(page, "python"):
        # the tiny model has 4 layers and never stops by itself
        code = re.sub(r"(= Session\(.*)\)", r"\1, max_tokens=4)", code)
        code = code.replace("layers=(14,)", "layers=(2,)").replace(
            "steering=steering)", "steering=steering, max_tokens=4)"
        )
        exec(compile(code, f"{page.name} (shown code)", "exec"), {})
        assert ("print(" in code) == bool(capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_that_are_named_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"\]\(((?!https?:)[^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`((?:mlx_densesteer|scripts|tests|benchmarks|docs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


def test_the_map_and_its_picture_are_complete():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    picture = (PICTURES / "rooms.svg").read_text("utf-8")
    table = "".join(line for line in page.splitlines() if line.startswith("| `"))
    for path in PACKAGE.glob("[!_]*.py"):
        assert f"`{path.name}`" in table and re.search(rf"\b{path.name}\b", picture), path
    for room in (path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        assert f"`{room}/`" in table and f">{room}<" in picture, room


def test_every_picture_is_shown_and_small():
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8"))
    }
    assert shown == {path.resolve() for path in PICTURES.iterdir()}
    for path in shown:
        assert 0 < path.stat().st_size < 500_000, path


def test_the_api_page_has_every_public_name():
    named = re.findall(
        r"^::: mlx_densesteer\.(\w+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.M
    )
    assert sorted(named) == mlx_densesteer.__all__


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere():
    """Broken links and anchors, and docstrings that do not fit their functions, are errors."""
    built = subprocess.run(
        [sys.executable, ROOT / "scripts" / "site"], capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    site = Path(built.stdout.strip()).parent
    pages = list(site.glob("*.html"))
    assert {path.stem for path in pages} >= {path.stem for path in (ROOT / "docs").glob("*.md")}
    for path in pages:
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="?(https?://[^">]+)',
            path.read_text("utf-8"),
        )
        assert not loaded, path


RESULTS = ROOT / "docs" / "results"
CONDITIONS = {
    "unsteered": "unsteered",
    "steered": "steered",
    "prefix": "prefix `First, we`",
    "instruction": "instruction",
}


def test_the_main_tests_table_is_that_of_its_published_answers():
    with gzip.open(
        RESULTS / "eval-coder-1.5b-brief-gsm8k-test-answers.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        answers = [json.loads(line) for line in file]
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    table = page.split("## The main test")[1]
    right: dict[str, list[bool]] = {}
    for condition, label in CONDITIONS.items():
        rows = [row for row in answers if row["condition"] == condition]
        assert [row["problem"] for row in rows] == [*range(261, 461)]
        right[condition] = [row["correct"] for row in rows]
        correct = sum(right[condition])
        accuracy = (correct / 200, *wilson(correct, 200))
        steps, tokens = (sum(row[name] for row in rows) / 200 for name in ("steps", "tokens"))
        percent = [f"{100 * value:.1f}" for value in accuracy]
        shown = f"{percent[0]} % [{percent[1]}, {percent[2]}]"
        cut = sum(row["finish_reason"] == "length" for row in rows)
        code = sum("```" in row["text"] for row in rows)
        line = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
        cells = [cell.split(" [")[0].strip() for cell in line.split("|")[3:-1]]
        assert f"| {label} | {shown} | " in line
        assert cells == [
            f"{steps:.1f}",
            f"{tokens:.0f}",
            f"{tokens / steps:.1f}",
            f"{cut}",
            f"{code}",
        ]
        assert f"| {shown} | {steps:.1f} | {tokens:.0f} | {tokens / steps:.1f} |" in readme
    for one, other in [("steered", "unsteered"), ("steered", "prefix"), ("steered", "instruction")]:
        pairs = [*zip(right[one], right[other], strict=True)]
        won, lost = pairs.count((True, False)), pairs.count((False, True))
        low, high = (100 * end for end in paired_difference(won, lost, 200))
        difference = f"{(won - lost) / 2:+.1f} [{low:.1f}, {high:.1f}]"
        assert f"{difference}, won {won}, lost {lost}, p = " in table and difference in readme


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
