"""Train the demo for a fixed time on one GPU.

    python golden/demo/train.py --sprites sprites.npz --tokenizer tokenizer.model --seconds 540 --out OUT

Pictures are invented on the CPU, drawn on the GPU and never seen twice.  `--init` continues from a
checkpoint (three files of half-precision weights) with a fresh optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from batches import BEFORE, NOT_A_TARGET, make_batch
from compose import (
    FIRST_NOUN_CLASS,
    PAD_COLOR,
    Brush,
    bicubic_matrix,
    contrast_table,
    draw,
    inside_picture,
    load_sprites,
    make_atlas,
    patch_classes,
    shrink,
)
from model import Config, TinyLlava, dense_mask
from muon import Muon
from photos import paint_pool, pick_from
from prompts import WordTokenizer
from scenes import MAX_OBJECTS, Library
from torch import Tensor
from torch.nn import functional as F
from vocabulary import read_nouns

CANVAS_PX = (168, 96, 128, 224, 336, 448)  # sizes of original pictures; all but 168 are resized
CANVAS_WEIGHTS = (56, 6, 12, 14, 10, 2)


class Batches(torch.utils.data.IterableDataset):
    """Endless random batches, a different stream in every worker."""

    def __init__(self, library: Library, tokenizer: Path, rows: int, photos: int, seed: int) -> None:
        """rows: pictures per batch, the first `photos` of them photo-like."""
        self.library, self.tokenizer, self.rows, self.photos, self.seed = library, tokenizer, rows, photos, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches as tensors; the canvas size is part of the batch."""
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (info.id if info else 0))
        tokenizer = WordTokenizer(self.tokenizer)
        while True:
            batch = make_batch(rng, self.library, tokenizer, self.rows, self.photos)
            batch["canvas"] = np.array(rng.choices(CANVAS_PX, CANVAS_WEIGHTS)[0])
            yield {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}


class Painter:
    """Turns a batch's description into network input, on the model's device."""

    def __init__(self, pixels: np.ndarray, device: str, pool: int) -> None:
        """pixels: all sprites; pool: how many photo-like pictures to paint first."""
        self.device, self.atlas = device, make_atlas(pixels, device)
        self.pad = torch.tensor(PAD_COLOR, device=device)[:, None, None]
        self.matrices = {px: torch.from_numpy(bicubic_matrix(px, 168)).to(device) for px in CANVAS_PX if px != 168}
        self.pool = paint_pool(pool, self.atlas, len(pixels), device, min(pool, 256))
        self.brush = Brush(device == "cuda")

    @torch.no_grad()
    def canvas(self, spec: dict[str, Tensor], side_px: int) -> Tensor:
        """(B, 3, side, side) bytes as floats: the padded picture before it is resized."""
        canvas = draw(spec, self.atlas, side_px, MAX_OBJECTS, self.brush)
        photos = (spec["photo"] >= 0).nonzero()[:, 0]
        if len(photos):
            canvas[photos] = pick_from(self.pool, spec["photo"][photos], side_px)
        rows = torch.rand(len(canvas), 1, 1, 1, device=self.device)
        canvas = canvas + torch.randn_like(canvas) * (rows * 12 - 6).clamp(min=0)  # grain in half of the pictures
        inside = inside_picture(spec, side_px, canvas.device)
        return torch.where(inside, canvas, self.pad).round().clamp(0, 255)

    @torch.no_grad()
    def __call__(self, spec: dict[str, Tensor], side_px: int) -> tuple[Tensor, Tensor]:
        """(B, 3, 168, 168) normalised pixels, (B, 144) patch classes."""
        pixels = shrink(self.canvas(spec, side_px), self.matrices.get(side_px))
        return pixels, patch_classes(spec, self.atlas, MAX_OBJECTS)


