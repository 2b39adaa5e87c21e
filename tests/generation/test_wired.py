"""Wired memory, on a Mac as ``metal_like`` makes one."""

import gc
import json

import pytest

import mlx_densesteer as ds
from mlx_densesteer.generation.batch import Batch, generate_batch
from mlx_densesteer.generation.session import Session
from mlx_densesteer.model.prefix import Prefix

pytestmark = pytest.mark.usefixtures("nothing_wired")

PROMPT = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def model(hf_folder):
    return ds.load(hf_folder)


@pytest.fixture
def device(metal_like):
    return metal_like.give_device()


@pytest.fixture
def read(device, monkeypatch):
    """The wired limits at which prompts were read."""
    limits, filling = [], Prefix.filling

    def spied(self, *arguments, **options):
        limits.append(device.limit)
        return filling(self, *arguments, **options)

    monkeypatch.setattr(Prefix, "filling", spied)
    return limits


def test_a_prompt_is_read_and_answered_wired(model, device, read):
    pieces = ds.stream(model, PROMPT, max_tokens=5)
    assert device.limit == 0
    next(pieces)
    assert device.limit == device.working_set
    for _ in pieces:
        pass
    assert read == [device.working_set] and device.limit == 0


def test_an_answer_that_is_left_unwires(model, device, read):
    session = Session(model, max_tokens=9)
    reply = session.send("2 + 2?")
    next(reply)
    assert device.limit == device.working_set
    reply.close()
    assert device.limit == 0
    left = ds.stream(model, PROMPT, max_tokens=9)
    next(left)
    del left
    gc.collect()
    assert device.limit == 0 and read == [device.working_set] * 2


def test_answers_in_turns_are_wired_until_the_last_one_ends(model, device):
    first, second = (ds.stream(model, PROMPT, max_tokens=n) for n in (3, 9))
    next(first), next(second)
    for _ in first:
        pass
    assert device.limit == device.working_set
    with Batch(model) as batch:
        batch.add(PROMPT, max_tokens=2)
        for _ in second:
            pass
        while batch.running:
            batch.step()
            assert device.limit == device.working_set
    assert device.limit == 0
    for _ in generate_batch(model, [PROMPT] * 3, max_tokens=2):
        assert device.limit == device.working_set
    assert device.limit == 0


def test_a_batch_that_fails_or_is_left_unwires(model, device, metal_like):
    batch = Batch(model)
    batch.add(PROMPT, max_tokens=2)
    metal_like.fail_at(1, times=None)
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        batch.step()
    assert device.limit == 0
    metal_like.heal()
    left = Batch(model)
    assert device.limit == device.working_set
    del left
    assert device.limit == 0


def test_a_limit_that_was_there_before_is_there_again(model, device):
    device.limit = 2**20
    ds.generate(model, PROMPT, max_tokens=2)
    assert device.limit == 2**20


def test_an_error_of_the_step_that_nobody_needs_does_not_take_the_answer(model, device, metal_like):
    """But what the caches hold is not used again."""
    text = ds.generate(model, "2 + 2?", max_tokens=9).text
    session = Session(model, max_tokens=9, stop=[text[2:4]])
    wanted = "".join(session.send("2 + 2?"))
    metal_like.calls.clear()
    assert "".join(session.regenerate()) == wanted
    assert metal_like.calls[-1] == "synchronize" and session.prefix.length
    metal_like.fail_at(len(metal_like.calls))
    assert "".join(session.regenerate()) == wanted
    assert metal_like.failures == 1 and session.prefix.length == 0
    assert device.limit == 0


def test_a_device_without_a_limit_has_nothing_left_to_compute_after_an_answer(model, metal_like):
    """A process that exits while mlx computes may crash: OpenBLAS frees its buffers."""
    ds.generate(model, PROMPT, max_tokens=3)
    assert metal_like.calls[-1] == "synchronize"
    list(generate_batch(model, [PROMPT, PROMPT], max_tokens=3))
    assert metal_like.calls[-1] == "synchronize"


def test_after_an_error_of_the_device_a_session_reads_its_history_again(model, device, metal_like):
    session = Session(model, max_tokens=9)
    first = "".join(session.send("2 + 2?"))
    reply = session.regenerate()
    next(reply)
    metal_like.fail_at(1)
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        list(reply)
    assert device.limit == 0 and session.prefix.length == 0
    assert "".join(session.regenerate()) == first


def test_nothing_but_the_result_is_on_standard_output(metal_like):
    """mlx-lm warns there of weights above 0.9 of the working set; the demo's are 10 MB."""
    from click.testing import CliRunner

    from mlx_densesteer.cli import main

    device = metal_like.give_device(working_set=8 * 2**20)
    done = CliRunner().invoke(main, ["generate", "-m", "demo", "--json", "--max-tokens", "4", "Hi"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["tokens"] == 4
    assert device.limits == [device.working_set, 0]
