"""Writing golden files so that the same content gives the same bytes, and recording where each came from."""

import gzip
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "MANIFEST.json"


def save_arrays(name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Path:
    """Write golden/<name> (.npz); float64 becomes float32."""
    narrowed = {key: a.astype(np.float32) if a.dtype == np.float64 else a for key, a in arrays.items()}
    np.savez_compressed(FOLDER / name, **narrowed)
    return FOLDER / name


def save_json(name: str, value: object) -> Path:
    """Write golden/<name> as JSON, gzipped where the name ends in .gz (no time stamp in the header)."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    data = text.encode() + b"\n"
    path = FOLDER / name
    path.write_bytes(gzip.compress(data, 9, mtime=0) if name.endswith(".gz") else data)
    return path


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, without local labels such as +cpu; a package that is missing is an error."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError as error:
            raise SystemExit(f"{package} is not installed: golden/README.md says how to set it up") from error
    return found


def record(path: Path, command: str, packages: dict[str, str], tolerance: str, **more: object) -> None:
    """Add or replace the manifest's entry of one golden file. `more`: provenance, as a model's sha256."""
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    manifest[path.name] = {
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "command": f"python -m golden.make {command}",
        "versions": packages,
        "tolerance": tolerance,
        **more,
    }
    MANIFEST.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def problems() -> list[str]:
    """What is wrong between golden/ and its manifest: files missing, changed, or not listed."""
    manifest = json.loads(MANIFEST.read_text())
    here = {path.name for pattern in ("*.npz", "*.json", "*.json.gz") for path in FOLDER.glob(pattern)}
    here.discard(MANIFEST.name)
    found = [f"{name}: in the manifest, but not there" for name in sorted(manifest.keys() - here)]
    found += [f"{name}: not in the manifest" for name in sorted(here - manifest.keys())]
    for name in sorted(here & manifest.keys()):
        if sha256(FOLDER / name) != manifest[name]["sha256"]:
            found.append(f"{name}: changed; run {manifest[name]['command']}")
    return found


if __name__ == "__main__":
    raise SystemExit("\n".join(problems()) or None)
