"""MTLoRA for three dense tasks of one picture: nuclei of cells, their edges, and how deep in one a pixel lies.

The base is a small Swin that has learned CIFAR-10's photographs; the heads are DenseHeads over the features of its
stages, for each task alike.  Every way to tune it gets the same steps and the same three learning rates.
"""

from __future__ import annotations

import io
import itertools
import statistics
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification, SwinModel

import pegbox
from benchmarks.kept import Kept, spelled
from pegbox.core.dense_heads import DenseHeads
from pegbox.methods.mtlora import features
from pegbox.objectives.metrics import delta_m
from zoo import images

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "dense_tasks"
PAIRS = ROOT.parent / "shared" / "data" / "nuclei_seg" / "pairs.zip"
CONFIG: dict[str, Any] = {"patch_size": 2, "embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8]}
WIDTHS = (64, 128, 128)  # of its stages, downsampled
EPOCHS, PHOTOGRAPHS = 20, 64  # of the base, and in one of its steps
SEEDS, RATES = (1, 2, 3), (5e-4, 2e-3, 8e-3)
STEPS, ROWS, SIDE = 150, 8, 64  # of a run, crops in a step, pixels of a crop
PARTS = (80, 15, 25)  # pictures for learning, for the rate, for judging
DEPTH = 8  # pixels
OUTPUTS = {"nuclei": 2, "edges": 1, "depth": 1}
WEIGHTS = {"nuclei": 1.0, "edges": 10.0, "depth": 1.0}  # of the losses, which are near one another then
LOWER = ("depth",)  # an error
DIGITS = {"nuclei": 1, "edges": 1, "depth": 3}
LORA = {"rank": 12, "alpha": 48.0}  # as many numbers as the factors of MTLORA, and its scale
MTLORA: dict[str, Any] = {"tasks": tuple(OUTPUTS), "rank": 8, "task_rank": 4}
ALONE: dict[str, Any] = {"norms": False, "embeddings": False, "downsample": "lora"}
WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "heads alone": (None, {}),
    "LoRA": ("lora", LORA),
    "MTLoRA, its factors alone": ("mtlora", MTLORA | ALONE),
    "MTLoRA": ("mtlora", MTLORA),
    "full": ("full", {}),
}
Scores = dict[str, float]


@dataclass(frozen=True)
class Cells:
    """Pictures (N, 3, h, w), standardised, and, by task, what is to be told of them (N, h, w)."""

    pictures: Tensor
    told: Mapping[str, Tensor]

    def taken(self, rows: Tensor) -> Cells:
        return Cells(self.pictures[rows], {task: values[rows] for task, values in self.told.items()})

    def tiles(self) -> Cells:
        """Each picture cut into squares."""

        def cut(x: Tensor) -> Tensor:
            squares = x.unfold(-2, SIDE, SIDE).unfold(-2, SIDE, SIDE)  # (N, ..., rows, columns, SIDE, SIDE)
            return squares.movedim((-4, -3), (1, 2)).flatten(0, 2)

        return Cells(cut(self.pictures), {task: cut(values) for task, values in self.told.items()})

    def crops(self, seed: int) -> Iterator[Cells]:
        """Batches of squares from anywhere, some turned over; without end."""
        draw = torch.Generator().manual_seed(seed)
        most = self.pictures.shape[-1] - SIDE
        while True:
            rows, ys, xs = (torch.randint(n, (ROWS,), generator=draw) for n in (len(self.pictures), most, most))
            turned = [tuple(at for at in (-1, -2) if torch.rand((), generator=draw) < 0.5) for _ in range(ROWS)]
            places = list(zip(rows, ys, xs, turned, strict=True))

            def taken(x: Tensor, places: Sequence[Any] = places) -> Tensor:
                return torch.stack([x[n, ..., y : y + SIDE, z : z + SIDE].flip(over) for n, y, z, over in places])

            yield Cells(taken(self.pictures), {task: taken(values) for task, values in self.told.items()})


Parts = tuple[Cells, Cells, Cells]


