"""From checkpoints to GGUF, with NumPy alone.

    pipeline.py          a folder -> the pair of files: what `tinyllava convert` does
    layout.py            a checkpoint's arrays sorted into language model, vision tower, projector
    language_model.py    config, tensors and metadata of the language model's file
    image_encoder.py     the same for the mmproj file
    tensors.py           one array on its way, row by row
    vocabulary.py        tokenizer files -> tokenizer.ggml.*; sentencepiece.py and tokenizer_json.py read them
    surgery.py           projector and tower as files of their own, for those who follow the guide of 2023
    mixture.py           which block format each tensor gets when a file is quantized
"""
