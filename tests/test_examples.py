"""Every example is run, as its user would run it, with the demo model."""

import importlib.util
import json
import os
import plistlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from server_process import server_process

from mlx_densesteer import Steering, SteeringVector, demo, generate, load

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WORKFLOW = "automator/Solve Densely.workflow/Contents"

TESTS = {
    "asyncio_stream.py": "test_an_asyncio_program",
    "dense-filter": "test_the_filter_solves",
    "library_call.py": "test_a_library_call",
    "menubar.py": "test_the_menu_bar",
    "raycast/solve-densely.sh": "test_the_raycast_command",
    "settings.py": "test_the_python_examples_take_the_same_settings",
    "shortcuts/solve-densely.sh": "test_the_shortcuts_action",
    "streaming_callback.py": "test_a_streaming_callback",
    f"{WORKFLOW}/Info.plist": "test_the_service_is_in_the_menu",
    f"{WORKFLOW}/document.wflow": "test_the_service_runs",
}
QUESTION = "Mia has 7 bags with 4 nuts in each. Later Mia finds 6. How many nuts does Mia have now?"
ODD = "-m \"9\" 'x' $(touch pwned) `touch pwned` \\n \\ %s é 漢 \u2028\n\n  two lines "


def examples() -> list[str]:
    """Every file; those in C++ have tests of their own."""
    files = [path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("[!.]*") if path.is_file()]
    return sorted(str(f) for f in files if f.parts[0] not in ("cpp", "__pycache__"))


