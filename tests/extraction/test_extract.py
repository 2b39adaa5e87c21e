import json
import random

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import streams

import mlx_densesteer as ds
from mlx_densesteer.cli import main
from mlx_densesteer.demo.problems import calibration, draw_solution
from mlx_densesteer.errors import InputError, ModelError
from mlx_densesteer.extraction.extract import ReadOut, extract_with_report
from mlx_densesteer.extraction.pairs import pairs_sha256
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.model.model import Model
from mlx_densesteer.model.prompt import encode_prompt

PAIRS = [
    ds.Pair("1 + 1?", "It is 2.", "We add.\n\nIt is 2."),
    ds.Pair("What is 3 * 4?", "12", "We multiply 3 by 4.\n\nThat is 12."),
    ds.Pair("And 9 - 5?", "9 - 5 = 4", "9.\n\nMinus 5.\n\n4.\n"),
    ds.Pair("What is 3 * 4?", "We multiply: 12.", "We multiply 3 by 4.\n\nThat is 12."),
    ds.Pair("And 2 * 2?", "That is 4.", "Two.\n\nTwice.\n\nThat is 4.", system="Be brief."),
]


@pytest.fixture(scope="module")
def loaded(hf_folder) -> Model:
    """The tiny model in float32, so that batches can be held against single sequences."""
    model = ds.load(hf_folder)
    model.network.set_dtype(mx.float32)
    return model


@pytest.fixture
def run(hf_folder, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in PAIRS), "utf-8")

    def invoke(*arguments, pairs=file):
        words = ["extract", "-m", hf_folder, pairs, "-o", tmp_path / "v.npz", *arguments]
        return CliRunner().invoke(main, [str(word) for word in words])

    return invoke


def differences(model, tokenizer, layer, read):
    """``read(h)`` of dense minus sparse, each sequence by itself; h ``(tokens, hidden)``."""
    rows = []
    for pair in PAIRS:
        prompt = encode_prompt(tokenizer, pair.prompt, system=pair.system)
        both = [
            np.array(streams(model, prompt + tokenizer.encode(text.strip()))[layer][0])
            for text in (pair.positive, pair.negative)
        ]
        rows.append(read(both[0][len(prompt) :]) - read(both[1][len(prompt) :]))
    return np.array(rows)


@pytest.mark.parametrize(
    "token, read",
    [
        (-1, lambda h: h[-1]),
        ("-2", lambda h: h[-2]),
        ("mean-response", lambda h: h.mean(axis=0)),
        ("first-2", lambda h: h[:2].mean(axis=0)),
    ],
)
def test_the_vector_is_the_mean_difference_at_the_read_out(loaded, token, read):
    model, tokenizer = loaded
    vector = ds.extract(model, tokenizer, PAIRS, token=token)
    assert list(vector.layers) == [0, 1, 2, 3]
    for layer, array in vector.layers.items():
        expected = differences(model, tokenizer, layer, read).mean(axis=0)
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)
        assert np.linalg.norm(array) > 0.1


def test_the_principal_component_lies_in_the_differences(loaded):
    model, tokenizer = loaded
    vector = ds.extract(model, tokenizer, PAIRS, layers=[2], method="pca")
    rows = differences(model, tokenizer, 2, lambda h: h[-1])
    u = np.linalg.svd(rows)[2][0]
    np.testing.assert_allclose(vector.layers[2], u * (rows @ u).mean(), rtol=0, atol=5e-5)
    assert vector.meta.method == "first principal component"


def test_metadata_says_where_it_comes_from(loaded):
    model, tokenizer = loaded
    meta = ds.extract(model, tokenizer, PAIRS, layers=[1], token="first-2").meta
    assert (meta.model, meta.fingerprint) == ("Tiny-Qwen2", loaded.fingerprint)
    assert (meta.hidden_size, meta.layer_count, meta.quantization) == (64, 4, "none")
    assert (meta.method, meta.token, meta.pair_count) == (
        "mean difference", "mean of the first 2 of the response", 5,
    )  # fmt: skip
    assert ds.extract(model, tokenizer, PAIRS, layers=[1]).meta.token == "-1 of the response"
    assert meta.pairs_sha256 == pairs_sha256(PAIRS) != pairs_sha256(PAIRS[::-1])
    assert len(meta.chat_template_sha256) == 64
    assert meta.extra["dtype"] == "float32" and list(meta.extra["stability"]) == ["1"]


