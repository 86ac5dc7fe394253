"""From a question to the prompt that the model was trained on: templates, pictures in the text, escapes.

A prompt is a list of parts: text, and a slot for each picture. The exact wording matters, down to the newline
after the picture: a LLaVA only ever saw its own. Source: the original LLaVA, llava/conversation.py and
``tokenizer_image_token`` in llava/mm_utils.py.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tinyllava.errors import UsageError
from tinyllava.profile import LLAVA, RUNAWAY_TEXTS, Profile, SpacePrefix, Wording
from tinyllava.text.tokenizer import Prefix, Tokenizer

IMAGE = "<image>"
STOP_TEXTS = RUNAWAY_TEXTS


@dataclass(frozen=True)
class ImageSlot:
    """Where the embeddings of picture ``index`` (counted from 0) go."""

    index: int


Part = str | ImageSlot


@dataclass(frozen=True)
class Template:
    """One user turn: ``before``, the pictures (``after_image`` follows each), the question, ``after``."""

    name: str
    before: str
    after: str
    after_image: str = "\n"


HUMAN_AND_ASSISTANT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)

# As the original LLaVA asks (llava_v1, mistral_instruct, chatml_direct, llava_llama_2, plain; llama-3 is from
# LLaVA-NeXT). BOS is not part of the text: the tokenizer adds it.
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            "vicuna",
            before=f"{HUMAN_AND_ASSISTANT} USER: ",
            after=" ASSISTANT:",
        ),
        Template("mistral", before="[INST] ", after=" [/INST]"),
        Template(
            "chatml-34b",
            before="<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
            after="<|im_end|><|im_start|>assistant\n",
        ),
        Template("llama-2", before=f"[INST] <<SYS>>\n{LANGUAGE_AND_VISION}\n<</SYS>>\n\n", after=" [/INST]"),
        Template(
            "llama-3",
            before=f"<|start_header_id|>system<|end_header_id|>\n\n{LANGUAGE_AND_VISION}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n",
            after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        Template("plain", before="", after="\n"),
    )
}

# What the other implementations say instead; all else is as above.
#   hub            the chat templates of the checkpoints converted for transformers, without system texts:
#                  llava-hf/llava-1.5-7b-hf, llava-v1.6-34b-hf (ccd5c91), llama3-llava-next-8b-hf (2844b9a);
#                  llava-v1.6-mistral-7b-hf says what the original says
#   native         what llama-llava-cli puts around a question that has no <image> in it, whatever the model
#   chat_template  llama.cpp's built-in templates, as llama-mtmd-cli takes them: no system text, and the
#                  picture goes right before the question. The files' own Jinja text only tells which.
OTHER_WORDINGS: dict[Wording, tuple[Template, ...]] = {
    "conversation": (),
    "hub": (
        Template("vicuna", before="USER: ", after=" ASSISTANT:"),
        Template(
            "chatml-34b",
            before="<|im_start|>user\n",
            after="<|im_end|>\n<|im_start|>assistant\n",
        ),
        Template(
            "llama-3",
            before="<|start_header_id|>user<|end_header_id|>\n\n",
            after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ),
    "native": (Template("vicuna", f"{HUMAN_AND_ASSISTANT}\nUSER:", "\nASSISTANT:", after_image=""),),
    "chat_template": (
        Template("vicuna", before="USER: ", after="\nASSISTANT:", after_image=""),
        Template("mistral", before="[INST] ", after=" [/INST]", after_image=""),
        Template(
            "chatml-34b",
            before="<|im_start|>user\n",
            after="<|im_end|>\n<|im_start|>assistant\n",
            after_image="",
        ),
        Template("llama-2", before="[INST] ", after=" [/INST]", after_image=""),
        Template(
            "llama-3",
            before="<|start_header_id|>user<|end_header_id|>\n\n",
            after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            after_image="",
        ),
    ),
}


def template_for(name: str, wording: Wording = "conversation") -> Template:
    """The template ``name`` in a profile's wording."""
    if name not in TEMPLATES:
        raise UsageError("template", f"'{name}'", wanted="auto, " + ", ".join(TEMPLATES))
    others = {template.name: template for template in OTHER_WORDINGS[wording]}
    return others.get(name, TEMPLATES[name])