def need(tool: str) -> str:
    """Return a tool's path; in CI it must be there."""
    found = shutil.which(tool)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {tool} here")
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home folder with the filter where docs/embedding.md puts it, and our densesteer."""
    home = tmp_path_factory.mktemp("home")
    commands = home / ".local/bin"
    commands.mkdir(parents=True)
    (commands / "dense-filter").symlink_to(EXAMPLES / "dense-filter")
    (commands / "densesteer").symlink_to(Path(sys.executable).with_name("densesteer"))
    return home


@pytest.fixture(scope="module")
def run(home):
    """Run a command as a menu would: the system's PATH, no settings, no server."""

    def run(*command: str | Path, text: str = "", code: int = 0, **settings: str):
        ours = ("PYTHONPATH", "LD_PRELOAD", "OPENBLAS_CORETYPE")  # where the package is, and speed
        kept = {name: os.environ[name] for name in ours if name in os.environ}
        environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "DENSESTEER_SERVER": "", **kept}
        done = subprocess.run(
            [str(word) for word in command], input=text.encode(), capture_output=True, timeout=120,
            env=environment | settings, cwd=home,
        )  # fmt: skip
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a Python example in this process, which has mlx already: standard output, and the error."""
    before = signal.getsignal(signal.SIGPIPE)

    def run_here(name: str, *words: str, **settings: str) -> tuple[str, str | None]:
        with monkeypatch.context() as here:
            for variable in ("MODEL", "VECTOR", "STRENGTH", "LAYER"):
                here.delenv(f"DENSESTEER_{variable}", raising=False)
            for variable, value in settings.items():
                here.setenv(variable, value)
            here.setattr(sys, "argv", [f"{name}.py", *words])
            here.syspath_prepend(EXAMPLES)
            here.delitem(sys.modules, "settings", raising=False)
            error = None
            try:
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            except SystemExit as end:
                error = end.code
        return capsys.readouterr().out, error

    yield run_here
    sys.modules.pop("settings", None)
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture(scope="module")
def solved() -> dict[float, str]:
    """The answers to QUESTION by strength, from the library."""
    model, tokenizer = load("demo")
    vector = SteeringVector.load(demo.VECTOR)
    return {
        strength: generate(
            model, tokenizer, QUESTION, steering=Steering(vector, strength, (5,)), max_tokens=400
        ).text
        for strength in (-7.13, 0.0, 4.76)
    }


@pytest.mark.parametrize("name", examples())
def test_every_example_has_a_test_and_a_place_in_the_documentation(name):
    assert callable(globals()[TESTS[name]])
    place = name.partition("/Contents/")[0]  # a bundle is one thing
    assert f"`examples/{place}`" in (ROOT / "docs/embedding.md").read_text("utf-8")


def test_no_example_is_missing():
    assert set(TESTS) == set(examples())


# Python


def test_a_library_call(run, solved):
    done = run(sys.executable, EXAMPLES / "library_call.py")
    assert done.stdout == solved[4.76] + "\n" and "stop" in done.stderr


def test_a_streaming_callback(run, solved):
    done = run(sys.executable, EXAMPLES / "streaming_callback.py")
    first, more, _ = solved[-7.13].partition("\n\n")
    assert more and done.stdout == first + "\n" and "interrupted" in done.stderr


def test_an_asyncio_program(run, solved):
    done = run(sys.executable, EXAMPLES / "asyncio_stream.py")
    assert done.stdout == 2 * (solved[4.76] + "\n")
    assert int(re.search(r"ticked (\d+) times", done.stderr)[1]) > 0
    assert "given up" in done.stderr


PROGRAMS = ["library_call", "streaming_callback", "asyncio_stream"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_python_examples_take_the_same_settings(run_here, solved, name):
    """Empty is unset; an empty vector is the stock model; "demo" is the embedded one."""
    empty = dict.fromkeys(("DENSESTEER_MODEL", "DENSESTEER_LAYER", "DENSESTEER_STRENGTH"), "")

    def said(**settings):
        answer = solved[settings.pop("is_answer")]
        if name == "streaming_callback":
            answer = answer.partition("\n\n")[0]
        expected = (answer + "\n") * (1 + (name == PROGRAMS[2]))
        return run_here(name, QUESTION, **settings) == (expected, None)

    assert said(DENSESTEER_VECTOR="", is_answer=0.0, **empty)
    assert said(DENSESTEER_VECTOR="demo", DENSESTEER_STRENGTH="-7.13", is_answer=-7.13)
    assert said(DENSESTEER_STRENGTH="20%", is_answer=4.76)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("setting", "error"), [
    ("STRENGTH=abc", "strength 'abc': expected a number such as 1.5"),
    ("STRENGTH=nan", "strength 'nan': expected a number such as 1.5"),
    ("STRENGTH=0,5", "strength '0,5': expected a number such as 1.5"),
    ("LAYER=4,5", "DENSESTEER_LAYER=4,5: expected a whole number, such as 14."),
])  # fmt: skip
def test_a_wrong_setting_is_named(run_here, name, setting, error):
    variable, _, value = f"DENSESTEER_{setting}".partition("=")
    shown, told = run_here(name, **{variable: value})
    assert shown == "" and told.startswith(f"{name}: {error}") and "\n" not in told


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_wrong_takes_one_line(run, run_here, name):
    for words, settings, error in (
        ([""], {}, "the prompt is empty"),
        ([], {"DENSESTEER_VECTOR": "nowhere.npz"}, "nowhere.npz: no such file"),
    ):
        shown, told = run_here(name, *words, **settings)
        assert shown == "" and told.startswith(f"{name}: {error}") and "\n" not in told
    done = run(sys.executable, EXAMPLES / f"{name}.py", code=1, DENSESTEER_MODEL="/nowhere")
    assert done.stdout == "" and done.stderr.startswith(f"{name}: /nowhere: no such folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reader_is_gone(name):
    """As in `... | head`, but the reader is gone before the first piece."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE and b"Error" not in done.stderr


# The filter


def test_the_filter_solves(run, home, solved):
    done = run(EXAMPLES / "dense-filter", text=QUESTION)
    assert done.stdout == solved[4.76] + "\n" and "20% of the residual stream" in done.stderr
    done = run(EXAMPLES / "dense-filter", "-n", "3", "--json", text=ODD, DENSESTEER_VECTOR="")
    assert json.loads(done.stdout)["tokens"] == 3
    assert not (home / "pwned").exists()


def test_the_filter_fails_as_a_filter_does(run, home):
    done = run(EXAMPLES / "dense-filter", code=1)
    assert done.stdout == "" and "the prompt is empty" in done.stderr
    done = run(EXAMPLES / "dense-filter", text=QUESTION, code=127, DENSESTEER="no-such-command")
    assert done.stdout == "" and "no no-such-command in /usr/bin" in done.stderr


