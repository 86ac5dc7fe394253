"""Prompts: the original's wording letter by letter, pictures in the text, and escapes."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.pruned import load, load_json
from golden.vocab import VOCABULARIES
from tinyllava.errors import UsageError
from tinyllava.profile import LLAVA, PROFILES
from tinyllava.text.prompt import (
    STOP_TEXTS,
    TEMPLATES,
    ImageSlot,
    Part,
    build,
    choose_template,
    encode_prompt,
    is_full_prompt,
    parse_full_prompt,
    place_pictures,
    take_pictures,
    template_for,
    unescape,
)
from tinyllava.text.tokenizer import Tokenizer

SLOT = ImageSlot(0)
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. USER: "
)
LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)


def tokenizer(kind: str, **changes: Any) -> Tokenizer:
    vocabulary = VOCABULARIES[kind]()
    keys: dict[str, Any] = {
        "model": vocabulary.model,
        "tokens": list(vocabulary.tokens),
        "token_type": list(vocabulary.types),
        "bos_token_id": vocabulary.bos,
        "add_bos_token": vocabulary.add_bos,
        "merges": list(vocabulary.merges),
        "pre": vocabulary.pre,
    } | changes
    return Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})


def real_tokenizer(name: str) -> Tokenizer:
    """A real vocabulary from golden/."""
    vocabulary = load(name)
    lists = ("tokens", "token_type", "scores", "merges")
    keys = vocabulary.scalars | {key: getattr(vocabulary, key) for key in lists}
    return Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})


SPM = tokenizer("spm")
BPE = tokenizer("bpe")


# --- templates ---


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vicuna", [VICUNA, SLOT, "\nWhy? ASSISTANT:"]),
        ("mistral", ["[INST] ", SLOT, "\nWhy? [/INST]"]),
        (
            "chatml-34b",
            [
                "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
                SLOT,
                "\nWhy?<|im_end|><|im_start|>assistant\n",
            ],
        ),
        ("llama-2", [f"[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\n", SLOT, "\nWhy? [/INST]"]),
        (
            "llama-3",
            [
                f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA_LLAMA_2}<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\n",
                SLOT,
                "\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ],
        ),
        ("plain", [SLOT, "\nWhy?\n"]),
    ],
)
def test_the_wording_of_each_template(name: str, parts: list[Part]) -> None:
    assert build(TEMPLATES[name], "Why?") == parts


ORIGINAL_NAMES = {
    "vicuna": "llava_v1",
    "mistral": "mistral_instruct",
    "chatml-34b": "chatml_direct",
    "llama-2": "llava_llama_2",
    "plain": "plain",
}


ORIGINAL_PROMPTS = load_json("prompts.json.gz")


@pytest.mark.parametrize("name", sorted(ORIGINAL_NAMES))
def test_the_original_words_it_alike(name: str) -> None:
    cases = [case for case in ORIGINAL_PROMPTS if case["template"] == ORIGINAL_NAMES[name]]
    assert len(cases) >= 6
    for case in cases:
        if len(case["talk"]) == 1:
            parts = build(TEMPLATES[name], case["talk"][0][0])
            assert "".join(part if isinstance(part, str) else "<image>" for part in parts) == case["prompt"]


def test_no_picture_and_several() -> None:
    assert build(TEMPLATES["mistral"], "Why?", 0) == ["[INST] Why? [/INST]"]
    two = ["[INST] ", ImageSlot(0), "\n", ImageSlot(1), "\nWhy? [/INST]"]
    assert build(TEMPLATES["mistral"], "Why?", 2) == two


def test_a_question_is_not_searched_for_slots() -> None:
    assert build(TEMPLATES["plain"], "What is <image>?", 0) == ["What is <image>?\n"]


def test_other_pipelines_word_vicuna_differently() -> None:
    assert build(template_for("vicuna", "hub"), "Q") == ["USER: ", SLOT, "\nQ ASSISTANT:"]
    system = VICUNA.removesuffix(" USER: ")
    assert build(template_for("vicuna", "native"), "Q") == [system + "\nUSER:", SLOT, "Q\nASSISTANT:"]
    assert template_for("mistral", "hub") == template_for("mistral") == TEMPLATES["mistral"]


def test_llama_mtmd_cli_has_no_system_text_and_no_line_end_after_the_picture() -> None:
    built = {name: build(template_for(name, "chat_template"), "Q") for name in ("vicuna", "mistral", "chatml-34b")}
    assert built == {
        "vicuna": ["USER: ", SLOT, "Q\nASSISTANT:"],
        "mistral": ["[INST] ", SLOT, "Q [/INST]"],
        "chatml-34b": ["<|im_start|>user\n", SLOT, "Q<|im_end|>\n<|im_start|>assistant\n"],
    }


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("vicuna", "USER: ", " ASSISTANT:"),
        ("mistral", "[INST] ", " [/INST]"),
        ("chatml-34b", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama-3",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_transformers_words_it_as_the_checkpoints_chat_templates(name: str, before: str, after: str) -> None:
    template = template_for(name, PROFILES["hf"].wording)
    assert build(template, "Why?") == [before, ImageSlot(0), f"\nWhy?{after}"]


def test_llama_llava_cli_asks_every_model_as_vicuna() -> None:
    template, reason = choose_template({"general.name": "llava-mistral"}, SPM, profile=PROFILES["llava-cli"])
    assert (template, reason) == (template_for("vicuna", "native"), "vicuna: every model gets it")


def test_transformers_puts_no_space_after_a_picture() -> None:
    parts = ["USER: ", SLOT, "cat"]
    cat, space_cat = encode_prompt(parts, SPM, "first_text"), encode_prompt(parts, SPM, "each_text")
    assert cat[0] == space_cat[0]
    assert SPM.text_of(space_cat[2][0]).startswith("▁") and not SPM.text_of(cat[2][0]).startswith("▁")


def test_an_unknown_template_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="template: 'alpaca'; wanted auto, vicuna, mistral, chatml-34b"):
        template_for("alpaca")


def test_an_answer_stops_at_the_usual_texts() -> None:
    assert LLAVA.stop_texts == STOP_TEXTS
    assert STOP_TEXTS == ("###", "<|im_end|>", "<|im_start|>", "USER:")


@pytest.mark.parametrize(
    ("metadata", "file_name", "name"),
    [
        ({}, "", "vicuna"),
        ({"general.name": "llava-v1.6-mistral-7b"}, "", "mistral"),
        ({"general.name": "LLaMA v2"}, "", "vicuna"),  # what converters of 2023 called everything
        ({"general.name": "LLaMA v2"}, "llava-v1.6-34b.Q4_K_M.gguf", "chatml-34b"),
        ({"general.name": "nous-hermes-2-yi"}, "", "chatml-34b"),
        ({"general.name": "BakLLaVA-1"}, "mistral.gguf", "vicuna"),
        ({"general.name": "llava-llama-2-13b-chat"}, "", "llama-2"),
        ({"general.name": "llama3-llava-next-8b"}, "", "llama-3"),
        ({"general.name": "Llava Llama 3 8b"}, "", "llama-3"),
        ({"general.name": "llava-v1.6-vicuna-13b"}, "", "vicuna"),
        ({"general.basename": "vicuna", "general.name": "model"}, "", "vicuna"),
        ({"general.name": "llava-pretrain-7b"}, "", "plain"),
        ({"tokenizer.chat_template": "{{ '<|im_start|>' + role }}"}, "", "chatml-34b"),
        ({"tokenizer.chat_template": "{{ '<|start_header_id|>' }}"}, "", "llama-3"),
        ({"tokenizer.chat_template": "{{ '[INST] ' }}"}, "", "mistral"),
        ({"tokenizer.chat_template": "{{ '[INST] <<SYS>>' }}"}, "", "llama-2"),
        ({"tokenizer.chat_template": "{{ 'USER: ' }}"}, "", "vicuna"),
        ({"llama.rope.freq_base": 1_000_000.0}, "", "mistral"),
        ({"llama.rope.freq_base": 10_000.0}, "", "vicuna"),
    ],
)
def test_the_template_is_chosen_from_what_the_file_says(
    metadata: dict[str, Any], file_name: str, name: str
) -> None:
    template, reason = choose_template(metadata, SPM, file_name)
    assert template == TEMPLATES[name]
    assert reason.startswith(f"{name}: ")


def test_the_template_is_chosen_from_the_vocabulary() -> None:
    template, reason = choose_template({}, BPE)
    assert (template.name, reason) == ("chatml-34b", "chatml-34b: the vocabulary has <|im_start|>")


# --- token ids ---

IMAGE_TOKEN_INDEX = -200


def tokenizer_image_token(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The definition in llava/mm_utils.py, told in other words: one id list, -200 for each picture."""
    chunks = [tokenizer.encode(chunk) for chunk in prompt.split("<image>")]
    has_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_id
    ids = chunks[0][:1] if has_bos else []
    for i, chunk in enumerate(chunks):
        ids += ([IMAGE_TOKEN_INDEX] if i else []) + chunk[has_bos:]
    return ids


