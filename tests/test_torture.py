"""Short runs of scripts/torture: kills, full disks and two writers at once."""

import pytest
import torture


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "eval"])
def test_a_killed_command_leaves_whole_files(name):
    assert not [one for one in torture.kill(name, 1) if "FAULT" in one]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["control", "eval"])
def test_a_full_disk_is_named_with_its_remedy(name):
    outcomes = [*torture.disk(name, sizes=(0.3, 0.99))]
    assert "refused on a file that cannot grow" in outcomes
    assert not [one for one in outcomes if "FAULT" in one]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export"])
def test_two_writers_at_once_leave_whole_files(name):
    assert not [one for one in torture.race(name, 0) if "FAULT" in one]