def test_the_report_is_measured(loaded, tmp_path):
    model, tokenizer = loaded
    found = extract_with_report(model, tokenizer, PAIRS, layers=[1, 3])
    means, whole = [], []
    for pair in PAIRS:
        prompt = encode_prompt(tokenizer, pair.prompt, system=pair.system)
        for text in (pair.positive, pair.negative):
            whole.append(prompt + tokenizer.encode(text.strip()))
            h = np.array(streams(model, whole[-1])[3][0])
            means.append(np.linalg.norm(h[len(prompt) :], axis=-1).mean())
    report = found.layers[3]
    assert report.residual_norm == pytest.approx(np.mean(means), rel=1e-5)
    assert report.norm == pytest.approx(found.vector.norms()[3], rel=1e-6)
    assert report.unit_dose == report.norm / report.residual_norm
    assert -1 <= report.agreement <= 1 and 0 < report.noise <= 1
    assert found.tokens == sum(map(len, whole))
    kept = ds.SteeringVector.load(found.vector.save(tmp_path / "v.npz"))
    assert kept.residual_norms == {
        layer: pytest.approx(row.residual_norm, rel=1e-5) for layer, row in found.layers.items()
    }
    assert kept.meta.extra["stability"]["3"] == {
        "agreement": pytest.approx(report.agreement, rel=1e-5),
        "noise": pytest.approx(report.noise, rel=1e-5),
    }


def test_swapping_the_responses_turns_the_vector_around(loaded):
    model, tokenizer = loaded
    swapped = [ds.Pair(p.prompt, p.negative, p.positive, p.system) for p in PAIRS]
    there = ds.extract(model, tokenizer, PAIRS).layers[1]
    back = ds.extract(model, tokenizer, swapped).layers[1]
    np.testing.assert_allclose(back, -there, rtol=0, atol=1e-5)


def test_an_end_of_turn_is_never_read(loaded):
    model, tokenizer = loaded
    plain = ds.extract(model, tokenizer, PAIRS[:1]).layers[3]
    ended = [ds.Pair("1 + 1?", "It is 2. <|im_end|>\n<|im_end|>", "We add.\n\nIt is 2.<|im_end|>")]
    assert np.array_equal(ds.extract(model, tokenizer, ended).layers[3], plain)
    inside = [ds.Pair("1 + 1?", "It is<|im_end|> 2", "2")]
    with pytest.raises(InputError, match="pair 0 has an end-of-turn token inside a response"):
        ds.extract(model, tokenizer, inside)


def test_pairs_without_a_difference_are_named(loaded):
    model, tokenizer = loaded
    pairs = [PAIRS[0], ds.Pair("x", "same", "same \n"), PAIRS[1]]
    found = extract_with_report(model, tokenizer, pairs, layers=[0])
    assert found.identical == (1,)
    alone = ds.extract(model, tokenizer, [PAIRS[0], PAIRS[1]], layers=[0]).layers[0]
    np.testing.assert_allclose(found.vector.layers[0], alone * 2 / 3, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="the same in every pair"):
        ds.extract(model, tokenizer, [ds.Pair("x", "same", "same")])


def test_pairs_that_cannot_be_used(loaded):
    model, tokenizer = loaded
    with pytest.raises(InputError, match="no contrastive pairs"):
        ds.extract(model, tokenizer, [])
    with pytest.raises(InputError, match="pair 1 has a response of 0 tokens"):
        ds.extract(model, tokenizer, [PAIRS[0], ds.Pair("x", " ", "y")])
    with pytest.raises(InputError, match="pair 1 has a response of 2 tokens, expected at least 3"):
        ds.extract(model, tokenizer, PAIRS, token=-3)
    with pytest.raises(InputError, match="8 tokens, expected at least 9"):
        ds.extract(model, tokenizer, PAIRS, token="first-9")
    with pytest.raises(InputError, match="pair 0 has 6.. tokens, and the model's context is 512"):
        ds.extract(model, tokenizer, [ds.Pair("x" * 600, "a", "b")])
    with pytest.raises(InputError, match="pair 0 is not valid UTF-8 text"):
        ds.extract(model, tokenizer, [ds.Pair("x", "\ud800", "b")])
    with pytest.raises(InputError, match="layers 99"):
        ds.extract(model, tokenizer, PAIRS, layers=[99])
    with pytest.raises(InputError, match="layers none"):
        ds.extract(model, tokenizer, PAIRS, layers=[])
    with pytest.raises(InputError, match="method 'sum': expected one of mean, pca"):
        ds.extract(model, tokenizer, PAIRS, method="sum")


