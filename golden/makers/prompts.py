"""What the original LLaVA makes of a question: a prompt, and the token ids around the picture."""

import tempfile
from pathlib import Path
from typing import Any

from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from transformers import LlamaTokenizer

from golden.manifest import record, save_json, sha256, versions

TEMPLATES = "llava_v0 llava_v1 vicuna_v1 llava_llama_2 mistral_instruct chatml_direct mpt plain".split()

# (question, answer) pairs; the last answer is still to come. The first question gets the picture before it.
TALKS: list[list[tuple[str, str | None]]] = [
    [("What is in this picture?", None)],
    [("Describe the image.\nBe brief.", None)],
    [("  two  spaces and a tab\t", None)],
    [("Où est le chat ? 🙂", None)],
    [("图片里有什么？", None)],
    [("", None)],
    [("What is it?", "A cat."), ("What colour is it?", None)],
    [("One", "Two"), ("Three", "Four\n"), ("Five", None)],
]


def prompt_of(template: str, talk: list[tuple[str, str | None]]) -> str:
    """The prompt as the original's command line builds it: "<image>", a line end, the question."""
    conversation = conv_templates[template].copy()
    for i, (question, answer) in enumerate(talk):
        conversation.append_message(conversation.roles[0], ("<image>\n" if i == 0 else "") + question)
        conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


def tokenizers(tokenizer_model: str, folder: str) -> dict[str, Any]:
    """transformers' slow tokenizer, with and without its old habit of a space after special tokens."""
    vocabulary = Path(folder) / "tokenizer.model"
    vocabulary.write_bytes(Path(tokenizer_model).read_bytes())
    return {str(legacy): LlamaTokenizer(str(vocabulary), legacy=legacy) for legacy in (True, False)}


def make_prompts(tokenizer_model: str) -> None:
    """prompts.json.gz: template, talk, prompt, ids by the tokenizer's `legacy`; -200 is the picture"""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        by_legacy = tokenizers(tokenizer_model, folder)
        for template in TEMPLATES:
            for talk in TALKS[:6] if template == "plain" else TALKS:  # plain has no second turn
                prompt = prompt_of(template, talk)
                ids = {legacy: tokenizer_image_token(prompt, t) for legacy, t in by_legacy.items()}
                cases.append({"template": template, "talk": talk, "prompt": prompt, "ids": ids})
    path = save_json("prompts.json.gz", cases)
    packages = versions("llava-torch", "transformers", "sentencepiece")
    source = {"file": Path(tokenizer_model).name, "sha256": sha256(tokenizer_model)}
    record(path, "prompt-ids TOKENIZER_MODEL", packages, "exact: integers and text", source=source)
