"""Greedy answers of llama-llava-cli and of libmtmd, driven as llama-mtmd-cli drives it."""

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from golden.compat import ANSWER_TOKENS, DEMO_ANSWERS, RANDOM_ANSWERS, SPECS, picture_path
from golden.manifest import record, save_json, versions
from golden.models import LANGUAGE, write_language_model, write_mmproj
from golden.pictures import picture

TOLERANCE = "exact: greedy text"


def cases(folder: Path) -> list[tuple[str, Path, Path, Path, str]]:
    """(key, language model, mmproj, picture, question); models and pictures are written into the folder."""
    write_language_model(folder / "vicuna.gguf", LANGUAGE["vicuna"])
    found = []
    for spec, (width, height), question in RANDOM_ANSWERS:
        image, mmproj = folder / f"{width}x{height}.png", folder / f"{spec}.gguf"
        write_mmproj(mmproj, SPECS[spec])
        Image.fromarray(picture(width, height)).save(image)
        found.append((f"{spec}|{width}x{height}|{question}", folder / "vicuna.gguf", mmproj, image, question))
    pair = picture_path("demo-model.gguf"), picture_path("demo-mmproj.gguf")
    for file, question in DEMO_ANSWERS:
        found.append((f"demo|{file}|{question}", *pair, picture_path(file), question))
    return found


def make_cli(program: str) -> None:
    """answers-llava-cli.json.gz: case -> what llama-llava-cli prints, as hexadecimal bytes"""
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, model, mmproj, image, question in cases(Path(folder)):
            command = [program, "-m", model, "--mmproj", mmproj, "--image", image, "-p", question]
            command += ["-n", str(ANSWER_TOKENS), "--temp", "0", "-t", "1"]
            output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
            answers[key] = output.split(b"per image patch)\n\n")[1].removesuffix(b"\n").hex()
            print(key, bytes.fromhex(answers[key]))
    path = save_json("answers-llava-cli.json.gz", answers)
    packages = versions("gguf", "numpy") | {"llama-cpp-python": "0.3.7"}
    record(path, "answers-llava-cli LLAMA_LLAVA_CLI", packages, TOLERANCE)


def make_mtmd() -> None:
    """answers-mtmd.json.gz: case -> [ids of the prompt (-1 is a picture's tile), ids of the answer]"""
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, model, mmproj, image, question in cases(Path(folder)):
            answers[key] = mtmd_answer(model, mmproj, np.array(Image.open(image).convert("RGB")), question)
            print(key, answers[key])
    path = save_json("answers-mtmd.json.gz", answers)
    record(path, "answers-mtmd", versions("llama-cpp-python", "gguf", "numpy"), TOLERANCE)


def mtmd_answer(model: Path, mmproj: Path, rgb: Any, question: str) -> list[list[int]]:
    """What llama-mtmd-cli --chat-template vicuna --temp 0 -ctk f32 -ctv f32 -fa off does.

    Prompt ids, and answer ids without the end. Keys and values of F16 would decide between near equal logits.
    """
    import llama_cpp
    from llama_cpp import mtmd_cpp

    params = llama_cpp.llama_model_default_params()
    llama = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx, context_params.n_threads = 2048, 1
    context_params.type_k = context_params.type_v = 0  # F32
    context_params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(llama, context_params)
    vision_params = mtmd_cpp.mtmd_context_params_default()
    vision_params.use_gpu = vision_params.print_timings = False
    vision_params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    vision = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), llama, vision_params)

    marker = mtmd_cpp.mtmd_default_marker()
    message = llama_cpp.llama_chat_message(role=b"user", content=marker + question.encode())
    messages, buffer = (llama_cpp.llama_chat_message * 1)(message), ctypes.create_string_buffer(4096)
    length = llama_cpp.llama_chat_apply_template(b"vicuna", messages, 1, True, buffer, 4096)
    prompt = buffer.raw[:length]
    rgb = np.ascontiguousarray(rgb)
    data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd_cpp.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], data)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    text = mtmd_cpp.mtmd_input_text(prompt, len(prompt), True, True)
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    if mtmd_cpp.mtmd_tokenize(vision, chunks, ctypes.byref(text), bitmaps, 1) != 0:
        raise SystemExit("mtmd_tokenize fails")
    past = ctypes.c_int(0)
    if mtmd_cpp.mtmd_helper_eval_chunks(vision, context, chunks, 0, 0, 512, True, ctypes.byref(past)) != 0:
        raise SystemExit("mtmd_helper_eval_chunks fails")

    vocabulary, answer = llama_cpp.llama_model_get_vocab(llama), []
    for _ in range(ANSWER_TOKENS):
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(context, -1), (llama_cpp.llama_vocab_n_tokens(vocabulary),)
        )
        token = int(logits.argmax())
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            break
        answer.append(token)
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode fails")
    ids = prompt_ids(chunks)
    llama_cpp.llama_free(context)
    mtmd_cpp.mtmd_free(vision)
    llama_cpp.llama_model_free(llama)
    return [ids, answer]


def prompt_ids(chunks: Any) -> list[int]:
    """Token ids, with -1 for each of a picture's pieces."""
    from llama_cpp import mtmd_cpp

    ids = []
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            ids.append(-1)
            continue
        count = ctypes.c_size_t(0)
        tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        ids += [int(tokens[j]) for j in range(count.value)]
    return ids