def test_the_filter_asks_a_server_that_has_the_model(run, home, solved):
    need("curl")
    need("jq")
    with server_process() as server:
        settings = {"DENSESTEER_SERVER": server.url, "DENSESTEER": "no-such-command"}

        def ask(text=QUESTION, **more):
            return run(EXAMPLES / "dense-filter", text=text, **settings | more)

        assert ask().stdout == solved[4.76] + "\n"
        assert ask(http_proxy="http://127.0.0.1:9").stdout == solved[4.76] + "\n"
        assert ask(DENSESTEER_STRENGTH="-7.13").stdout == solved[-7.13] + "\n"
        assert ask(DENSESTEER_STRENGTH="4.76", DENSESTEER_LAYER="5").stdout == solved[4.76] + "\n"
        for dose in ("20%", "20 %"):
            assert ask(DENSESTEER_STRENGTH=dose).stdout == solved[4.76] + "\n"
        assert ask(DENSESTEER_VECTOR="").stdout == solved[0.0] + "\n"
        assert ask(ODD).stdout

        refused = ask("", code=1)  # what the server says, and nothing on standard output
        assert refused.stdout == "" and "dense-filter: no message of the user" in refused.stderr
        for ending in ("/", "/v1", "/v1/"):
            assert ask(DENSESTEER_SERVER=server.url + ending).stdout == solved[4.76] + "\n"
        begun = ask("Mia has 7 bags").stdout  # one newline is no part of it, as in the command
        assert begun == ask("Mia has 7 bags\n").stdout == ask("Mia has 7 bags\r\n").stdout
        assert begun != ask("Mia has 7 bags\n\n").stdout

        for other in ({"DENSESTEER_MODEL": "converted/other"}, {"DENSESTEER_VECTOR": "other.npz"}):
            said = ask(code=127, **other).stderr  # the command is for those, and the user knows
            assert "no no-such-command" in said and "no server with" in said
            assert f" at {server.url}: running the command." in said
        for setting in (
            "LAYER=4,5",
            "LAYER=all",
            "LAYER=3-5",
            "VECTOR= LAYER=5",
            "VECTOR= STRENGTH=1",
            "STRENGTH=0.1nats",
        ):
            more = dict(f"DENSESTEER_{one}".split("=") for one in setting.split(" "))
            assert "no no-such-command" in ask(code=127, **more).stderr  # and for these
    assert not (home / "pwned").exists()


def test_the_filter_goes_on_without_a_server(run, solved):
    need("curl")
    need("jq")
    done = run(EXAMPLES / "dense-filter", text=QUESTION, DENSESTEER_SERVER="http://127.0.0.1:9/v1")
    assert done.stdout == solved[4.76] + "\n"
    assert done.stderr.startswith(
        "dense-filter: no server with the model demo and the vector demo at http://127.0.0.1:9: "
        "running the command.\n"
    )


@pytest.fixture
def command(run, tmp_path):
    """Return what the filter runs, as a list of words: a command stands in that prints its own."""
    printer = tmp_path / "printer"
    printer.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    printer.chmod(0o755)

    def command(*words, script=EXAMPLES / "dense-filter", **settings):
        settings = {f"DENSESTEER_{name}": value for name, value in settings.items()}
        done = run(script, *words, DENSESTEER=str(printer), **settings)
        assert not done.stderr
        return done.stdout.split()

    return command


def test_an_argument_takes_the_place_of_the_settings(command):
    """-l may be given twice, and then both layers are steered; a vector has a strength of its own."""
    mine = {"VECTOR": "mine.npz", "LAYER": "4", "STRENGTH": "-2.5e0"}
    base, vector = ["generate", "-m", "demo"], ["-v", "mine.npz"]
    layer, strength = ["-l", "4"], ["-s", "-2.5e0"]
    assert command(**mine) == [*base, *vector, *layer, *strength]
    for words in (["-l", "3"], ["-l3"], ["--layer", "3"], ["--layer=3"]):
        assert command(*words, **mine) == [*base, *vector, *strength, *words]
    for words in (
        ["-s", "1"],
        ["-s1"],
        ["--strength", "1"],
        ["--lambda=1"],
        ["--kl", "1"],
        ["--kl=1"],
    ):
        assert command(*words, **mine) == [*base, *vector, *layer, *words]
    for words in (["-v", "a"], ["-va"], ["--vector", "a"], ["--vector=a"]):
        assert command(*words, **mine) == [*base, *words]
    for words in (["--stop", "x", "--seed", "1"], ["--", "-l"]):
        assert command(*words, **mine) == [*base, *vector, *layer, *strength, *words]


