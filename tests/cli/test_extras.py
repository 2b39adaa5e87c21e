"""What a person is told who lacks an extra: tests/test_packaging.py has it for uv tool and pipx."""

import subprocess
import sys

from helpers import ROOT

from mlx_densesteer.errors import install_command


def test_a_checkout_is_installed_again():
    assert install_command("serve") in (
        f"pip install -e '{ROOT}[serve]'", f"pip install -e {ROOT}[serve]",
    )  # fmt: skip


def test_the_harness_alone_says_it_in_one_line():
    """Run as a program it ends; imported it is an ImportError."""
    without = "import sys; sys.modules['lm_eval'] = None; import runpy; "
    run = without + "runpy.run_module('mlx_densesteer.evaluation.harness', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(install_command("lm-eval"))
    done = subprocess.run(
        [sys.executable, "-c", without + "import mlx_densesteer.evaluation.harness"],
        capture_output=True,
        text=True,
    )
    assert (
        f"ImportError: lm-evaluation-harness needs an extra: {install_command('lm-eval')}"
        in done.stderr
    )