def dense_tasks() -> tuple[str, str]:
    """What was done, in words, and a table: each way beside models of one task each."""
    kept, base = Kept(RUN / "results.json"), RUN / "base"
    right = kept.once("base", photographs_learned, base)
    parts = nuclei()
    jobs = [(way, tuple(OUTPUTS)) for way in WAYS] + [("full", (task,)) for task in OUTPUTS]
    found: dict[tuple[str, ...], list[Scores]] = {}
    rates: dict[tuple[str, ...], float] = {}
    for way, tasks in jobs:
        job = (way, *tasks)

        def run(rate: float, seed: int, way: str = way, tasks: tuple[str, ...] = tasks) -> Scores:
            return kept.once(f"{way} {'+'.join(tasks)} {rate:g} {seed}", tuned, way, tasks, parts, base, rate, seed)

        rates[job] = min(RATES, key=lambda rate: run(rate, SEEDS[0])["loss"])
        found[job] = [run(rates[job], seed) for seed in SEEDS]
    single = [{task: found["full", task][k][task] for task in OUTPUTS} for k in range(len(SEEDS))]
    about = (
        f"A Swin of {right['numbers']:,.0f} numbers that tells {right['right']:.0%} of CIFAR-10's test photographs "
        f"apart; {PARTS[0]} pictures of nuclei, {STEPS} steps of {ROWS} crops of {SIDE} x {SIDE} pixels, of three "
        f"learning rates the best by the first seed's loss on {PARTS[1]} more, judged on {PARTS[2]}; {len(SEEDS)} "
        "seeds. Nuclei: mean IoU in percent; edges: the best F over thresholds, in percent; depth: mean error in "
        f"pixels up to {DEPTH}. Δm: mean relative change from full tuning of a model for each task, in percent. "
        "Trained: without heads."
    )
    lines = [
        "| | rate | trained | nuclei | edges | depth | Δm |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        job = (way, *OUTPUTS)
        cells_of = [spelled([scores[task] for scores in found[job]], DIGITS[task]) for task in OUTPUTS]
        of_seeds = zip(found[job], single, strict=True)
        changes = [delta_m({t: scores[t] for t in OUTPUTS}, alone, LOWER) for scores, alone in of_seeds]
        trained = f"{found[job][0]['trained']:,.0f}"
        lines.append(f"| {way} | {rates[job]:g} | {trained} | {' | '.join(cells_of)} | {spelled(changes, 1)} |")
    one = " | ".join(spelled([scores[task] for scores in single], DIGITS[task]) for task in OUTPUTS)
    lines.append(f"| full, a model for each task | | {3 * right['numbers']:,.0f} | {one} | |")
    return about, "\n".join(lines)


def tuned(way: str, tasks: Sequence[str], parts: Parts, base: Path, rate: float, seed: int) -> Scores:
    """Tune for some tasks; their scores on the judged pictures, and the loss on those by which rates are chosen."""
    learned, chosen, judged = parts
    torch.manual_seed(seed)
    model = SwinModel.from_pretrained(base, add_pooling_layer=False).requires_grad_(False)
    method, settings = WAYS[way]
    body = model if method is None else pegbox.tune(model, method, **settings)
    streams = method == "mtlora"
    heads = DenseHeads(WIDTHS, {task: OUTPUTS[task] for task in tasks})

    def told(pictures: Tensor) -> dict[str, Tensor]:
        if streams:
            stages: Mapping[str, Sequence[Tensor]] = features(body, pictures)  # type: ignore[arg-type]
        else:
            stages = dict.fromkeys(tasks, body(pictures, output_hidden_states=True).reshaped_hidden_states[1:])
        return heads(stages, (SIDE, SIDE))  # type: ignore[no-any-return]

    trained = [p for p in body.parameters() if p.requires_grad]
    body.train()
    optimizer = torch.optim.AdamW([*trained, *heads.parameters()], lr=rate)
    schedule = _schedule(optimizer, rate, STEPS)
    for batch in itertools.islice(learned.crops(seed), STEPS):
        optimizer.zero_grad()
        loss(told(batch.pictures), batch.told).backward()
        optimizer.step()
        schedule.step()
    body.eval()
    heads.eval()
    with torch.no_grad():
        on_chosen = loss(_all(told, chosen.pictures), chosen.told).item()
        scores = scored(_all(told, judged.pictures), judged.told)
    return scores | {"loss": on_chosen, "trained": float(sum(p.numel() for p in trained))}


def _all(told: Callable[[Tensor], dict[str, Tensor]], pictures: Tensor) -> dict[str, Tensor]:
    parts = [told(part) for part in pictures.split(50)]
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def loss(told: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy, balanced binary cross-entropy and L1, weighted."""

    def of(task: str, out: Tensor, are: Tensor) -> Tensor:
        if task == "nuclei":
            return F.cross_entropy(out, are.long())
        if task == "edges":
            share = are.mean()
            return F.binary_cross_entropy_with_logits(out[:, 0], are, torch.where(are > 0, 1 - share, share))
        return F.l1_loss(out[:, 0], are)

    return torch.stack([WEIGHTS[task] * of(task, out, want[task]) for task, out in told.items()]).sum()


def scored(told: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Scores:
    """By task: mean IoU and the best F in percent, mean error in pixels."""

    def of(task: str, out: Tensor, are: Tensor) -> float:
        if task == "nuclei":
            pairs = [(out.argmax(1) == k, are == k) for k in range(2)]
            return 100 * statistics.mean(float((a & b).sum() / (a | b).sum()) for a, b in pairs)
        if task == "edges":
            return 100 * max(_f(out[:, 0].sigmoid() > at / 20, are > 0) for at in range(1, 20))
        return float(F.l1_loss(out[:, 0], are))

    return {task: of(task, out, want[task]) for task, out in told.items()}


def _f(have: Tensor, are: Tensor) -> float:
    return float(2 * (have & are).sum() / (have.sum() + are.sum()))


def nuclei() -> Parts:
    """Pictures to learn from, and tiles of those by which rates are chosen and of those that are judged."""
    with zipfile.ZipFile(PAIRS) as files:
        names = sorted(name for name in files.namelist() if name.startswith("images/"))
        shown = [PIL.Image.open(io.BytesIO(files.read(name))).convert("RGB") for name in names]
        masks = [PIL.Image.open(io.BytesIO(files.read(name.replace("images", "masks")))) for name in names]
    pictures, which = (torch.from_numpy(np.stack([np.asarray(x) for x in found])).float() for found in (shown, masks))

    most = least = which[:, None]  # of the nuclei around a pixel, further and further away
    inner = []
    for _ in range(DEPTH):
        most, least = F.max_pool2d(most, 3, 1, 1), -F.max_pool2d(-least, 3, 1, 1)
        inner.append((most == least)[:, 0] & (which > 0))
    deep = torch.stack(inner).sum(0).float()
    told = {"nuclei": (which > 0).float(), "edges": ((which > 0) & ~inner[0]).float(), "depth": deep}
    whole = Cells(standardised(pictures.permute(0, 3, 1, 2)), told)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    learned, chosen, judged = (whole.taken(rows) for rows in order.split(PARTS))
    return learned, chosen.tiles(), judged.tiles()


def standardised(pictures: Tensor) -> Tensor:
    """Each of its own mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(pictures, (1, 2, 3), keepdim=True)
    return (pictures - mean) / deviation.clamp_min(1.0)


def photographs_learned(folder: Path) -> Scores:
    """Train the base on CIFAR-10's photographs; the share of test photographs that it tells apart, and its size."""
    torch.manual_seed(0)
    sets = [images.cifar(split) for split in ("train", "test")]
    names = images.classes(sets[0])
    (x, y), (x_test, y_test) = [
        (standardised(images.stacked(s, 32).float()), torch.tensor([names.index(p.label) for p in s])) for s in sets
    ]
    model = SwinForImageClassification(SwinConfig(**CONFIG, image_size=32, window_size=4, num_labels=len(names)))
    steps = EPOCHS * (len(x) // PHOTOGRAPHS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = _schedule(optimizer, 1e-3, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(PHOTOGRAPHS)[: len(x) // PHOTOGRAPHS]:
            shift = torch.randint(9, (2,)).tolist()
            seen = F.pad(x[rows], (4, 4, 4, 4))[..., shift[0] : shift[0] + 32, shift[1] : shift[1] + 32]
            optimizer.zero_grad()
            flipped = seen.flip(-1) if torch.rand(()) < 0.5 else seen
            F.cross_entropy(model(flipped).logits, y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(part).logits.argmax(-1) for part in x_test.split(100)]).eq(y_test)
    model.swin.save_pretrained(folder)
    return {"right": right.float().mean().item(), "numbers": float(model.swin.num_parameters())}


def _schedule(optimizer: torch.optim.Optimizer, rate: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up for a tenth of the steps, then a cosine down to nothing."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