@pytest.mark.parametrize("server", ["", "http://127.0.0.1:9"])
def test_the_filter_names_a_wrong_setting(run, command, server):
    for setting in ("STRENGTH=much", "STRENGTH=nan", "STRENGTH=inf", "STRENGTH=0,5", "STRENGTH=-",
                    "LAYER=x", "LAYER=-1", "LAYER=4,", "LAYER=1.5"):  # fmt: skip
        name, _, value = f"DENSESTEER_{setting}".partition("=")
        more = {name: value, "DENSESTEER_SERVER": server, "DENSESTEER": "no-such-command"}
        done = run(EXAMPLES / "dense-filter", text=QUESTION, code=2, **more)
        assert done.stdout == "" and done.stderr.count("\n") == 1
        expected = (
            "a strength, such as 20%, 1.5 or 0.1nats"
            if "STRENGTH" in name
            else "a layer, such as 14"
        )
        assert done.stderr.startswith(f"dense-filter: {name}={value}: expected {expected}")
    for strength in (
        "1",
        "-7.13",
        "+.5",
        "2.",
        "1e-2",
        "20%",
        "-10%",
        "20 %",
        "0.1nats",
        "-5e-2 nats",
    ):
        assert command(STRENGTH=strength)[-len(strength.split()) :] == strength.split()
    for layers in ("14", "4,5", "all", "3-5", "1,3-5"):
        assert command(LAYER=layers)[-1] == layers


def test_a_strength_without_a_vector_is_refused(run):
    done = run(EXAMPLES / "dense-filter", text=QUESTION, code=2, DENSESTEER_VECTOR="",
               DENSESTEER_STRENGTH="1")  # fmt: skip
    assert done.stdout == "" and "need a vector" in done.stderr


# The Mac's menus


@pytest.mark.parametrize("venv", [True, False])
def test_the_installation_as_it_is_printed(run, home, solved, tmp_path, venv):
    """Run in a clone with and without a .venv, the command being elsewhere in the second."""
    text = (ROOT / "docs/embedding.md").read_text("utf-8")
    (block,) = re.findall(r"^```sh\n(mkdir .*?)^```", text, re.DOTALL | re.MULTILINE)
    clone, mine = tmp_path / "clone", tmp_path / "home"
    for folder in (clone / "examples", clone / ".venv/bin", mine):
        folder.mkdir(parents=True)
    shutil.copy(EXAMPLES / "dense-filter", clone / "examples")
    link, densesteer = mine / ".local/bin/densesteer", home / ".local/bin/densesteer"
    if venv:
        (clone / ".venv/bin/densesteer").symlink_to(densesteer)
    path = "/usr/bin:/bin" if venv else f"/usr/bin:/bin:{densesteer.parent}"
    done = run("sh", "-euc", f"cd '{clone}'\n{block}", HOME=str(mine), PATH=path)
    assert done.stdout == solved[4.76] + "\n"
    assert link.is_symlink() == link.exists() == venv


@pytest.mark.parametrize("shell", ["sh", "zsh"])
def test_the_shortcuts_action(run, solved, shell):
    """Shortcuts has zsh chosen unless another shell is."""
    done = run(need(shell), EXAMPLES / "shortcuts/solve-densely.sh", text=QUESTION)
    assert done.stdout == solved[4.76] + "\n"


def test_the_raycast_command(run, command, home, solved):
    script = EXAMPLES / "raycast/solve-densely.sh"
    text = script.read_text("utf-8")
    header = dict(re.findall(r"^# @raycast\.(\w+) (.+)$", text, re.MULTILINE))
    assert header["schemaVersion"] == "1" and header["title"] == "Solve Densely"
    assert header["mode"] in ("fullOutput", "compact", "silent", "inline")
    problem, strength = (json.loads(header[f"argument{n}"]) for n in (1, 2))
    assert problem["type"] == strength["type"] == "text" and "optional" not in problem
    assert problem["placeholder"] and strength["placeholder"] and strength["optional"] is True
    assert text.startswith("#!") and os.access(script, os.X_OK) and ".template." not in script.name

    assert run(script, QUESTION).stdout == solved[4.76] + "\n"
    assert run(script, QUESTION, "-7,13").stdout == solved[-7.13] + "\n"
    default = ["generate", "-m", "demo", "-v", "demo"]
    assert command(QUESTION, script=script) == command(QUESTION, "", script=script) == default
    for strength, read in (("-7.13", "-7.13"), ("-7,13", "-7.13"), ("20%", "20%")):
        assert command(QUESTION, strength, script=script) == [*default, "-s", read]
    assert run(script, ODD).stdout and not (home / "pwned").exists()


