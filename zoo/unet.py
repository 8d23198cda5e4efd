"""nano-unet: a class-conditional U-Net of a million parameters that draws garments, glyphs and icons:
`python -m zoo.unet`.

Denoising of v from random weights, an average of the weights over the steps, and a tenth of the labels
dropped, so that samples can be guided (Ho & Salimans, 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, ViTForImageClassification

import pegbox
from pegbox.evaluate.statistics import mean, student_half
from zoo import images
from zoo.images import ROOT, Picture

NAME = "nano-unet"
SIDE = 32
ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
DRAWERS = 20  # of each character; the last two of them are held out
SHARES = {"garments": 4, "glyphs": 1, "icons": 5}  # how often a picture comes in an epoch

SEED = 0
STEPS, ROWS, RATE = 6000, 32, 2e-3
AVERAGE = 0.998  # decay of the averaged weights, smaller at the beginning
DROPPED = 0.1  # share of labels
OBJECTIVE = {"prediction": "v_prediction"}
GUIDANCE, SAMPLING = 2.0, 30  # of samples: strength, steps

DRAWS, MOST, SHOWN = 3, 20, 6  # seeds that are measured; pictures of a class in each; and on the sheet
KNOWN, NEAR = 0.75, 0.25  # bars: garments known, of as many held-out ones; distance, of that of noise


@dataclass(frozen=True)
class Rows:
    """Pictures as tensors: (N, 3, SIDE, SIDE) uint8 and classes (N,)."""

    pixels: Tensor
    labels: Tensor

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A batch of some of them, with a share of labels dropped by torch's global generator, as noise is drawn."""
        at = torch.tensor(rows)
        dropped = torch.rand(len(at)) < DROPPED
        labels = torch.where(dropped, len(CLASSES), self.labels[at])
        return {"pixel_values": self.pixels[at] / 127.5 - 1, "class_labels": labels}


