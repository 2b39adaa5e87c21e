"""What the tests of the commands share."""

import pytest
from click.testing import CliRunner

from mlx_densesteer.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in this process, in an empty folder; it must end with ``code``."""
    monkeypatch.chdir(tmp_path)

    def call(*words, code=0):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result

    return call