def test_the_service_is_in_the_menu():
    (service,) = plistlib.loads((EXAMPLES / WORKFLOW / "Info.plist").read_bytes())["NSServices"]
    assert service["NSMenuItem"] == {"default": "Solve Densely"}
    assert service["NSMessage"] == "runWorkflowAsService"
    assert service["NSSendTypes"] == service["NSReturnTypes"] == ["public.utf8-plain-text"]


def test_the_service_runs(run, home, solved):
    document = plistlib.loads((EXAMPLES / WORKFLOW / "document.wflow").read_bytes())
    about = document["workflowMetaData"]
    assert about["workflowTypeIdentifier"] == "com.apple.Automator.servicesMenu"
    for way in ("Input", "Output"):
        assert about[f"service{way}TypeIdentifier"] == "com.apple.Automator.text"
    (action,) = (one["action"] for one in document["actions"])
    assert action["BundleIdentifier"] == "com.apple.RunShellScript"
    parameters = action["ActionParameters"]
    assert parameters["inputMethod"] == 0  # standard input
    shell = (parameters["shell"], "-c", parameters["COMMAND_STRING"])

    done = run(*shell, text=QUESTION)
    assert done.stdout == f"{QUESTION}\n\n{solved[4.76]}\n"
    assert run(*shell, text=QUESTION, code=127, DENSESTEER="no-such-command").stdout == ""


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh"])
def test_shells_can_read_the_scripts(shell):
    for name in ("dense-filter", "raycast/solve-densely.sh", "shortcuts/solve-densely.sh"):
        subprocess.run([need(shell), "-n", EXAMPLES / name], check=True, timeout=60)


# The menu bar, with a stand-in for rumps


class Rumps(types.ModuleType):
    """What the example uses of rumps 0.4, with its signatures; it notes what the user would see."""

    def __init__(self):
        super().__init__("rumps")
        self.alerts, self.windows, self.clicked, self.ended = [], [], 0, False
        rumps = self

        def on_the_main_thread():
            assert threading.current_thread() is threading.main_thread()

        class Shown:
            def __setattr__(self, name, value):
                if not name.startswith("_"):  # what is seen
                    on_the_main_thread()
                super().__setattr__(name, value)

        class App(Shown):
            def __init__(
                self, name, title=None, icon=None, template=None, menu=None, quit_button="Quit"
            ):
                self.title = title

        class MenuItem(Shown):
            def __init__(
                self, title, callback=None, key=None, icon=None, dimensions=None, template=None
            ):
                self.title, self.callback = title, callback

            def set_callback(self, callback, key=None):
                self.callback = callback

        class SliderMenuItem(Shown):
            def __init__(
                self, value=50, min_value=0, max_value=100, callback=None, dimensions=(180, 15)
            ):
                self.value, self.min_value, self.max_value = value, min_value, max_value
                self.callback = callback

        class Timer(Shown):
            def __init__(self, callback, interval):
                self.callback, self.alive = callback, False

            def start(self):
                self.alive = True

        class Window(Shown):
            def __init__(self, message="", title="", default_text="", ok=None, cancel=None,
                         dimensions=(320, 160), secure=False):  # fmt: skip
                self.message, self.text = message, default_text

            def run(self):
                on_the_main_thread()
                rumps.windows.append(self)
                return types.SimpleNamespace(clicked=rumps.clicked, text=self.text)

        for kind in (App, MenuItem, SliderMenuItem, Timer, Window):
            setattr(self, kind.__name__, kind)

    def alert(self, title=None, message="", ok=None, cancel=None, other=None, icon_path=None):
        self.alerts.append(message)

    def quit_application(self, sender=None):
        self.ended = True


