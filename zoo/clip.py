"""nano-clip: two towers of a third of a million parameters each, for icons and their names: `python -m zoo.clip`.

Three hundred icons are too few to learn to see and to read from, so each tower learns something else first.  Text: what
all-MiniLM-L6-v2 makes of words and made-up phrases.  Image: to tell colours, edges and outlines of icons changed beyond
their names.  Then the text tower rests, and the image tower learns to find the captions of its icons among those of a
batch (LiT: Zhai et al., 2022, arXiv:2111.07991, with the towers the other way round).  The bar: of the icons that no
model of the zoo has seen, a caption is found first BAR times as often as by chance.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import pegbox
from pegbox import objectives
from pegbox.evaluate.statistics import estimate
from pegbox.objectives.objective import Batch, Losses
from pegbox.train.model import PACKAGED
from zoo import images
from zoo.images import ROOT, Picture

NAME = "nano-clip"
SIDE = 64  # pixels
BAR = 10  # times the recall at 1 of chance

SEEDS = (0, 1, 2)
SEED = 0  # of those, the one that finds most captions of the validation part
PIECES, LONGEST = 2048, 32  # tokens: in the vocabulary, in a caption
WORDS, PHRASES = 4000, 40_000  # that the text tower learns from
SCALE = 20.0  # of cosines; it rests
WIDTH = 96  # of looks
RIDGE = 0.3  # of the guesses
SMOOTHING = 0.1  # of labels
CONTRAST, GUESS, LOOK = 0.2, 5.0, 0.5  # weights of the losses of pairs
TEXT = {"max_steps": 800, "per_device_train_batch_size": 256, "learning_rate": 2e-3, "weight_decay": 0.05}
VISION = r"towers\.(vision_model|visual_projection)\b.*|looks"  # what learns from pairs
LOOKS = {"max_steps": 2000, "per_device_train_batch_size": 64, "learning_rate": 2e-3, "weight_decay": 0.2}
PAIRS = {"max_steps": 1000, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "weight_decay": 0.1}


def build(output: Path | None = None) -> dict[str, Any]:
    """Train, measure and write the model.

    Args:
        output: folder of the model; its place in the library if None

    Returns:
        the figures of its card.

    Raises:
        SystemExit: the bar is missed; nothing is written.
    """
    model, tokenizer = trained(images.emoji(held_out=False, label="caption"), SEED, ROOT / "runs" / "zoo" / NAME)
    found = measured(model.to(torch.bfloat16).float(), tokenizer, images.emoji(held_out=True, label="caption"))
    if found["recall_at_1"]["mean"] < BAR * found["recall_at_1"]["chance"]:
        raise SystemExit(f"{NAME} misses its bar, {BAR} times chance: {json.dumps(found)}")
    folder = output or ROOT / "src" / "pegbox" / "zoo" / NAME
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor().save_pretrained(folder)
    (folder / "README.md").write_text(card(found, sum(p.numel() for p in model.parameters())))
    return found


def validated(seed: int, output: Path) -> dict[str, Any]:
    """What `build` would measure, on a fifth of the training side, of a model trained on the rest of it."""
    pictures = images.emoji(held_out=False, label="caption")
    model, tokenizer = trained([p for p in pictures if not is_validation(p.label)], seed, output)
    return measured(model, tokenizer, [p for p in pictures if is_validation(p.label)])


def is_validation(caption: str) -> bool:
    """Whether the icon of this caption, of the training side, is of the fifth that settings are chosen by."""
    return images.is_held_out(f"{caption} (validation)")


# -- the model -----------------------------------------------------------------------------------------------------


def network(vocabulary: int, seed: int) -> CLIPModel:
    """Both towers with random weights."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3, "projection_dim": 64}
    ids = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    text = tower | ids | {"num_hidden_layers": 2, "max_position_embeddings": LONGEST}
    vision = tower | {"num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=math.log(SCALE)
    )
    model = CLIPModel._from_config(config, attn_implementation="eager")  # at 65 positions twice as fast on a CPU
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.1)  # words differ from the first step
    return model