def flat(encoded: list[list[int] | ImageSlot]) -> list[int]:
    return [id for part in encoded for id in (part if isinstance(part, list) else [IMAGE_TOKEN_INDEX])]


prompts = st.lists(st.sampled_from(["<image>", "\n", " ", "the cat", "</s>", "USER:", "é"])).map("".join)


@given(prompts, st.sampled_from([SPM, BPE, tokenizer("bpe", add_bos_token=True)]))
def test_prompts_have_the_ids_of_the_original(prompt: str, tokenizer: Tokenizer) -> None:
    parts = [part for part in parse_full_prompt(prompt) if not isinstance(part, bytes)]
    assert flat(encode_prompt(parts, tokenizer)) == tokenizer_image_token(prompt, tokenizer)


def test_every_prompt_has_the_ids_that_the_original_gave_it() -> None:
    """Several turns, too, with </s> and <s> between them: LLaVA was trained with the tokenizer's legacy mode."""
    mistral = real_tokenizer("mistral-spm")
    for case in ORIGINAL_PROMPTS:
        parts = [part for part in parse_full_prompt(case["prompt"]) if not isinstance(part, bytes)]
        assert flat(encode_prompt(parts, mistral)) == case["ids"]["True"], case["prompt"]


def test_bos_comes_once_and_each_stretch_has_its_space() -> None:
    newline = SPM.encode("\n", add_bos=False)
    assert encode_prompt([SLOT, "\n", ImageSlot(1), "\n"], SPM) == [[1], SLOT, newline, ImageSlot(1), newline]
    assert encode_prompt([SLOT, "\n"], BPE) == [SLOT, BPE.encode("\n")]
    assert encode_prompt([], SPM) == [[1]]


