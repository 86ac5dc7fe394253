"""From a picture to embeddings that a language model reads.

    image.py      a file -> pixels (h, w, 3), resized, padded, normalised
    resample.py   two filters of llama.cpp beside Pillow's
    anyres.py     which tiles a picture is cut into, and how their features become one row of tokens
    config.py     what a GGUF file says of its vision tower, and what is inferred where it says nothing
    clip.py       one tile (3, H, W) -> features of its patches (n_patches, n_embd)
    projector.py  features -> the language model's width (n_patches, n_embd_llm)
"""