def losses(
    model: TinyLlava, pixels: Tensor, classes: Tensor, batch: dict[str, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens and of the patches' names."""
    features = model.vision(pixels)
    patch_loss = F.cross_entropy(model.patch_head(features).float().flatten(0, 1), classes.flatten())
    x = model.embed(batch["tokens"], model.project(features), BEFORE)
    hidden = model.language(x, batch["positions"], mask)
    hidden = hidden.gather(1, batch["target_at"][:, :, None].expand(-1, -1, hidden.shape[2]))
    logits = model.output(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, batch["targets"].flatten(), ignore_index=NOT_A_TARGET), patch_loss


def rate(progress: float) -> float:
    """Learning rate over the run: a short rise, a plateau, a straight line to zero."""
    return min(1.0, progress / 0.02 + 0.02) if progress < 0.4 else max(0.0, (1 - progress) / 0.6)


def save(model: TinyLlava, out: Path) -> None:
    """Half-precision weights in three files, each under 16 MiB, without the training-only head."""
    state = {k: v.detach().half().cpu() for k, v in model.state_dict().items()}
    parts = [{k: v for k, v in state.items() if k.startswith("vision")},
             {k: v for k, v in state.items() if not k.startswith(("vision", "patch_head"))},
             {k: v for k, v in state.items() if k.startswith("patch_head")}]  # fmt: skip
    for i, part in enumerate(parts):
        torch.save(part, out / f"weights-{i}.pt")


def load(model: TinyLlava, folder: Path) -> None:
    """Read what `save` wrote."""
    state: dict[str, Tensor] = {}
    for i in range(3):
        state |= torch.load(folder / f"weights-{i}.pt", map_location="cpu")
    model.load_state_dict({k: v.float() for k, v in state.items()})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="of training, data preparation not counted")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pool", type=int, default=16384, help="photo-like pictures")
    parser.add_argument("--photos", type=float, default=0.05, help="their share of a batch")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patch-weight", type=float, nargs=2, default=(0.5, 0.1))
    parser.add_argument("--evaluate", type=int, default=400, help="scenes per evaluation suite, 0 for none")
    return parser.parse_args()


class Clock:
    """Progress 0..1 of the time budget."""

    def __init__(self, seconds: float) -> None:
        """Starts when the first steps are done, so that most of the compilation does not count."""
        self.seconds, self.start, self.progress = seconds, 0.0, 0.0

    def tick(self, step: int) -> float:
        """Look at the clock every 10 steps."""
        if step == 3:
            self.start = time.time()
        elif step % 10 == 0 and step > 3:
            self.progress = (time.time() - self.start) / self.seconds
        return self.progress


def train(
    args: argparse.Namespace, model: TinyLlava, painter: Painter, loader: Iterator[dict[str, Tensor]]
) -> None:
    """Until the time is up."""
    on_gpu = args.device == "cuda"
    optimizer = Muon(model, args.lr)
    step_losses = torch.compile(losses, dynamic=False) if on_gpu else losses
    make_mask = torch.compile(dense_mask, dynamic=False) if on_gpu else dense_mask
    clock, step, waited = Clock(args.seconds), 0, 0.0
    while (progress := clock.tick(step)) < 1:
        before = time.time()
        batch = next(loader)
        waited += time.time() - before
        side_px = int(batch.pop("canvas"))
        batch = {name: value.to(args.device, non_blocking=True) for name, value in batch.items()}
        pixels, classes = painter(batch, side_px)
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            loss, patch_loss = step_losses(model, pixels, classes, batch, make_mask(batch["segments"]))
        weight = args.patch_weight[0] + (args.patch_weight[1] - args.patch_weight[0]) * min(1.0, progress / 0.7)
        (loss + weight * patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step(rate(progress))
        model.zero_grad(set_to_none=False)
        if step % 100 == 0 or step < 3:
            print(
                f"{step:6d} {progress:6.3f} loss {loss.item():.4f} patch {patch_loss.item():.4f} "
                f"time {time.time() - clock.start if clock.start else 0:6.1f} waited {waited:5.1f}",
                flush=True,
            )
        step += 1
    print(f"{step} steps of {args.batch} pictures", flush=True)


def open_data(args: argparse.Namespace, library: Library) -> Iterator[dict[str, Tensor]]:
    """Start the workers that invent batches."""
    data = Batches(library, args.tokenizer, args.batch, round(args.photos * args.batch), args.seed * 100)
    options: dict = {"prefetch_factor": 4} if args.workers else {}
    pin = args.device == "cuda"
    return iter(
        torch.utils.data.DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=pin, **options)
    )


def main() -> None:
    """Prepare, train, save, evaluate."""
    args = arguments()
    began = time.time()
    torch.set_float32_matmul_precision("high")
    pixels, facts = load_sprites(args.sprites)
    contrast = contrast_table(pixels)
    loader = open_data(args, Library(facts, read_nouns(), contrast))
    torch.manual_seed(args.seed)
    model = TinyLlava(Config(), FIRST_NOUN_CLASS + len(read_nouns())).to(args.device)
    if args.init:
        load(model, args.init)
    painter = Painter(pixels, args.device, args.pool)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, ready after {time.time() - began:.0f} s", flush=True)
    train(args, model, painter, loader)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out)
    if args.evaluate:
        from score import evaluate_all

        painter.brush = Brush(False)
        tokenizer = WordTokenizer(args.tokenizer)
        results = evaluate_all(model, painter, facts, contrast, tokenizer, args.evaluate, args.device)
        (args.out / "scores.json").write_text(json.dumps(results, indent=1))
    print(f"done after {time.time() - began:.0f} s", flush=True)
    os._exit(0)  # the workers never end by themselves


if __name__ == "__main__":
    main()