@pytest.fixture
def menu_bar(monkeypatch, tmp_path):
    """Return a function that starts the example; the clipboard is a file."""
    clipboard = tmp_path / "clipboard"
    for name, command in (("pbpaste", f"cat '{clipboard}'"), ("pbcopy", f"cat >'{clipboard}'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    rumps = Rumps()
    monkeypatch.setitem(sys.modules, "rumps", rumps)
    started = []

    def start():
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.delitem(sys.modules, "settings", raising=False)
        spec = importlib.util.spec_from_file_location("menubar", EXAMPLES / "menubar.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        started.append(module.MenuBar())
        return started[-1], rumps, clipboard

    yield start
    for app in started:
        app._thread.shutdown()


def tick(app, until):
    """Be the main loop's timer."""
    deadline = time.monotonic() + 60
    while not until():
        assert app._timer.alive and time.monotonic() < deadline
        app._timer.callback(app._timer)
        time.sleep(0.005)


def test_the_menu_bar(menu_bar, solved):
    app, rumps, clipboard = menu_bar()
    assert app.solve_item.callback is None  # the model is not there yet
    tick(app, lambda: app.solve_item.callback)
    assert (app.slider.min_value, app.slider.max_value) == (-40, 40)

    def ask(dose):
        app.slider.value = dose
        app.slider.callback(app.slider)
        clipboard.write_text(QUESTION, "utf-8")
        before = len(rumps.windows)
        app.solve_item.callback(app.solve_item)
        assert app.solve_item.callback is None and app.stop_item.callback  # one at a time
        tick(app, lambda: len(rumps.windows) > before)
        assert app.solve_item.callback and app.stop_item.callback is None
        return rumps.windows[-1]

    assert ask(20.2).text == solved[4.76] and app.label.title == "Dose +20%"
    assert clipboard.read_text("utf-8") == QUESTION  # only closed
    rumps.clicked = 1
    assert ask(-30).text == solved[-7.13] and app.label.title == "Dose -30%"
    assert clipboard.read_text("utf-8") == solved[-7.13]  # copied
    assert ask(1.9).text == solved[0.0] and app.label.title == "Unsteered"
    assert not rumps.alerts


def test_the_menu_bar_stops_and_quits(menu_bar):
    app, rumps, clipboard = menu_bar()
    tick(app, lambda: app.solve_item.callback)
    clipboard.write_text(" \n")
    app.solve_item.callback(app.solve_item)
    assert rumps.alerts == ["There is no text on the clipboard."]

    clipboard.write_text(QUESTION)
    busy = threading.Event()
    app._thread.submit(busy.wait)  # so that it is stopped before its end, however fast it is
    app.solve_item.callback(app.solve_item)
    app.stop_item.callback(app.stop_item)
    busy.set()
    tick(app, lambda: rumps.windows)
    assert "interrupted" in rumps.windows[0].message

    app.solve_item.callback(app.solve_item)
    app.quit(None)  # while it computes
    assert rumps.ended and not any(thread.is_alive() for thread in app._thread._threads)


def test_the_menu_bar_says_what_is_wrong(menu_bar, monkeypatch):
    monkeypatch.setenv("DENSESTEER_MODEL", "./nowhere")
    app, rumps, _ = menu_bar()
    tick(app, lambda: rumps.alerts)
    assert "nowhere: no such folder" in rumps.alerts[0] and app.solve_item.callback is None

    monkeypatch.setenv("DENSESTEER_MODEL", "")
    for name, value, error in (
        ("STRENGTH", "much", "strength 'much'"),
        ("VECTOR", "nowhere.npz", "nowhere.npz: no such file"),
    ):
        monkeypatch.setenv(f"DENSESTEER_{name}", value)
        rumps.alerts.clear()
        app, *_ = menu_bar()
        tick(app, lambda: rumps.alerts)
        assert error in rumps.alerts[-1] and app.solve_item.callback is None


def test_the_menu_bar_shows_a_bug_and_goes_on(menu_bar, monkeypatch):
    app, rumps, clipboard = menu_bar()
    tick(app, lambda: app.solve_item.callback)
    clipboard.write_text(QUESTION, "utf-8")
    monkeypatch.setattr(app, "_answer", lambda *_: 1 // 0)
    app.solve_item.callback(app.solve_item)
    with pytest.raises(ZeroDivisionError):
        tick(app, lambda: False)
    assert rumps.alerts == ["integer division or modulo by zero"] and app.solve_item.callback


def test_the_menu_bar_unsteered(menu_bar, monkeypatch, solved):
    monkeypatch.setenv("DENSESTEER_VECTOR", "")
    app, rumps, clipboard = menu_bar()
    tick(app, lambda: app.solve_item.callback)
    clipboard.write_text(QUESTION, "utf-8")
    app.solve_item.callback(app.solve_item)
    tick(app, lambda: rumps.windows)
    assert rumps.windows[0].text == solved[0.0]


def test_the_menu_bar_without_rumps(run, tmp_path):
    """Where rumps is installed it cannot be imported here: a module of its name stands before it."""
    (tmp_path / "rumps.py").write_text("raise ImportError('no AppKit')\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = run(sys.executable, EXAMPLES / "menubar.py", code=1, PYTHONPATH=path)
    assert done.stderr == "menubar: no AppKit. On a Mac: pip install -e '.[menubar]'\n"