@pytest.mark.parametrize("token", [0, 3, "", "-0", "last", "first-0", "first--2", "-1.5", "--1"])
def test_read_outs_that_are_none(token):
    with pytest.raises(InputError, match=f"token {token}: expected a negative number"):
        ReadOut.of(token)


def test_weights_of_a_read_out_are_a_mean():
    for token, expected in [
        (-1, [0, 0, 0, 1]), (-4, [1, 0, 0, 0]), ("first-2", [0.5, 0.5, 0, 0]),
        ("mean-response", [0.25] * 4),
    ]:  # fmt: skip
        assert ReadOut.of(token).weights([5, 6, 7, 8]).tolist() == expected


def test_the_tokens_that_end_a_step_are_read(demo_model):
    """The ends of the steps but the last; the last token of a response of one step."""
    pairs = []
    for problem in calibration(6):
        texts = [draw_solution(problem, random.Random(seed)) for seed in range(2)]
        if texts[0] != texts[1]:
            pairs.append(ds.Pair(problem.question, *texts))
    network, tokenizer = demo_model
    vector = ds.extract(demo_model, pairs, layers=[2, 5], token="steps")
    assert vector.meta.token == "mean of the tokens that end a step of the response"
    for layer in (2, 5):
        rows, ends = [], 0
        for pair in pairs:
            prompt = encode_prompt(tokenizer, pair.prompt)
            for text in (pair.positive, pair.negative):
                response = tokenizer.encode(text)
                h = np.array(streams(network, prompt + response)[layer][0, len(prompt) :])
                at = [i for i, t in enumerate(response[:-1]) if tokenizer.decode([t]) == ".\n\n"]
                assert len(at) + 1 == len(split_steps(text))
                ends += len(at)
                rows.append(h[at or [-1]].mean(axis=0))
        expected = np.array(rows[::2]).mean(axis=0) - np.array(rows[1::2]).mean(axis=0)
        np.testing.assert_allclose(vector.layers[layer], expected, rtol=0, atol=2e-3)
        assert ends > len(pairs)


def test_the_command_warns_where_a_response_is_one_step(tmp_path):
    file = tmp_path / "pairs.jsonl"
    texts = ["He has 4. He has 5.\n#### 5", "He has 4.\n\nHe has 5.\n#### 5"]
    rows = [{"prompt": "How many?", "positive": texts[0], "negative": texts[1]}]
    rows.append(rows[0] | {"positive": texts[1], "negative": texts[1].replace(".\n#", ".\n\n#")})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["extract", "-m", "demo", str(file), "-l", "2", "-o", str(tmp_path / "v.npz")]
    told = CliRunner().invoke(main, [*words, "--token", "steps"]).stderr
    assert "warning: in 1 pair of 2 a response is one step" in told
    assert "is one step" not in CliRunner().invoke(main, [*words, "--force"]).stderr


def test_a_tokenizer_without_step_ends_is_refused(loaded):
    with pytest.raises(ModelError, match="writes a blank line as several tokens"):
        ds.extract(loaded, PAIRS, token="steps")


def test_a_residual_stream_that_is_not_finite(hf_folder):
    model, tokenizer = ds.load(hf_folder)
    model.model.layers[1].mlp.down_proj.weight *= float("inf")
    with pytest.raises(ModelError, match="layer 1: the residual stream of pair \\d holds NaN"):
        ds.extract(model, tokenizer, PAIRS)
    assert list(ds.extract(model, tokenizer, PAIRS, layers=[0]).layers) == [0]