def build(output: Path | None = None) -> dict[str, Any]:
    """Train, measure and write the model, and a sheet of its samples.

    Args:
        output: folder of the model and the sheet; their places in the library and its docs if None

    Returns:
        the figures of its card.

    Raises:
        SystemExit: a bar is missed; nothing is written.
    """
    model = trained(ROOT / "runs" / "zoo" / NAME).to(torch.bfloat16).float()  # what is measured is what ships
    found = measured(model)
    share, held = (found["known"][f"garments, {which}"]["mean"] for which in ("samples", "held out"))
    if share < KNOWN * held:
        raise SystemExit(f"{NAME} misses its bar: {share:.0f} % of its garments are known, expected {KNOWN * held:.0f}")
    distance, noise = (found["distance"][which]["mean"] for which in ("samples", "noise"))
    if distance > NEAR * noise:
        raise SystemExit(f"{NAME} misses its bar: distance {distance:.1f}, expected at most {NEAR * noise:.1f}")
    folder = output or ROOT / "src" / "pegbox" / "zoo" / NAME
    shown = (output or ROOT / "docs" / "zoo") / f"{NAME}.png"
    shown.parent.mkdir(parents=True, exist_ok=True)
    sheet(model).save(shown, optimize=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    scheduler().save_pretrained(folder)
    (folder / "README.md").write_text(card(found, model.num_parameters()))
    return found


def network(seed: int) -> UNet2DModel:
    """The model with random weights; its last class is that of no label."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(16, 32, 64, 72),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


# -- data ----------------------------------------------------------------------------------------------------------

GROUPS = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Symbols", "Travel & Places")
CLASSES = (*images.GARMENTS, *ALPHABETS, *GROUPS)


def sets(*, held_out: bool) -> dict[str, Rows]:
    """The pictures by kind: those that it trains on, or those that it does not."""
    glyphs = sorted(images.omniglot(held_out=False) + images.omniglot(held_out=True), key=lambda p: p.label)
    mine = [p for k, p in enumerate(glyphs) if (k % DRAWERS >= DRAWERS - 2) == held_out]
    return {
        "garments": _rows(images.fashion("test" if held_out else "train")),
        "glyphs": _rows([Picture(p.image, p.label.partition("/")[0]) for p in mine], bold=True),
        "icons": _rows(images.emoji(held_out=held_out)),
    }


def _rows(pictures: Sequence[Picture], *, bold: bool = False) -> Rows:
    """Bold: strokes a pixel wider on each side, of twice the resolution, as else they are grey."""
    pixels = images.stacked(pictures, SIDE * (1 + bold))
    if bold:
        ink = F.max_pool2d(255.0 - pixels, 3, 1, 1)
        pixels = (255 - F.avg_pool2d(ink, 2)).round().to(torch.uint8)
    return Rows(pixels, torch.tensor([CLASSES.index(picture.label) for picture in pictures]))


def joined(parts: Mapping[str, Rows]) -> Rows:
    return Rows(torch.cat([part.pixels for part in parts.values()]), torch.cat([p.labels for p in parts.values()]))


# -- training ------------------------------------------------------------------------------------------------------


class Averaged(TrainerCallback):
    """An average of a model's weights over the steps, kept beside the checkpoints."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step:
            self.weights = load_file(self._file(state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        decay = min(AVERAGE, (1 + state.global_step) / (10 + state.global_step))
        for name, p in self.model.named_parameters():
            self.weights[name].lerp_(p.detach(), 1 - decay)
        if control.should_save:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(self.weights, self._file(state))

    def _file(self, state: TrainerState) -> Path:
        return self.folder / f"average-{state.global_step}.safetensors"


def trained(output: Path) -> UNet2DModel:
    """The averaged model; a run that was broken off goes on from its last checkpoint in `output`."""
    parts = sets(held_out=False)
    rows = joined(parts)
    times = [SHARES[kind] for kind, part in parts.items() for _ in part.labels]
    model = network(SEED)
    average = Averaged(model, output)
    args = TrainingArguments(
        str(output),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        weight_decay=0.01,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=True,
        seed=SEED,
        save_steps=500,
        save_total_limit=1,
        logging_steps=100,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = pegbox.Trainer(
        pegbox.tune(model, "full"),
        "denoising",
        args,
        objective_options=OBJECTIVE,
        train_dataset=[row for row, count in enumerate(times) for _ in range(count)],
        data_collator=rows,
        callbacks=[average],
    )
    with sdpa_kernel(SDPBackend.MATH):  # as in zoo.vit
        trainer.train(resume_from_checkpoint="auto")
    model.load_state_dict(average.weights)
    return model.eval()


# -- sampling ------------------------------------------------------------------------------------------------------


def scheduler() -> DDIMScheduler:
    """That of the objective's noise; unclipped, as guidance overshoots, and what is clipped turns a picture over."""
    return DDIMScheduler(prediction_type=OBJECTIVE["prediction"], timestep_spacing="trailing", clip_sample=False)


@torch.no_grad()
def sampled(model: UNet2DModel, labels: Tensor, *, steps: int = SAMPLING, seed: int = SEED) -> Tensor:
    """Pictures of classes (N,) by DDIM, (N, 3, SIDE, SIDE) uint8."""
    noise = scheduler()
    noise.set_timesteps(steps)
    x = torch.randn(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, len(CLASSES))])
    for t in noise.timesteps:
        with_label, without = model(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
        x = noise.step(without + GUIDANCE * (with_label - without), t, x).prev_sample
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# -- measuring -----------------------------------------------------------------------------------------------------


def measured(model: UNet2DModel) -> dict[str, Any]:
    """How near samples are to held-out pictures, and how often nano-vit knows them.

    `distance`: Frechet distances of nano-vit's features, between held-out pictures and as many others of the same
    classes: samples, pictures that were trained on, noise.  `known`: of samples and of held-out pictures, the garments
    and the icons in points that nano-vit puts into their class, among the classes of their kind.  Each with half the
    width of its 95 % interval over seeds of the draw.
    """
    vit: Any = pegbox.zoo.load("nano-vit", dtype=torch.float32)
    held, seen = (joined(sets(held_out=part)) for part in (True, False))
    runs = [_run(model, vit, held, seen, torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
    return {
        key: {
            name: {"mean": mean(values), "half": student_half(values)}
            for name in runs[0][key]
            for values in [[run[key][name] for run in runs]]
        }
        for key in runs[0]
    }


def _run(
    model: UNet2DModel, vit: ViTForImageClassification, held: Rows, seen: Rows, draw: torch.Generator
) -> dict[str, dict[str, float]]:
    counts = torch.minimum(held.labels.bincount(minlength=len(CLASSES)), torch.tensor(MOST))
    real, other = chosen(held, counts, draw), chosen(seen, counts, draw)
    made = Rows(sampled(model, real.labels, seed=draw.initial_seed()), real.labels)
    noise = Rows(torch.randint(256, real.pixels.shape, generator=draw).to(torch.uint8), real.labels)
    (ours, logits), (theirs, answers) = judged(vit, made), judged(vit, real)
    return {
        "distance": {
            "samples": images.frechet_distance(ours, theirs),
            "pictures that were trained on": images.frechet_distance(judged(vit, other)[0], theirs),
            "noise": images.frechet_distance(judged(vit, noise)[0], theirs),
        },
        "known": {
            "garments, samples": known(vit, logits, made.labels, images.GARMENTS),
            "garments, held out": known(vit, answers, real.labels, images.GARMENTS),
            "icons, samples": known(vit, logits, made.labels, GROUPS),
            "icons, held out": known(vit, answers, real.labels, GROUPS),
        },
    }


def chosen(rows: Rows, counts: Tensor, draw: torch.Generator) -> Rows:
    """So many rows of each class, counts (C,), at random."""
    of_class = [(rows.labels == k).nonzero()[:, 0] for k in range(len(counts))]
    drawn = [at[torch.randperm(len(at), generator=draw)[:n]] for at, n in zip(of_class, counts.tolist(), strict=True)]
    return Rows(rows.pixels[torch.cat(drawn)], rows.labels[torch.cat(drawn)])


@torch.no_grad()
def judged(vit: ViTForImageClassification, rows: Rows) -> tuple[Tensor, Tensor]:
    """What nano-vit's head reads, (N, D), and its logits."""
    state = vit.vit(rows.pixels / 127.5 - 1).last_hidden_state[:, 0]
    return state, vit.classifier(state)


def known(vit: ViTForImageClassification, logits: Tensor, labels: Tensor, names: Sequence[str]) -> float:
    """Of the rows of these classes the share, in points, that is put into its own."""
    mine = torch.isin(labels, torch.tensor([CLASSES.index(name) for name in names]))
    columns = [vit.config.label2id[name] for name in names]
    said = [names[k] for k in logits[mine][:, columns].argmax(-1).tolist()]
    return 100 * mean([float(CLASSES[k] == name) for k, name in zip(labels[mine].tolist(), said, strict=True)])


def sheet(model: UNet2DModel) -> Image:
    """Samples of each class, a column each, garments above glyphs and icons."""
    labels = torch.arange(len(CLASSES)).repeat(SHOWN)
    made = sampled(model, labels, seed=SEED)
    tiles = made.view(SHOWN, len(CLASSES), 3, SIDE, SIDE).permute(0, 3, 1, 4, 2)  # rows, y, columns, x, colour
    return PIL.Image.fromarray(tiles.reshape(SHOWN * SIDE, len(CLASSES) * SIDE, 3).numpy())


# -- the card ------------------------------------------------------------------------------------------------------


def card(found: dict[str, Any], parameters: int) -> str:
    """README.md of the model, with what `measured` found."""
    distances, shares = (
        "\n".join(f"| {name} | {number['mean']:.{digits}f} ± {number['half']:.{digits}f} |" for name, number in rows)
        for rows, digits in ((found["distance"].items(), 2), (found["known"].items(), 1))
    )
    return CARD.format(
        millions=f"{parameters / 1e6:.1f}",
        names=_names(),
        steps=f"{STEPS:,}",
        rows=ROWS,
        rate=RATE,
        average=AVERAGE,
        seed=SEED,
        guidance=GUIDANCE,
        sampling=SAMPLING,
        distances=distances,
        shares=shares,
        draws=DRAWS,
    )


def _names() -> str:
    """The classes by number, and what is given where there is no label."""
    return ", ".join(f"{k} {name}" for k, name in enumerate((*CLASSES, "no label, for guidance"))) + "."


CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
datasets: [omniglot, fashion_mnist, fxemoji]
---

# nano-unet

A class-conditional U-Net of {millions} M parameters that draws garments, glyphs and icons of 32 x 32 pixels.

A base to tune in minutes, with real skips and attention.

## Data

| set | licence | rows | classes |
|---|---|---:|---:|
| Fashion-MNIST, 500 images of the sample sheet | MIT | 500 | 10 garments |
| Omniglot, alphabets Balinese, Early Aramaic, Greek, Korean and Latin | MIT | 2,448 | 5 alphabets |
| Firefox OS emoji, without people and smileys | CC BY 4.0 (artwork: Mozilla Foundation), MIT (names) | 378 | 6 groups |

Held out: 100 images of Fashion-MNIST, two of the twenty people who drew each character, and a fifth of the icons, by a
hash of their captions. The weights are under CC BY 4.0, since samples may look like Mozilla's icons. Beware that Early
Aramaic, which nano-vit never saw, is drawn here.

- Lake, Salakhutdinov, Tenenbaum: Human-level concept learning through probabilistic program induction. Science 350,
  2015.
- Xiao, Rasul, Vollgraf: Fashion-MNIST. arXiv:1708.07747, 2017.
- Mozilla: FxEmojis, github.com/mozilla/fxemoji. Names: github.com/muan/unicode-emoji-json.

## Architecture

`UNet2DModel`: widths 16, 32, 64, 72, one residual block a level going down and two going up, attention at 8 x 8. It
predicts v of RGB in [-1, 1]; `scheduler_config.json` has the noise. Weights are in bfloat16. `class_labels` are:

{names}

## Recipe

Denoising of v, full tuning from random weights, {steps} steps of {rows} rows in bfloat16 over
float32 masters, AdamW ({rate:g}, weight decay 0.01), cosine after 5 % warm-up, weights averaged with decay {average}, a
tenth of the labels dropped, seed {seed}. From a checkout, with the data beside it:

    python -m zoo.unet

## Figures

Of samples in {sampling} DDIM steps with guidance {guidance}; {draws} seeds, 95 % intervals over them. The same command
measures them, on the weights as shipped, and draws the sheet of samples in `docs/zoo/`.

Frechet distance of nano-vit's features, between held-out pictures and as many others of the same classes:

| others | distance |
|---|---:|
{distances}

Points that nano-vit puts into their class, among those of their kind:

| pictures | known |
|---|---:|
{shares}

## Limits

Icons come by group, not by name, from 378 of them. Nothing larger than 32 x 32, no text conditions. Fit for tests,
examples and comparing methods.
"""


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None), indent=1))
