import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_densesteer

PACKAGE = Path(mlx_densesteer.__file__).parent

# From the ground up: a file imports from its own room and from the rooms before it.
ROOMS = [
    "_version",
    "text",
    "errors",
    "files",
    "demo",
    "steering",
    "model",
    "generation",
    "evaluation",
    "extraction",
    "export",
    "distributed",
    "server",
    "bench",
    "chat",
    "cli",
    "__main__",
    "__init__",
]


def test_rooms_import_downwards_only():
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = here[: len(here) - node.level]
                names = (
                    (node.module or "").split(".") if node.module else [a.name for a in node.names]
                )
                for room in [base[0]] if base else names[:1] if node.module else names:
                    if room in ROOMS:
                        assert ROOMS.index(room) <= ROOMS.index(here[0]), f"{path} imports {room}"


def test_public_names():
    for name in mlx_densesteer.__all__:
        assert getattr(mlx_densesteer, name).__name__ == name
        assert getattr(mlx_densesteer, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlx_densesteer.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["stream", "generate", "import_vector"])
def test_no_room_hides_a_function_whatever_is_used_first(first):
    code = (
        f"import mlx_densesteer as ds, types; ds.{first}\n"
        "import mlx_densesteer.generation.batch, mlx_densesteer.extraction.extract\n"
        "import mlx_densesteer.model.convert, mlx_densesteer.evaluation.sweep, mlx_densesteer.export.bake\n"
        "assert not any(isinstance(getattr(ds, n), types.ModuleType) for n in ds.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_vector_needs_neither_mlx_nor_transformers():
    code = (
        "import sys, mlx_densesteer as ds; ds.SteeringVector, ds.Steering, ds.DenseSteerError\n"
        "assert not {'mlx', 'mlx_lm', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
