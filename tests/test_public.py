import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_densesteer

PACKAGE = Path(mlx_densesteer.__file__).parent

# Rooms from the ground up: a file imports only from lines above its own.
ROOMS = [
    {
        "_version",
        "errors",
        "extras",
        "density",
        "intervals",
        "quantities",
        "demo",
        "demo.problems",
        "demo.settings",
        "directions",
        "rewriting.draft",
    },
    {"ranks"},
    {
        "archive",
        "atomic",
        "model_folder",
        "journal",
        "jsonl",
        "token_tree",
        "data_hub",
        "equivalence",
        "recommendation",
        "scoring",
        "rewriting",
        "rewriting.instruction",
        "rewriting.transport",
        "brake",
        "stopping",
    },
    {"grading", "model_thread", "partial_answer"},
    {"launch_agent"},
    {"hub", "vector", "pairs", "tasks", "plot"},
    {"interop.foreign", "interop.gguf_package"},
    {"interop.control_vector", "interop.pt", "interop.safetensors_vector", "interop.gguf_model"},
    {"interop", "steering", "verification", "combination"},
    {"cache", "speculation", "defaults"},
    {"patch", "chunks"},
    {"self_check", "model", "record", "prompt", "likelihood", "prefix", "pipeline_prefix"},
    {"export", "export.step"},
    {
        "conversion",
        "doctor",
        "dose",
        "extraction",
        "generation",
        "steered_likelihood",
        "sharding",
        "prefix_file",
    },
    {"export.closeness", "export.function", "export.llama"},
    {"export.card", "export.llama_gguf"},
    {"export.baking"},
    {"batch_row", "conversation", "reply"},
    {"batch", "session_file"},
    {
        "answering",
        "rewriting.file",
        "rewriting.model",
        "rewriting.openai",
        "rewriting.rules",
        "session",
    },
    {"evaluation", "grid", "pair_files"},
    {"solving", "harness"},
    # the server
    {
        "server",
        "server.faults",
        "server.settings",
        "server.within",
        "server.norms",
        "server.prompt_cache",
        "server.replies",
    },
    {"server.wire", "server.guard", "server.body", "server.shelf"},
    {"server.model_name"},
    {"server.description", "server.encoding", "server.wanted"},
    {"server.job"},
    {"server.overview", "server.worker"},
    {"server.engine"},
    {"server.answers", "server.listening"},
    {"server.app"},
    {"server.starting"},
    {"cli.completers", "cli.completion", "cli.output", "cli.tables"},
    {"cli.options"},
    {"cli.progress", "cli.steer"},
    {"cli.agent", "cli.speculate", "cli.spread"},
    # the terminal chat
    {
        "chat",
        "chat.blocks",
        "chat.commands",
        "chat.dial",
        "chat.painter",
        "chat.printable",
        "chat.rows",
        "chat.state",
    },
    {"chat.keyboard", "chat.markdown", "chat.status", "chat.tables"},
    {"chat.actions", "chat.screen", "chat.terminal_keyboard"},
    {"chat.loop", "chat.terminal_screen"},
    # the benchmarks
    {"bench", "bench.oracle", "bench.report", "bench.subject", "bench.timing", "bench.clients"},
    {"bench.servers", "bench.hostile"},
    {"bench.solo"},
    {"bench.soak_clients"},
    {
        "bench.serve",
        "bench.soak",
        "bench.alone",
        "bench.batch",
        "bench.decode",
        "bench.dose",
        "bench.extract",
        "bench.function",
        "bench.generation",
        "bench.resteer",
        "bench.speculative",
        "bench.startup",
        "bench.sweep",
    },
    {"bench.suite"},
    {
        "cli.bake",
        "cli.bench",
        "cli.chat",
        "cli.convert",
        "cli.demo",
        "cli.doctor",
        "cli.eval",
        "cli.export_function",
        "cli.extract",
        "cli.generate",
        "cli.pairs",
        "cli.serve",
        "cli.vector",
    },
    {"cli.sweep"},
    {"cli"},
    {"__main__", "__init__"},
]


def test_public_names():
    assert mlx_densesteer.__all__ == [
        "Batch", "Brake", "DenseSteerError", "Draft", "Generation", "ModelThread", "Pair", "Sampling", "Session", "Steering", "SteeringVector", "VectorMeta", "bake", "convert",
        "evaluate", "export_function", "export_vector", "extract", "generate", "generate_batch", "import_vector", "load", "make_cache", "stream", "sweep",
    ]  # fmt: skip
    for name in mlx_densesteer.__all__:
        assert getattr(mlx_densesteer, name).__name__ == name
        assert getattr(mlx_densesteer, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlx_densesteer.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["stream", "generate", "import_vector"])
def test_no_module_hides_a_function_whatever_is_used_first(first):
    code = (
        f"import mlx_densesteer as ds, types; ds.{first}\n"
        "import mlx_densesteer.generation, mlx_densesteer.conversion, mlx_densesteer.extraction\n"
        "import mlx_densesteer.evaluation, mlx_densesteer.grid, mlx_densesteer.batch\n"
        "assert not any(isinstance(getattr(ds, n), types.ModuleType) for n in ds.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_vector_needs_neither_mlx_nor_transformers():
    code = (
        "import sys, mlx_densesteer as ds; ds.SteeringVector, ds.Steering, ds.DenseSteerError\n"
        "assert not {'mlx', 'mlx_lm', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Modules of ours that a module imports anywhere in it, type checking aside."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    if name == "__init__":
        package = []
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if node.module and target in modules():
                found.add(target)
            found |= {
                f"{target}.{a.name}".strip(".")
                for a in node.names
                if f"{target}.{a.name}".strip(".") in modules()
            }
    return found


def test_no_file_imports_upwards():
    level = {name: number for number, room in enumerate(ROOMS) for name in room}
    assert set(level) == set(modules()), "a module has no room: add it to ROOMS where it belongs"
    for name, path in modules().items():
        for other in imported(name, path):
            assert level[other] < level[name], f"{name} imports {other}, which is not below it"


def test_modules_stay_small():
    for name, path in modules().items():
        assert len(path.read_text("utf-8").splitlines()) <= 320, name
