"""The embedded demo pair: LLaVA-1.5's architecture, small, trained on drawings (see golden/demo/README.md)."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "demo-model.gguf"
MMPROJ = FOLDER / "demo-mmproj.gguf"
PICTURE = FOLDER / "demo.png"
QUESTION = "What is in the picture?"