def test_progress_counts_the_comparison_of_layers_too(loaded):
    told = []
    extract_with_report(loaded, PAIRS, progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (6, 6)  # five pairs, one of them held out
    assert told == sorted(set(told)) and (5, 6) in told


def test_the_command_writes_the_vector_that_the_function_returns(run, hf_folder, tmp_path):
    result = run("--layer", "1-2", "--token", "mean-response")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'v.npz'}\n"), result.stderr
    vector = ds.SteeringVector.load(tmp_path / "v.npz")
    model, tokenizer = ds.load(hf_folder)
    expected = ds.extract(model, tokenizer, PAIRS, layers=[1, 2], token="mean-response")
    assert vector.sha256() == expected.sha256() and vector.meta == expected.meta
    lines = result.stderr.splitlines()
    head = ["layer", "norm", "residual", "dose", "of", "1", "halves", "noise", "gain"]
    table = lines[[line.split() for line in lines].index(head) + 1 :][:2]
    assert [line.split()[:2] for line in table] == [
        [str(layer), f"{norm:.4f}"] for layer, norm in vector.norms().items()
    ]
    assert "tokens read" in result.stderr and "warning" not in result.stderr


def test_the_command_as_json(run, tmp_path):
    result = run("--json", "--method", "pca")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    vector = ds.SteeringVector.load(found["vector"])
    assert found["sha256"] == vector.sha256()
    assert found["meta"]["method"] == "first principal component"
    assert found["layers"]["2"]["norm"] == pytest.approx(vector.norms()[2], rel=1e-6)
    assert set(found["layers"]["2"]) == {
        "norm", "residual_norm", "unit_dose", "agreement", "noise", "margin_gain",
    }  # fmt: skip
    assert found["identical"] == [] and found["tokens"] > 0


def test_the_command_warns_of_pairs_without_a_difference(run, tmp_path):
    file = tmp_path / "some.jsonl"
    rows = [vars(PAIRS[0]), {"prompt": "x", "positive": "same", "negative": "same"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(pairs=file)
    assert result.exit_code == 0
    assert "warning: in 1 pair (from 0: 1) the two responses are the same" in result.stderr


def test_the_command_refuses_before_it_loads_a_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_densesteer.model.model.load", lambda path: pytest.fail("loaded"))
    result = run("--token", "0")
    assert result.exit_code == 1 and "token 0: expected a negative number" in result.stderr
    result = run("-o", tmp_path / "v.txt")
    assert result.exit_code == 2 and "expected a name that ends in .npz" in result.stderr
    result = run("-o", tmp_path / "no" / "v.npz")
    assert result.exit_code == 1 and "there is no folder" in result.stderr
    (tmp_path / "v.npz").write_bytes(b"mine")
    result = run()
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert (tmp_path / "v.npz").read_bytes() == b"mine"


def test_the_command_replaces_only_when_told_to(run, tmp_path):
    (tmp_path / "v.npz").write_bytes(b"mine")
    assert run("--force", "--layer", "0").exit_code == 0
    assert list(ds.SteeringVector.load(tmp_path / "v.npz").layers) == [0]


def test_an_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_densesteer.text.Live.show", interrupt)
    (tmp_path / "v.npz").write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    result = run("--force")
    assert result.exit_code == 130 and "interrupted; nothing was written" in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "v.npz").read_bytes() == b"mine"


def test_the_command_with_layers_that_are_not_there(run, tmp_path):
    result = run("--layer", "4")
    assert result.exit_code == 1 and "layers 4: expected some of 0-3" in result.stderr
    assert not (tmp_path / "v.npz").exists()


def test_a_read_out_where_nothing_differs_is_refused(loaded_demo):
    pairs = [ds.Pair("How many?", "Tom has 4. He has 5.", "Tom has 4.\n\nHe has 5.")]
    with pytest.raises(InputError, match="every layer's vector is zero"):
        ds.extract(*loaded_demo, pairs, token="first-3")


@pytest.fixture(scope="module")
def loaded_demo():
    return ds.load("demo")


def test_the_command_never_overwrites_its_own_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "positive": "b", "negative": "c"}\n')
    before = file.read_bytes()
    words = ["extract", "-m", "demo", str(file), "-o", str(file), "--force"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "expected a name that ends in .npz" in result.stderr
    assert file.read_bytes() == before