def tokenizer_of(captions: Sequence[str], words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Bytes in lower case, joined to PIECES pieces, captions counting ten times."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*words, *captions * 10], trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", model_max_length=LONGEST)


def processor() -> CLIPImageProcessorPil:
    square = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=square, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


# -- training ------------------------------------------------------------------------------------------------------


def trained(pictures: Sequence[Picture], seed: int, output: Path) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """The model after both stages, from these icons and captions; a run that was broken off goes on."""
    captions = [picture.label for picture in pictures]
    lesson = lessons(captions)
    tokenizer = tokenizer_of(captions, lesson.words)
    model = network(len(tokenizer), seed)
    text = CLIPTextModelWithProjection(model.config.text_config)
    text.text_model, text.text_projection = model.text_model, model.text_projection
    texts = Texts(ids(tokenizer, [*lesson.texts, *captions]), lesson.targets)
    every, last = range(len(texts.ids)), range(len(lesson.texts), len(texts.ids))
    rows = [*every] + [*last] * round(len(every) / len(last) / 3)  # a quarter are captions
    _train(text, ".*", taught, rows, texts, seed, output / "text", TEXT)
    pixels, shown, own = images.stacked(pictures, SIDE), ids(tokenizer, captions), range(len(captions))
    looks = Looks(pixels / 255, seed)
    wide = model.config.vision_config.to_dict() | {"projection_dim": WIDTH}
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(**wide))
    image.vision_model = model.vision_model
    _train(image, ".*", described, own, Pictures(pixels, looks), seed, output / "looks", LOOKS)
    with torch.no_grad():
        embedded = F.normalize(model.get_text_features(input_ids=shown).pooler_output, dim=-1)
    pairs = Pairs(pixels, shown, looks, Guess(looks(pixels / 255), embedded))
    _train(Both(model, image), VISION, paired, own, pairs, seed, output / "pairs", PAIRS)
    return model.eval(), tokenizer