# Words in a model's name -> template, in this order. BakLLaVA is a Mistral trained with Vicuna's words.
# "LLaMA v2" does not count: converters of 2023 called every model with a context of 4096 tokens so.
NAMES = (
    ("bakllava|vicuna", "vicuna"),
    ("llama[-_ ]?3", "llama-3"),
    ("mistral", "mistral"),
    (r"34b|\byi\b", "chatml-34b"),
    (r"llama[-_]?2(?!\d)", "llama-2"),
    ("pretrain", "plain"),
)
# Words in a chat template (Jinja source) -> template, in this order.
CHAT_TEMPLATES = (
    ("<|start_header_id|>", "llama-3"),
    ("<|im_start|>", "chatml-34b"),
    ("<<SYS>>", "llama-2"),
    ("[INST]", "mistral"),
    ("USER:", "vicuna"),
)
# Tokens that only a model of that family has -> template.
TOKENS = (("<|start_header_id|>", "llama-3"), ("<|im_start|>", "chatml-34b"))


def choose_template(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, file_name: str = "", profile: Profile = LLAVA
) -> tuple[Template, str]:
    """The template for a file, and the reason in words: by its name, its chat template or its vocabulary.

    "mistral: the model's name is 'llava-v1.6-mistral-7b'" is such a reason.
    """
    name, reason = "vicuna", "every model gets it"
    if profile.templates == "by_file":
        name, reason = _template_of_file(metadata, tokenizer, file_name)
    return template_for(name, profile.wording), f"{name}: {reason}"


def _template_of_file(metadata: Mapping[str, Any], tokenizer: Tokenizer, file_name: str) -> tuple[str, str]:
    """A template's name and the reason."""
    names = [str(metadata.get(f"general.{key}") or "") for key in ("name", "basename", "finetune")]
    for name in (*names, file_name):
        for pattern, template in NAMES:
            if re.search(pattern, name.lower()):
                return template, f"the model's name is '{name}'"
    chat_template = str(metadata.get("tokenizer.chat_template") or "")
    for words, template in CHAT_TEMPLATES:
        if words in chat_template:
            return template, f"the file's chat template has '{words}'"
    for token, template in TOKENS:
        if tokenizer.id_of(token) is not None:
            return template, f"the vocabulary has {token}"
    if str(metadata.get("llama.rope.freq_base")) == "1000000.0":
        return "mistral", "rope.freq_base is 1000000, as in Mistral 0.2"
    return "vicuna", "nothing in the file says otherwise"


def build(template: Template, question: str, n_images: int = 1) -> list[Part]:
    """One user turn with all pictures first, each followed by the template's ``after_image``.

    >>> build(TEMPLATES["mistral"], "Why?")
    ['[INST] ', ImageSlot(index=0), '\\nWhy? [/INST]']
    """
    text = template.before + (IMAGE + template.after_image) * n_images
    return _join([*_slots(text), question + template.after])


def encode_prompt(
    parts: Sequence[Part], tokenizer: Tokenizer, space_prefix: SpacePrefix = "each_text"
) -> list[list[int] | ImageSlot]:
    """Token ids of each stretch of text, as the original's ``tokenizer_image_token`` makes them.

    Each stretch is tokenised alone (so SentencePiece puts a space in front of each, unless ``space_prefix``
    is "first_text"), and BOS stays only at the very start, even where a picture comes first.
    """
    encoded: list[list[int] | ImageSlot] = []
    if _adds_bos(tokenizer):
        encoded.append([tokenizer.bos_id])  # type: ignore[list-item]
    for i, part in enumerate(parts):
        if isinstance(part, ImageSlot):
            encoded.append(part)
            continue
        prefix: Prefix = "no_text" if space_prefix == "first_text" and i > 0 else space_prefix
        ids = tokenizer.encode(part, add_bos=False, space_prefix=prefix)
        if encoded and isinstance(encoded[-1], list):
            encoded[-1] += ids
        elif ids:
            encoded.append(ids)
    return encoded


def _adds_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.add_bos and tokenizer.bos_id is not None


# --- pictures inside a prompt ---

PICTURE_TAG = re.compile(r'<img\s+src="data:image/[\w.+-]+;base64,([^"]*)"[^<>]*>')
PICTURE_TAG_START = re.compile(r'<img\s+src="data:')


def is_full_prompt(text: str) -> bool:
    """Whether the user wrote the whole prompt: it says where the pictures go, so no template is applied."""
    return IMAGE in text


