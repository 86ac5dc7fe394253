"""SentencePiece-BPE with a vocabulary small enough to follow with a pencil."""

from __future__ import annotations

from typing import Any

import pytest

from tinyllava.errors import ModelError
from tinyllava.text.tokenizer import Tokenizer
from tinyllava.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

KEY = "tokenizer.ggml."
PIECES = {  # id: text, score, type
    0: ("<unk>", 0.0, UNKNOWN),
    1: ("<s>", 0.0, CONTROL),
    2: ("</s>", 0.0, CONTROL),
    3: ("▁", -10.0, NORMAL),
    4: ("a", -11.0, NORMAL),
    5: ("b", -12.0, NORMAL),
    6: ("c", -13.0, NORMAL),
    7: ("ab", -1.0, NORMAL),
    8: ("bc", -0.5, NORMAL),
    9: ("▁a", -2.0, NORMAL),
    10: ("▁ab", -3.0, NORMAL),
    11: ("▁▁", -0.1, NORMAL),
    12: ("<image>", -1000.0, USER_DEFINED),
    13: ("<image>s", -1000.0, USER_DEFINED),
}
BYTES = {14 + i: (f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)}


def metadata(bytes_too: bool = True, **changes: Any) -> dict[str, Any]:
    pieces = [*PIECES.values(), *(BYTES.values() if bytes_too else [])]
    keys = {
        KEY + "model": "llama",
        KEY + "tokens": [text for text, _, _ in pieces],
        KEY + "scores": [score for _, score, _ in pieces],
        KEY + "token_type": [type for _, _, type in pieces],
    }
    keys.update({KEY + name: value for name, value in changes.items() if value is not None})
    return {key: value for key, value in keys.items() if changes.get(key.removeprefix(KEY), "") is not None}


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_metadata(metadata(**changes))


def test_the_highest_score_merges_first() -> None:
    # ▁ a b c: bc (-0.5) comes before ab (-1), then ▁a (-2); ▁abc is no token
    assert tokenizer().encode("abc") == [1, 9, 8]
    assert tokenizer().encode("ab") == [1, 10]


def test_spaces_become_their_sign_and_one_goes_in_front() -> None:
    assert tokenizer().encode(" a", add_bos=False) == [11, 4]
    assert tokenizer().encode("a a", add_bos=False) == [9, 9]
    assert tokenizer(add_space_prefix=False).encode("a a", add_bos=False) == [4, 9]


def test_a_character_without_a_token_becomes_bytes() -> None:
    assert tokenizer().encode("é", add_bos=False) == [3, 14 + 0xC3, 14 + 0xA9]
    assert tokenizer().decode([3, 14 + 0xC3, 14 + 0xA9]) == "é"


def test_without_byte_tokens_a_run_of_strange_characters_is_one_unknown() -> None:
    assert tokenizer(bytes_too=False).encode("éèa", add_bos=False) == [3, 0, 4]


def test_user_defined_tokens_are_cut_out_longest_first() -> None:
    assert tokenizer().encode("a<image>sb", add_bos=False) == [9, 13, 3, 5]
    assert tokenizer().encode("<image>b", add_bos=False, parse_special=False) == [12, 3, 5]


def test_longer_means_more_bytes_as_in_llama_cpp() -> None:
    changed = metadata()
    changed[KEY + "tokens"][12:14] = ["xa", "aé"]
    assert Tokenizer.from_metadata(changed).encode("xaé", add_bos=False) == [3, 14 + ord("x"), 13]


def test_each_stretch_between_special_tokens_gets_a_space_as_in_llama_cpp() -> None:
    assert tokenizer().encode("a</s>a") == [1, 9, 2, 9]


def test_control_tokens_are_text_unless_asked_for() -> None:
    ids = tokenizer().encode("</s>", add_bos=False, parse_special=False)
    assert ids == [3] + [14 + byte for byte in b"</s>"]
    assert tokenizer().encode("</s>", add_bos=False) == [2]


def test_text_never_merges_into_a_control_or_byte_token() -> None:
    """llama.cpp merges into whatever its vocabulary lists; SentencePiece, and so this, does not."""
    changed = metadata()
    changed[KEY + "tokens"][2] = "ab"
    assert Tokenizer.from_metadata(changed).encode("ab", add_bos=False, parse_special=False) == [10]
    assert Tokenizer.from_metadata(changed).encode("bab", add_bos=False, parse_special=False) == [3, 5, 7]


