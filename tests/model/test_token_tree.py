import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_densesteer.errors import InputError
from mlx_densesteer.model.token_tree import PADDING, TokenPair, TokenTree

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
token_pairs = st.lists(st.builds(TokenPair, tokens, tokens, tokens), min_size=1, max_size=9)


@given(token_pairs, st.integers(1, 60))
def test_root_stem_and_tails_are_the_sequences_again(pairs, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_densesteer.model.token_tree.BATCH_TOKENS", budget)
        tree = TokenTree.of(pairs)
    found = {}
    for batch in tree.batches:
        for group in batch.groups:
            lengths = [tail.stop - tail.start for tail in group]
            assert lengths[0] == max(lengths) and min(lengths) >= max(1, PADDING * lengths[0])
            for tail in group:
                pair = batch.stems[tail.row]
                assert len(tree.root) < pair.stop == tail.start, "a stem without a token"
                stem = pair.whole[0][len(tree.root) : pair.stop]
                tail_tokens = pair.whole[tail.side][tail.start : tail.stop]
                found[pair.number, tail.side] = [*tree.root, *stem, *tail_tokens]
    for number, pair in enumerate(pairs):
        assert found.pop((number, 0)) == [*pair.prompt, *pair.positive]
        assert found.pop((number, 1)) == [*pair.prompt, *pair.negative]
    assert not found
    apart = sum(2 * len(p.prompt) + len(p.positive) + len(p.negative) for p in pairs)
    assert tree.tokens_apart == apart


def test_what_is_shared_is_counted_once():
    system, question = list(range(20)), list(range(100, 110))
    pairs = [
        TokenPair([*system, *question], [7, 7, 1, 1], [7, 7, 2, 2]),
        TokenPair([*system, *question[::-1]], [8, 8, 1, 1], [8, 8, 2, 2]),
    ]
    tree = TokenTree.of(pairs)
    assert tree.root == tuple(system)
    assert tree.tokens == 20 + 2 * (10 + 2) + 2 * (2 + 2)
    assert tree.tokens_apart == 4 * 34


def test_a_response_that_begins_like_the_other_one_keeps_a_token_of_its_own():
    tree = TokenTree.of([TokenPair([1, 2], [3, 4], [3, 4, 5])])
    assert tree.batches[0].stems[0].stop == 3
    same = TokenTree.of([TokenPair([1, 2], [3, 4], [3, 4])])
    assert same.batches[0].stems[0].stop == 3


def test_padding_is_counted():
    tree = TokenTree.of([TokenPair([1, 2], [3] * 20, [4] * 19)])
    assert len(tree.batches[0].groups) == 1
    assert tree.tokens == 2 + 2 * 20
    far_apart = TokenTree.of([TokenPair([1, 2], [3] * 20, [4] * 10)])
    assert len(far_apart.batches[0].groups) == 2
    assert far_apart.tokens == 2 + 20 + 10


def test_pairs_that_cannot_be_read():
    with pytest.raises(InputError, match="no pairs"):
        TokenTree.of([])
    with pytest.raises(InputError, match="pair 1 has an empty prompt or response"):
        TokenTree.of([TokenPair([1], [1], [1]), TokenPair([1], [], [1])])