def parse_full_prompt(text: str) -> list[Part | bytes]:
    """Cut a prompt at ``<image>`` (a slot) and ``<img src="data:image/jpeg;base64,...">`` (the file's bytes).

    The text around them stays as it is. Raises UsageError for a tag that is not closed or not base64.

    >>> parse_full_prompt("<image>\\nWhat?")
    [ImageSlot(index=0), '\\nWhat?']
    """
    parts: list[Part | bytes] = []
    pieces = PICTURE_TAG.split(text)  # text, base64, text, base64, ..., text
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append(_decode_picture(piece))
            continue
        if PICTURE_TAG_START.search(piece):
            hint = 'Write <img src="data:image/jpeg;base64,...">'
            raise UsageError("prompt", "a picture tag is not closed or not base64", hint=hint)
        n_slots = sum(isinstance(part, ImageSlot) for part in parts)
        parts += _slots(piece, n_slots)
    return parts


def take_pictures(text: str) -> tuple[str, list[bytes]]:
    """A question without its base64 pictures, and the pictures: for prompts that still go into a template."""
    parts = parse_full_prompt(text)
    words = [IMAGE if isinstance(part, ImageSlot) else part for part in parts if not isinstance(part, bytes)]
    return "".join(words), [part for part in parts if isinstance(part, bytes)]


Picture = TypeVar("Picture")


def place_pictures(
    parts: Sequence[Part | bytes], pictures: Sequence[Picture]
) -> tuple[list[Part], list[Picture | bytes]]:
    """Give each slot its picture, in order, and each base64 picture a slot of its own.

    Returns the prompt with its slots numbered afresh, and the pictures in that order. Raises UsageError if
    the prompt has more or fewer slots than there are pictures.
    """
    n_slots = sum(isinstance(part, ImageSlot) for part in parts)
    if n_slots != len(pictures):
        times = ("nowhere", "once", "twice")[n_slots] if n_slots < 3 else f"{n_slots} times"
        found = f"{IMAGE} {times}, but {len(pictures)} picture{'s' * (len(pictures) != 1)}"
        raise UsageError("prompt", found, hint=f"Give one --image for each {IMAGE}")
    waiting = iter(pictures)
    placed: list[Part] = []
    ordered: list[Picture | bytes] = []
    for part in parts:
        if isinstance(part, str):
            placed.append(part)
            continue
        placed.append(ImageSlot(len(ordered)))
        ordered.append(part if isinstance(part, bytes) else next(waiting))
    return placed, ordered


def _slots(text: str, first: int = 0) -> list[Any]:
    """Text cut at ``<image>``; slots are counted from ``first``, and empty text is left out."""
    parts: list[Part] = []
    for i, piece in enumerate(text.split(IMAGE)):
        if i > 0:
            parts.append(ImageSlot(first + i - 1))
        if piece:
            parts.append(piece)
    return parts


def _join(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts become one, since each is tokenised alone."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _decode_picture(text: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("prompt", f"a picture tag is not base64: {error}") from None
    if not data:
        raise UsageError("prompt", "a picture tag is empty")
    return data


ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}
ESCAPE = re.compile(rb"""\\(?:([nrt'"\\])|x([0-9A-Fa-f]{2}))""")


def unescape(text: str) -> str:
    r"""Replace ``\n \r \t \' \" \\`` and ``\xHH`` (a byte of UTF-8); other backslashes stay, as in llama.cpp.

    >>> unescape(r"a\nb\xc3\xa9\q")
    'a\nbé\\q'
    """
    data = text.encode("utf-8", "surrogatepass")
    data = ESCAPE.sub(lambda match: ESCAPES[match[1]] if match[1] else bytes([int(match[2], 16)]), data)
    return data.decode("utf-8", "replace")


# --- where the answer ends ---


class StopScanner:
    """Passes an answer on piece by piece and stops before a stop text.

    The end of a piece that may be the beginning of a stop text is held back, so the output does not depend on
    how the answer was cut into pieces. The stop text that is complete first counts; of two that end together,
    the longer.
    """

    def __init__(self, stop_texts: Sequence[str] = STOP_TEXTS) -> None:
        self._stop_texts = [text for text in stop_texts if text]
        self._held = ""
        self.stopped: str | None = None  # the stop text that was met

    def push(self, piece: str) -> str:
        """The part of the answer that is now certain. Nothing comes after a stop."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop_texts if stop in text]
        if found:
            end, _, self.stopped = min(found)
            self._held = ""
            return text[: end - len(self.stopped)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the answer ended without a stop text."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop text begins."""
        longest = max((len(stop) for stop in self._stop_texts), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_texts):
                return length
        return 0
