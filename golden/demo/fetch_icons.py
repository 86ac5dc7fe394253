"""Download the icon sets that the demo's pictures are drawn from, and check them.

    python golden/demo/fetch_icons.py ICONS_DIR

Each set is one npm package of Iconify JSON (name -> SVG body).  `icon_sets.json` pins version and
sha512; a package whose bytes differ is refused.  Needs the `npm` client, nothing from Python.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent


def read_pins() -> list[dict]:
    """The pinned sets: name, package, version, integrity, license, author, role, colored."""
    return json.loads((HERE / "icon_sets.json").read_text(encoding="utf8"))["sets"]


def integrity(archive: Path) -> str:
    """The npm integrity string of a file: "sha512-" + base64 of its digest."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def fetch(pin: dict, folder: Path) -> None:
    """Put `icons.json` and `info.json` of one set into folder/NAME/."""
    target = folder / pin["name"]
    if (target / "icons.json").exists():
        return
    spec = f"{pin['package']}@{pin['version']}"
    done = subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, check=True, capture_output=True)
    archive = folder / done.stdout.decode().split()[-1]
    if integrity(archive) != pin["integrity"]:
        raise SystemExit(f"{archive.name}: {integrity(archive)}, but icon_sets.json pins {pin['integrity']}")
    target.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in ("icons.json", "info.json"):
            member = tar.extractfile(f"package/{name}")
            assert member is not None
            (target / name).write_bytes(member.read())
    archive.unlink()


def main() -> None:
    """Fetch every pinned set into the folder given on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for pin in read_pins():
        fetch(pin, folder)
        print(f"{pin['name']:28} {pin['version']:8} {pin['license']}")


if __name__ == "__main__":
    main()
