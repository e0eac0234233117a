import pytest

from llmc_attnmask.runlog.wording import duration, listed


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (89, "89 s"), (100, "2 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_durations_are_put_into_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "nothing"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
)
def test_long_lists_are_shortened(names, words):
    assert listed(names, most=2) == words