def test_decoding_takes_the_spaces_out_that_encoding_put_in() -> None:
    t = tokenizer()
    for text in ("", " ", "  a", "a b", "a<image> b", "<image>", "<image><image>s a", "a\n"):
        assert t.decode(t.encode(text)) == text
    assert t.decode(t.encode("a</s> b"), special=True) == "<s>a</s> b"


def test_decoding_keeps_a_space_that_is_a_byte_token() -> None:
    assert tokenizer().decode([14 + 0x20, 4]) == " a"
    assert tokenizer().decode([11, 4]) == " a"


def test_decoding_leaves_control_tokens_out() -> None:
    assert tokenizer().decode([1, 9, 2, 9, 0]) == "a a"
    assert tokenizer().token_bytes(2) == b""
    assert tokenizer().token_bytes(9) == b" a"
    assert tokenizer().token_bytes(14 + 0xFF) == b"\xff"


def test_rows_past_the_vocabulary_decode_to_nothing() -> None:
    assert tokenizer().token_bytes(32063) == b""
    assert tokenizer().decode([9, 32063]) == "a"


def test_a_vocabulary_whose_tokens_reach_across_words_is_merged_as_one_text() -> None:
    changed = metadata()
    changed[KEY + "tokens"][10] = "a▁"
    changed[KEY + "scores"][10] = 0.0
    assert Tokenizer.from_metadata(changed).encode("a b", add_bos=False) == [3, 10, 5]


def test_what_a_file_may_leave_out() -> None:
    t = tokenizer(scores=None, token_type=None)
    assert (t.bos_id, t.eos_id, t.add_bos, t.end_ids) == (1, 2, True, {2})
    assert t.encode("abc") == [1, 10, 6]  # ids stand in for scores, so ab (7) comes before bc (8)
    assert t.decode([14 + 0x41]) == "A"
    assert "no token scores" in t.notes[0]


def test_a_text_that_is_listed_twice_has_its_first_id() -> None:
    changed = metadata()
    changed[KEY + "tokens"][8] = "ab"
    assert Tokenizer.from_metadata(changed).encode("bab", add_bos=False) == [3, 5, 7]


def test_numbers_past_the_last_token_are_left_out() -> None:
    longer = {name: [*metadata()[KEY + name], 1] for name in ("scores", "token_type")}
    assert tokenizer(**longer).encode("ab") == [1, 10]


def test_end_tokens_by_key_and_by_text() -> None:
    changed = metadata(eot_token_id=5)
    changed[KEY + "tokens"][12] = "<|im_end|>"
    t = Tokenizer.from_metadata(changed)
    assert t.end_ids == {2, 5, 12}
    assert t.token_bytes(12) == b""  # a control token now, whatever the file calls it


def test_phi3_special_tokens_swallow_the_space_after_them() -> None:
    t = Tokenizer.from_metadata(metadata() | {"general.name": "Phi3"})
    assert t.encode("</s> \n a", add_bos=False) == [2, 9]
    assert t.encode("<s> a", add_bos=False) == [1, 11, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, "tokenizer 'bert'; wanted 'llama' or 'gpt2'"),
        ({"model": None}, "no vocabulary"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": 3}, "not an array"),
        ({"tokens": ["a", 4]}, "other than strings"),
        ({"scores": [1.0]}, "scores has 1 numbers for 270 tokens"),
        ({"token_type": ["x"] * 300}, "token_type holds something other than finite numbers"),
        ({"scores": [float("nan")] * 300}, "scores holds something other than finite numbers"),
        ({"bos_token_id": "one"}, "bos_token_id is 'one'; wanted a number"),
        ({"add_space_prefix": [True]}, r"add_space_prefix is \[True\]; wanted true or false"),
    ],
)
def test_a_damaged_vocabulary_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        tokenizer(**changes)


def test_an_id_outside_the_vocabulary_is_noted_and_the_default_used() -> None:
    t = tokenizer(bos_token_id=9999)
    assert t.bos_id == 1
    assert "bos_token_id 9999 is outside" in t.notes[0]