def _train(
    model: nn.Module,
    targets: str,
    objective: str | Callable[[nn.Module, Batch], Losses],
    rows: Sequence[int],
    collate: Callable[[Sequence[int]], Batch],
    seed: int,
    output: Path,
    settings: dict[str, Any],
) -> None:
    args = TrainingArguments(
        str(output),
        **settings,
        adam_beta2=0.98,
        warmup_steps=0.08,
        lr_scheduler_type="cosine",
        dataloader_drop_last=True,
        bf16=True,
        use_cpu=True,
        seed=seed,
        save_steps=200,
        save_total_limit=1,
        logging_steps=100,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tuned = pegbox.tune(model, "full", targets=targets)
    trainer = pegbox.Trainer(tuned, objective, args, train_dataset=list(rows), data_collator=collate)
    trainer.train(resume_from_checkpoint="auto")
    tuned.detach()


# -- texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What the text tower learns.

    Attributes:
        words: near to the captions, nearest first
        texts: those words and phrases of them, no caption that is held out among them
        targets: (texts and captions, d), the teacher's embeddings where captions differ most, of length 1
    """

    words: Sequence[str]
    texts: Sequence[str]
    targets: Tensor


def lessons(captions: Sequence[str], width: int = 64) -> Lesson:
    """Words and phrases with the teacher's embeddings.

    The words are those of the teacher's own vocabulary that it puts nearest to the captions; phrases are two or three
    of them, or a caption with one word for another.  Captions of the set that are not among `captions` are left out.
    """
    teacher = Teacher()
    own = teacher(captions)  # (N, 384)
    vocabulary = sorted(word for word in teacher.tokenizer.get_vocab() if re.fullmatch("[a-z]{3,}", word))
    near = (teacher(vocabulary) @ own.T).topk(3, 1).values.mean(1)
    words = [vocabulary[k] for k in near.argsort(descending=True)[:WORDS].tolist()]
    known = {caption.lower() for caption in captions}
    kept_out = {p.label.lower() for held in (False, True) for p in images.emoji(held_out=held, label="caption")} - known
    texts = [text for text in [*words, *phrases(captions, words)] if text not in kept_out]
    centre = own.mean(0)
    axes = torch.linalg.svd(own - centre, full_matrices=False).Vh[:width]
    targets = F.normalize((torch.cat([teacher(texts), own]) - centre) @ axes.T, dim=-1)
    return Lesson(words, texts, targets)


def phrases(captions: Sequence[str], words: Sequence[str]) -> list[str]:
    """Those of PHRASES draws, sorted; a few come twice."""
    draw, found = random.Random(0), set[str]()
    for _ in range(PHRASES):
        kind = draw.random()
        if kind < 0.45:
            found.add(" ".join(draw.sample(words, 2) if kind < 0.35 else draw.sample(words[: len(words) // 2], 3)))
            continue
        parts = draw.choice(captions).lower().split()
        at = draw.randrange(len(parts))
        parts[at] = draw.choice(words)
        if len(parts) == 1:
            parts.insert(draw.randrange(2), draw.choice(words))
        found.add(" ".join(parts))
    return sorted(found)


class Teacher:
    """all-MiniLM-L6-v2, called with texts: their embeddings (N, 384), of length 1."""

    def __init__(self) -> None:
        folder = str(files(PACKAGED["minilm"]) / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], rows: int = 128) -> Tensor:
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        out = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(texts), rows):
            at = order[start : start + rows]
            batch = self.tokenizer([texts[k] for k in at], padding=True, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16):
                states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            out[at] = F.normalize((states.float() * mask).sum(1), dim=-1)
        return out


@dataclass(frozen=True)
class Texts:
    """Token ids (N, T) and what the teacher says of them (N, d)."""

    ids: Tensor
    targets: Tensor

    def __call__(self, rows: Sequence[int]) -> Batch:
        return {"input_ids": _cut(self.ids[rows]), "targets": self.targets[rows]}


def taught(model: nn.Module, batch: Batch) -> Losses:
    """1 - cos(text, target), the mean over the batch."""
    embedded = model(input_ids=batch["input_ids"]).text_embeds.float()
    return {"distance": 1 - F.cosine_similarity(embedded, batch["targets"]).mean()}


def ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """(N, T), padded on the right; the towers look backwards from the end of a text, so that no mask is needed."""
    return tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")["input_ids"]


def _cut(padded: Tensor) -> Tensor:
    """(B, T) without the columns in which all rows are padding, which is 0."""
    return padded[:, : int(padded.any(0).sum())]


# -- pictures ------------------------------------------------------------------------------------------------------


class Looks:
    """What can be told of a picture without learning: (B, 3, SIDE, SIDE) in [0, 1] -> (B, WIDTH), about 1 each.

    Histograms of colours and of the directions of edges (as in MaskFeat: Wei et al., 2022, arXiv:2112.09133), and where
    it is not white; of these the directions in which the pictures of `sample`, changed in both ways, differ most.
    """

    def __init__(self, sample: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        parts = _measures(sample)
        self.centres = [part.mean(0) for part in parts]
        self.sizes = [(part - centre).norm(dim=1).mean() for part, centre in zip(parts, self.centres, strict=True)]
        seen = self._joined(torch.cat([change(sample) for change in (mild, wild) for _ in range(3)]))
        self.centre = seen.mean(0)
        self.axes = torch.linalg.svd(seen - self.centre, full_matrices=False).Vh[:WIDTH].T
        self.size = ((seen - self.centre) @ self.axes).square().mean().sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        return (self._joined(x) - self.centre) @ self.axes / self.size

    def _joined(self, x: Tensor) -> Tensor:
        measured = zip(_measures(x), self.centres, self.sizes, strict=True)
        return torch.cat([(part - centre) / size for part, centre, size in measured], 1)


def _measures(x: Tensor) -> list[Tensor]:
    """Square roots of histograms of 64 colours, of the whole and of its quarters; of 8 directions, of its ninths and of
    the whole; and how much of each field of 8 x 8 is not white."""
    red, green, blue = (x * 3.999).long().unbind(1)
    half = torch.arange(SIDE) // (SIDE // 2)
    bins = (64 * (2 * half[:, None] + half) + 16 * red + 4 * green + blue).flatten(1)
    quarters = torch.zeros(len(x), 256).scatter_add_(1, bins, torch.ones(bins.shape)) / (SIDE // 2) ** 2
    whole = quarters.view(-1, 4, 64).mean(1)
    grey = x.mean(1)
    across, down = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    turn = (torch.atan2(down, across) % math.pi / math.pi * 8).long().clamp(max=7)
    edges = torch.zeros(len(x), 8, *turn.shape[1:]).scatter_(1, turn[:, None], across.hypot(down)[:, None])
    inked = (x.amin(1, keepdim=True) < 0.95).float()
    ninths, all_edges = _pooled(edges, 3), _pooled(edges, 1)
    return [whole.sqrt(), quarters.sqrt(), ninths.sqrt(), all_edges.sqrt(), _pooled(inked, 8)]


def _pooled(x: Tensor, cells: int) -> Tensor:
    return F.adaptive_avg_pool2d(x, cells).flatten(1)


@dataclass(frozen=True)
class Pictures:
    """Icons (N, 3, SIDE, SIDE) uint8 as others each time, half of them changed beyond their names, and their looks.

    It draws from torch's global generator, which checkpoints restore; so does `Pairs`.
    """

    pixels: Tensor
    looks: Looks

    def __call__(self, rows: Sequence[int]) -> Batch:
        x = self.pixels[rows] / 255
        x = torch.cat([mild(x[::2]), wild(x[1::2])])
        return {"pixel_values": 2 * x - 1, "looks": self.looks(x)}


def described(model: nn.Module, batch: Batch) -> Losses:
    """Mean squared error of the looks."""
    return {"looks": F.mse_loss(model(pixel_values=batch["pixel_values"]).image_embeds.float(), batch["looks"])}


def mild(x: Tensor) -> Tensor:
    """(B, 3, SIDE, SIDE) in [0, 1], changed so little that its name stays right."""
    x = _moved(x, turn=0.25, size=0.2, stretch=0.1, shift=0.2)
    return _lit(x, contrast=0.15, light=0.075)


def wild(x: Tensor) -> Tensor:
    """As `mild`, but with other colours, turned any way, some of them halves of two."""
    orders = torch.tensor(list(itertools.permutations(range(3))))[torch.randint(6, (len(x),))]
    x = x.gather(1, orders[:, :, None, None].expand_as(x))
    x = _moved(x, turn=math.pi, size=0.5, stretch=0.2, shift=0.4)
    x = _lit(torch.where(_share(len(x), 0.2), 1 - x, x), contrast=0.4, light=0.15)
    places = torch.arange(SIDE) - SIDE / 2
    way = math.pi * _spread(len(x), 1, 1, 1)
    far = places * way.cos() + places[:, None] * way.sin() > 24 * _spread(len(x), 1, 1, 1)
    return torch.where(far & _share(len(x), 0.4), x.flip(0), x)


def _moved(x: Tensor, *, turn: float, size: float, stretch: float, shift: float) -> Tensor:
    """Turned, scaled, stretched and shifted over white by at most so much, in radians and shares."""
    rows = len(x)
    angle, moved = turn * _spread(rows), shift * _spread(rows, 2)
    high = (size * _spread(rows)).exp()
    wide = high * (stretch * _spread(rows)).exp()
    grid = [
        torch.stack([angle.cos() * wide, -angle.sin() * high, moved[:, 0]], 1),
        torch.stack([angle.sin() * wide, angle.cos() * high, moved[:, 1]], 1),
    ]
    places = F.affine_grid(torch.stack(grid, 1), list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, places, align_corners=False)


def _lit(x: Tensor, *, contrast: float, light: float) -> Tensor:
    more, other = contrast * _spread(len(x), 1, 1, 1), light * _spread(len(x), 3, 1, 1)
    return ((x - 0.5) * (1 + more) + 0.5 + other).clamp(0, 1)


def _spread(*shape: int) -> Tensor:
    """Between -1 and 1."""
    return torch.rand(*shape) * 2 - 1


def _share(rows: int, share: float) -> Tensor:
    return torch.rand(rows, 1, 1, 1) < share


# -- pairs ---------------------------------------------------------------------------------------------------------


class Both(nn.Module):
    """Both towers, and what the image tower says of a picture's looks."""

    def __init__(self, towers: CLIPModel, image: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.towers, self.looks = towers, image.visual_projection

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        seen = self.towers.vision_model(pixel_values=pixel_values).pooler_output  # (B, width)
        images = F.normalize(self.towers.visual_projection(seen).float(), dim=-1)
        texts = F.normalize(self.towers.get_text_features(input_ids=input_ids).pooler_output.float(), dim=-1)
        return {"images": images, "texts": texts, "looks": self.looks(seen)}


class Guess:
    """A caption's embedding from looks, by kernel ridge regression on the pairs: (B, WIDTH) -> (B, d), longer
    the nearer the looks are to known ones."""

    def __init__(self, looks: Tensor, embedded: Tensor) -> None:
        self.known, self.size = looks, (looks - looks.mean(0)).square().sum(1).mean()
        self.weights = torch.linalg.solve(self._near(looks) + RIDGE * torch.eye(len(looks)), embedded)

    def __call__(self, looks: Tensor) -> Tensor:
        return self._near(looks) @ self.weights

    def _near(self, looks: Tensor) -> Tensor:
        return (-torch.cdist(looks, self.known).square() / self.size).exp()


@dataclass(frozen=True)
class Pairs:
    """Icons: half of the rows mildly changed, with the ids of their captions (N, T); the others wildly, or two in one,
    without captions; all with their looks and what is guessed from these."""

    pixels: Tensor
    ids: Tensor
    looks: Looks
    guess: Guess

    def __call__(self, rows: Sequence[int]) -> Batch:
        named, others = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        x, y = mild(self.pixels[named] / 255), self.pixels[others] / 255
        y = wild(y) if torch.rand(()) < 0.5 else _blended(mild(y))
        x = torch.cat([x, y])
        looks = self.looks(x)
        return {
            "pixel_values": 2 * x - 1,
            "input_ids": _cut(self.ids[named]),
            "looks": looks,
            "guesses": self.guess(looks),
        }


def _blended(x: Tensor) -> Tensor:
    """Each with another of the batch, up to equal parts."""
    return x.lerp(x.roll(1, 0), torch.rand(len(x), 1, 1, 1) / 2)


def paired(model: nn.Module, batch: Batch) -> Losses:
    """Contrastive, of the rows with captions; the distance from the guesses, by how sure they are; the error of the
    looks."""
    out = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    z = SCALE * out["images"][: len(out["texts"])] @ out["texts"].T  # (B / 2, B / 2)
    own = torch.arange(len(z))
    ce = sum(F.cross_entropy(t, own, label_smoothing=SMOOTHING) for t in (z, z.T)) / 2
    sure = batch["guesses"].norm(dim=-1)
    distance = sure * (1 - F.cosine_similarity(out["images"], batch["guesses"]))
    error = F.mse_loss(out["looks"].float(), batch["looks"])
    return {"ce": CONTRAST * ce, "guess": GUESS * distance.mean(), "looks": LOOK * error}


# -- measuring -----------------------------------------------------------------------------------------------------


def measured(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, pictures: Sequence[Picture]) -> dict[str, Any]:
    """`recall_at_1` and `recall_at_5` among all of these pairs, each the mean of both directions, with half the width
    of its 95 % interval over pairs (the pool stays as it is) and what chance would give."""
    pixels = processor()([picture.image for picture in pictures], return_tensors="pt")["pixel_values"]
    batch = {"pixel_values": pixels, "input_ids": ids(tokenizer, [picture.label for picture in pictures])}
    return recalls(**objectives.get("contrastive").predict(model.eval(), batch)) | {"pairs": len(pictures)}


def recalls(images: Tensor, texts: Tensor) -> dict[str, Any]:
    """The same of embeddings (n, d) of length 1; a tie counts against a pair."""
    scores = images @ texts.T  # (n, n)
    ranks = torch.stack([(z >= z.diagonal()[:, None]).sum(1) for z in (scores, scores.T)], 1)  # (n, 2), from 1
    return {f"recall_at_{k}": _recall(ranks <= k, k / len(images)) for k in (1, 5)}


def _recall(hits: Tensor, chance: float) -> dict[str, float]:
    found = estimate([{"hits": hits.double()}], lambda run: run["hits"].mean().item())
    return {"mean": found.mean, "half": found.half, "chance": chance}


def card(found: dict[str, Any], parameters: int) -> str:
    """README.md of the model, with what `measured` found."""
    recalls = [
        f"| {k} | {100 * row['chance']:.1f} % | {100 * row['mean']:.1f} ± {100 * row['half']:.1f} % "
        f"| {row['mean'] / row['chance']:.1f} |"
        for k, row in ((k, found[f"recall_at_{k}"]) for k in (1, 5))
    ]
    return CARD.format(
        millions=f"{parameters / 1e6:.2f}",
        pairs=found["pairs"],
        pieces=PIECES,
        words=f"{WORDS:,}",
        phrases=f"{PHRASES:,}",
        text_steps=TEXT["max_steps"],
        look_steps=LOOKS["max_steps"],
        steps=PAIRS["max_steps"],
        seed=SEED,
        recalls="\n".join(recalls),
    )


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
datasets: [fxemoji]
---

# nano-clip

Two towers of {millions} M parameters together that put 64 x 64 icons and their names into one space.

## Data

| set | licence | what of it |
|---|---|---|
| Firefox OS emoji, without people and smileys | CC BY 4.0 (artwork: Mozilla Foundation), MIT (names) | 378 pairs |
| all-MiniLM-L6-v2, the teacher | Apache-2.0 | its embeddings of {words} words and {phrases} phrases |

Held out are {pairs} more icons, by a hash of their names; they chose nothing.

- Mozilla: FxEmojis, github.com/mozilla/fxemoji. Names: github.com/muan/unicode-emoji-json.
- Reimers, Gurevych: Sentence-BERT. arXiv:1908.10084, 2019. Wang et al.: MiniLM. arXiv:2002.10957, 2020.

## Architecture

`CLIPModel` of width 96, 3 heads, MLP of 192, projection to 64: patches of 8 x 8 in 4 blocks; byte-level BPE of {pieces}
pieces in lower case, at most 32, in 2 blocks. RGB in [-1, 1]. Weights are in bfloat16.

## Recipe

From random weights, seed {seed}, AdamW, cosine after 8 % warm-up, bfloat16 over float32 masters; full tuning in three
stages:

1. The text tower, {text_steps:,} steps of 256 texts: the cosine to the teacher's embeddings, in the 64 directions in
   which the captions differ most. Words are those of the teacher's vocabulary nearest to the captions; phrases are made
   of them. No held-out caption is among the texts, but a word of one may be, in a phrase with others.
2. The image tower, {look_steps:,} steps of 64 icons, half of them recoloured, turned any way or cut together: to tell
   histograms of colours and edges, and outlines.
3. The image tower, {steps:,} steps of 32 pairs: contrastive, against the text tower at rest, icons changed a little.
   Beside them are 32 icons changed as in stage 2, or two in one. For all, what kernel ridge regression on the
   histograms guesses of the caption is a second target, and stage 2 goes on.

The settings were chosen on a fifth of the training side.

From a checkout, with the data beside it:

    python -m zoo.clip

## Figures

Of the {pairs} held-out pairs, all in one pool, how often the right one is among the first k: the mean of both
directions, with a 95 % bootstrap interval over pairs. The same command measures it, on the weights as shipped.

| k | chance | nano-clip | times chance |
|---:|---:|---:|---:|
{recalls}

## Limits

Its world is flat icons on white, and English names. It is wrong more often than right about icons that it has not seen.
Fit for tests, examples and comparing methods; not for use on people's images.
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["validate"]:
        runs = ROOT / "runs" / "zoo"
        print(json.dumps({seed: validated(seed, runs / f"{NAME}-validation-{seed}") for seed in SEEDS}, indent=1))
    else:
        print(json.dumps(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None), indent=1))
