"""Every error that a file or a user can cause.

    TinyLLaVAError                 one line: where, what was found, what was wanted, what to do
    ├── FileError                  a file is missing, truncated, damaged or of another format
    ├── ModelError                 the file is sound, but it is not a model that tinyllava runs
    ├── PictureError               a picture cannot be opened, or is too large to be safe
    └── UsageError                 a setting, a prompt or a combination of them makes no sense
        └── ContextError           the prompt and the answer do not fit the context window

The command line prints the message and exits with 2. A bug of tinyllava's own is never one of these:
it keeps its traceback.
"""

from __future__ import annotations

MAX_LENGTH = 600  # characters; a message quotes its input, and inputs can be long


class TinyLLaVAError(Exception):
    """One line for a person: ``where: found; wanted X. What to do.``

    >>> str(TinyLLaVAError("a.gguf", "version 1", wanted="2 or 3", hint="Convert it again"))
    'a.gguf: version 1; wanted 2 or 3. Convert it again.'
    """

    def __init__(self, where: object, found: str, *, wanted: str = "", hint: str = "") -> None:
        self.where = str(where)
        self.found = found
        self.wanted = wanted
        self.hint = hint
        text = f"{where}: {found}" + (f"; wanted {wanted}" if wanted else "")
        super().__init__(_one_line(f"{text}. {hint.rstrip('.')}." if hint else text))


class FileError(TinyLLaVAError):
    """A file is missing, truncated, damaged, or of another format than its place asks for."""


class ModelError(TinyLLaVAError):
    """The file is well formed, but it is not a model (or a pair of models) that tinyllava runs."""


class PictureError(TinyLLaVAError):
    """A picture cannot be opened, is broken, or is too large to be safe."""


class UsageError(TinyLLaVAError):
    """A setting, a prompt, or a combination of them makes no sense."""


class ContextError(UsageError):
    """The prompt and the answer asked for do not fit the context window."""


def in_gib(size: int) -> str:
    """Bytes as messages say them: ``7.9 GiB``, or MiB if it is less than a tenth of that.

    >>> in_gib(5 << 29), in_gib(40 << 20)
    ('2.5 GiB', '40 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 // 10 else f"{max(size, 1) / 2**20:.0f} MiB"


def _one_line(text: str) -> str:
    """Text that fits one terminal line's worth of output: control characters escaped, length bounded."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return safe if len(safe) <= MAX_LENGTH else safe[: MAX_LENGTH - 1] + "…"
