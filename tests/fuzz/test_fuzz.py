"""Every reader against damaged inputs; ``scripts/fuzz`` runs many more."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("gguf")

from fuzzing import table
from readers import READERS

INPUTS = 200


@pytest.mark.parametrize("name", READERS)
def test_what_is_damaged_gives_a_result_or_an_error_of_ours(name, tmp_path):
    found = table(name, 1, 0, INPUTS, keep=tmp_path)
    assert not [outcome for outcome in found if outcome.startswith("FAULT")], found
    assert found.total() == INPUTS, found