# --- pictures in the prompt ---

PNG = b"\x89PNG\r\n"
TAG = f'<img src="data:image/jpeg;base64,{base64.b64encode(PNG).decode()}">'


def test_text_around_pictures_stays_as_it_is() -> None:
    assert parse_full_prompt("<image>\nWhat? ") == [ImageSlot(0), "\nWhat? "]
    assert parse_full_prompt(" a <image><image>\n") == [" a ", ImageSlot(0), ImageSlot(1), "\n"]
    assert parse_full_prompt("") == []
    assert not is_full_prompt(TAG)
    assert is_full_prompt("a<image>")


def test_base64_pictures_become_their_bytes() -> None:
    assert parse_full_prompt(f"<image>{TAG}<image>x") == [ImageSlot(0), PNG, ImageSlot(1), "x"]
    longer = TAG.replace("jpeg", "svg+xml").replace('">', '" alt="user upload image" />')
    assert parse_full_prompt(longer) == [PNG]  # as the original's web page writes it
    wrapped = f'<img src="data:image/png;base64,{base64.encodebytes(PNG * 40).decode()}">'
    assert parse_full_prompt(wrapped) == [PNG * 40]
    assert take_pictures(f"Look: {TAG}What?") == ("Look: What?", [PNG])


@given(st.lists(st.binary(min_size=1) | st.sampled_from(["<image>", "text", " <img> "])))
def test_any_mixture_is_taken_apart_again(parts: list[bytes | str]) -> None:
    written = [
        f'<img src="data:image/png;base64,{base64.b64encode(part).decode()}">' if isinstance(part, bytes) else part
        for part in parts
    ]
    found = parse_full_prompt("".join(written))
    assert [part for part in found if isinstance(part, bytes)] == [p for p in parts if isinstance(p, bytes)]
    assert [part.index for part in found if isinstance(part, ImageSlot)] == list(range(parts.count("<image>")))
    assert "".join(p for p in found if isinstance(p, str)) == "".join(
        p for p in parts if isinstance(p, str) and p != "<image>"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<img src="data:image/jpeg;base64,AAAA', "not closed"),
        ('<img src="data:image/jpeg,AAAA">', "not closed or not base64"),
        ('<img src="data:image/jpeg;base64,AA$AA">', "not base64"),
        ('<img src="data:image/jpeg;base64,AAAAA">', "not base64"),
        ('<img src="data:image/jpeg;base64,é">', "not base64"),
        ('<img src="data:image/jpeg;base64,">', "is empty"),
    ],
)
def test_broken_base64_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_full_prompt(text)


def test_other_html_is_just_text() -> None:
    assert parse_full_prompt('<img src="cat.jpg"> <b>') == ['<img src="cat.jpg"> <b>']


def test_each_slot_gets_its_picture() -> None:
    parts, pictures = place_pictures(parse_full_prompt(f"a<image>{TAG}b<image>"), ["one.png", "two.png"])
    assert parts == ["a", ImageSlot(0), ImageSlot(1), "b", ImageSlot(2)]
    assert pictures == ["one.png", PNG, "two.png"]


@pytest.mark.parametrize(
    ("text", "n_pictures", "words"),
    [
        ("<image>", 0, "prompt: <image> once, but 0 pictures. Give one --image for each"),
        ("<image><image>", 1, "<image> twice, but 1 picture. "),
        ("<image>", 3, "<image> once, but 3 pictures"),
    ],
)
def test_slots_and_pictures_must_match(text: str, n_pictures: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        place_pictures(parse_full_prompt(text), ["x.png"] * n_pictures)


# --- escapes ---


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r"a\nb\tc\rd", "a\nb\tc\rd"),
        (r"\'\"\\", "'\"\\"),
        (r"\\n", r"\n"),
        (r"\x41\x7e", "A~"),
        (r"\xc3\xa9", "é"),
        (r"\xff", "\ufffd"),  # not UTF-8
        (r"\q\x4\xzz", r"\q\x4\xzz"),  # what is no escape stays
        ("ends with \\", "ends with \\"),
        ("🙂", "🙂"),
    ],
)
def test_escapes(text: str, meant: str) -> None:
    assert unescape(text) == meant


@given(st.text(st.characters(codec="utf-8", exclude_characters="\\")))
def test_text_without_backslashes_stays(text: str) -> None:
    assert unescape(text) == text
