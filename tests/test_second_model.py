"""The tokenizer that ``make second-model`` rebuilds."""

import pytest
from gguf import GGUFWriter, TokenType

from scripts import second_model

NORMAL, RUN, CONTROL = TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL
PIECES = [  # as SentencePiece orders them: what is merged first scores highest
    *[(name, -1000.0, CONTROL) for name in ("<pad>", "<eos>", "<bos>", "<unk>")],
    *[(run, -1000.0, RUN) for run in ("\n", "\n\n", "  ", "<b>")],
    *[("ab", -1.0, NORMAL), ("bc", -2.0, NORMAL), ("\u2581ab", -3.0, NORMAL)],
    *[(character, -4.0, NORMAL) for character in ("\u2581", "a", "b", "c")],
]


@pytest.fixture
def tokenizer(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "gemma3")
    pieces, scores, types = zip(*PIECES, strict=True)
    writer.add_token_list(list(pieces))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(types))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return second_model.tokenizer(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["ab", "c"]),  # not a and bc: ab is the better piece
        ("bcab", ["bc", "ab"]),
        ("a ab", ["a", "\u2581ab"]),
        ("a\n\nb", ["a", "\n\n", "b"]),
        ("a  b", ["a", "\u2581\u2581", "b"]),
    ],
)
def test_pieces_are_merged_in_the_order_of_their_scores(tokenizer, text, pieces):
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text


def test_a_text_begins_with_bos(tokenizer):
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 2
