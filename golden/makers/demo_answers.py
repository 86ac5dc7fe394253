"""Greedy answers of the embedded demo pair by transformers and by the original LLaVA, each loading a checkpoint.

Both do all of it themselves: their tokenizer on their wording, their image processor, their generate().
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from golden.compat import ANSWER_TOKENS, DEMO_ANSWERS, IMAGE, picture_path
from golden.demo_checkpoint import IMAGE as HF_IMAGE
from golden.demo_checkpoint import VISION, write
from golden.makers.torch_answers import CLOSE
from golden.manifest import record, save_json, sha256

Answer = Callable[[Image.Image, str], tuple[list[int], Any]]  # -> (ids of the prompt, what generate() returns)


def make(name: str, open_peer: Callable[[Path], Answer], packages: dict[str, str]) -> None:
    """demo-<name>.json.gz: <picture>|<question> -> [ids of the prompt, -200 for the picture; ids of the answer]"""
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        answer = open_peer(Path(folder))
        for file, question in DEMO_ANSWERS:
            ids, output = answer(Image.open(picture_path(file)).convert("RGB"), question)
            best = [torch.topk(scores[0], 2).values for scores in output.scores]
            if min(float(first - second) for first, second in best) < CLOSE:
                raise SystemExit(f"{file} {question}: two tokens are too close: take another question")
            answers[f"{file}|{question}"] = [ids, output.sequences[0, -len(best) :].tolist()]
            print(file, question, answers[f"{file}|{question}"])
    path = save_json(f"demo-{name}.json.gz", answers)
    pair = {file: sha256(picture_path(file)) for file in ("demo-model.gguf", "demo-mmproj.gguf")}
    record(path, f"demo-{name}", packages, "exact: prompt ids and greedy tokens", source=pair)


def settings() -> dict[str, Any]:
    """What generate() is told: greedy, and its logits are kept (no processor changes them)."""
    more = {"return_dict_in_generate": True, "output_scores": True}
    return {"do_sample": False, "max_new_tokens": ANSWER_TOKENS, **more}


def make_hf() -> None:
    """demo-hf.json.gz: LlavaForConditionalGeneration with its processor, the image processor on Pillow."""
    from golden.manifest import versions

    make("hf", open_hf, versions("torch", "transformers", "tokenizers", "pillow", "numpy", "gguf"))


def open_hf(folder: Path) -> Answer:
    """The checkpoint in transformers' layout."""
    import transformers
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    write(folder, "hf")
    kind = transformers.LlavaForConditionalGeneration
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(str(info))
    side = VISION.image_size
    processor = transformers.LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        transformers.LlamaTokenizer.from_pretrained(folder),
        patch_size=VISION.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

    def answer(image: Image.Image, question: str) -> tuple[list[int], Any]:
        batch = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        ids = batch["input_ids"][0].tolist()
        first = ids.index(HF_IMAGE)
        shown = [*ids[:first], IMAGE, *(i for i in ids[first:] if i != HF_IMAGE)]
        return shown, model.eval().generate(**batch, **settings())

    return answer


def make_original() -> None:
    """demo-llava.json.gz: as llava/serve/cli.py asks, in float32."""
    from golden.makers.original import original_versions
    from golden.manifest import versions

    make("llava", open_original, original_versions() | versions("gguf", "sentencepiece"))


def open_original(folder: Path) -> Answer:
    """The checkpoint in the original's layout."""
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers import AutoTokenizer

    write(folder, "original")
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    kind = LlavaLlamaForCausalLM
    model, info = kind.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(str(info))
    tower = model.get_vision_tower()
    tower.load_model()

    def answer(image: Image.Image, question: str) -> tuple[list[int], Any]:
        talk = conv_templates["llava_v1"].copy()
        talk.append_message(talk.roles[0], f"<image>\n{question}")
        talk.append_message(talk.roles[1], None)
        ids = tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE)
        pixels = process_images([image], tower.image_processor, model.config)
        more = {"images": pixels, "image_sizes": [image.size], "use_cache": True}
        return ids, model.eval().generate(torch.tensor([ids]), **more, **settings())

    return answer
