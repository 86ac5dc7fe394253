"""What a file is that should have been a GGUF: said from its first bytes, for error messages."""

from __future__ import annotations

HEAD = 64  # bytes that looks_like() wants to see

# First bytes, what such a file is, what its owner should do. The first match counts.
_SIGNATURES: list[tuple[bytes, str, str]] = [
    (b"PK\x03\x04", "a zip archive, probably a PyTorch checkpoint (.bin, .pth)", "convert"),
    (b"\x80\x02", "a Python pickle, probably an old PyTorch checkpoint", "convert"),
    (b"\x80\x04", "a Python pickle", "convert"),
    (b"lmgg", "a ggml file of before GGUF (unversioned)", "reconvert"),
    (b"fmgg", "a ggml file of before GGUF (ggmf)", "reconvert"),
    (b"tjgg", "a ggml file of before GGUF (ggjt)", "reconvert"),
    (b"algg", "a ggml LoRA adapter of before GGUF (ggla)", "reconvert"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "lfs"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", "picture"),
    (b"\xff\xd8\xff", "a JPEG picture", "picture"),
    (b"GIF8", "a GIF picture", "picture"),
    (b"BM", "a BMP picture", "picture"),
    (b"II*\x00", "a TIFF picture", "picture"),
    (b"MM\x00*", "a TIFF picture", "picture"),
    (b"\x1f\x8b", "a gzip archive", "unpack"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack"),
    (b"%PDF", "a PDF document", ""),
    (b"\x93NUMPY", "a NumPy array (.npy)", ""),
    (b"\n\x0e\n\x05<unk>", "a SentencePiece model (tokenizer.model)", ""),
]
_HINTS = {
    "convert": "Convert it to GGUF first",
    "reconvert": "Convert the original model again, to GGUF",
    "lfs": "Fetch the file itself with `git lfs pull`",
    "picture": "Give pictures with --image",
    "unpack": "Unpack it first",
    "download": "Download it again",
    "": "",
}


def looks_like(head: bytes) -> tuple[str, str]:
    """What the file with these first bytes is, and what to do about it (or an empty string).

    >>> looks_like(b"GIF89a")
    ('a GIF picture', 'Give pictures with --image')
    """
    if not head:
        return "an empty file", _HINTS["download"]
    for signature, name, hint in _SIGNATURES:
        if head.startswith(signature):
            return name, _HINTS[hint]
    # A safetensors file starts with the length of its JSON header, as a 64-bit number.
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file", _HINTS["convert"]
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP picture", _HINTS["picture"]
    return _looks_like_text(head)


def _looks_like_text(head: bytes) -> tuple[str, str]:
    if not head.strip(b"\0"):
        return "a file that starts with zeros, such as an unfinished download", _HINTS["download"]
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as a server's error message", _HINTS["download"]
    if start.startswith((b"{", b"[")):
        return "a JSON file", ""
    text = head.decode("utf-8", "replace").rstrip("\ufffd")  # the head may end inside a character
    if all(character.isprintable() or character in "\t\r\n" for character in text) and "\ufffd" not in text:
        return "a text file", ""
    return f"a file that starts with {head[:4]!r}", ""
