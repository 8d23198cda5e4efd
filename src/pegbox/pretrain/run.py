"""`pegbox pretrain`: from raw text to a base, and on to a model that answers; stage after stage, each kept once done.

    output/corpus, tokenizer, shards    what is trained on (corpus.py, tokenizer.py, shards.py)
    output/checkpoints                  of the training, with metrics.jsonl and spikes.jsonl (engine.py)
    output/model                        the base, with its tokenizer and both cards
    output/instruct                     the model that answers (instruct.py)
    output/report.md                    how it went (report.py)
    output/manifest.json                settings, versions, and what each finished stage was made from

The same command goes on where an interrupted one stopped, and does nothing again that it would do as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from pegbox.core.errors import DataError
from pegbox.data.sources import load_records
from pegbox.evaluate.saved import save
from pegbox.pretrain import cards, corpus, curves, engine, instruct, report, shards, tokenizer
from pegbox.pretrain.guard import SPIKES
from pegbox.pretrain.instruct import Part
from pegbox.pretrain.mixture import Mixture, RowDataset
from pegbox.pretrain.model import Estimate, build, estimate
from pegbox.pretrain.settings import Recipe
from pegbox.pretrain.sources import place, texts
from pegbox.pretrain.together import alone
from pegbox.train.checkpoint import last_complete
from pegbox.train.hardware import bf16_units
from pegbox.train.manifest import NAME as MANIFEST
from pegbox.train.manifest import Manifest
from pegbox.train.model import load
from pegbox.train.prepare import is_main
from pegbox.train.progress import METRICS
from pegbox.train.run import output_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from pegbox.pretrain.corpus import Corpus
    from pegbox.pretrain.shards import Shards

Say = Callable[[str], None]

MODEL = "model"
END_OF_TURN = "<|end|>"  # of tokenizers made here
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("no space left", "quota exceeded", "pytorchstreamwriter failed", "unexpected pos")  # also of torch.save
DEVICES, RATE = (1, 8, 64), 312e12  # FLOP/s of an A100, in bfloat16
USED = 0.4  # share of them that training uses
SIDE = 2048  # of a matrix whose product is timed
SHOWN = 80  # characters of a text


@dataclass(frozen=True)
class Result:
    """A finished pipeline.

    Attributes:
        model: folder of the base.
        instruct: folder of the model that answers; None without instruction data.
        report: the file.
        bits: bits per byte by held-out source.
    """

    model: Path
    instruct: Path | None
    report: Path
    bits: Mapping[str, float]


def pretrain(recipe: Recipe, root: Path = Path()) -> Result | None:
    """Run all stages.

    Args:
        root: what relative paths of texts start from, where `recipe.root` does not say.

    Returns:
        None after a dry run, which shows what would be done.

    Raises:
        PegboxError: what is wrong with settings, texts, disk or training; stages that were done stay done.
        Interrupted: Ctrl-C; a checkpoint is saved (a `SystemExit` with code 130).
    """
    root = Path(recipe.root).expanduser() if recipe.root else root
    recipe = _placed(recipe, root)
    _check(recipe, root)
    if recipe.dry_run:
        alone("planned", lambda: plan(recipe, root, _say))
        return None
    output = output_folder(recipe.output)
    stages = Stages(output, recipe)
    with _full_disk_told(output):
        try:
            result = _run(recipe, root, output, stages)
        except BaseException as error:
            interrupted = isinstance(error, (SystemExit, KeyboardInterrupt))
            said = {} if interrupted else {"error": f"{type(error).__name__}: {error}"}
            stages.manifest.end("interrupted" if interrupted else "failed", **said)
            raise
        stages.manifest.end("done")
    return result


def _say(line: str) -> None:
    if is_main():
        print(line, flush=True)


def _placed(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with the path of its tokenizer as the system has it."""
    if recipe.tokenizer.path is None:
        return recipe
    found = dataclasses.replace(recipe.tokenizer, path=place(recipe.tokenizer.path, root))
    return dataclasses.replace(recipe, tokenizer=found)


def _check(recipe: Recipe, root: Path) -> None:
    """What would fail after hours is told at once."""
    curves.require()
    if recipe.tokenizer.path is None:
        tokenizer.train((), recipe.tokenizer)  # a size that is too small is refused before any text is read
    with torch.device("meta"):
        build(recipe.model, recipe.tokenizer.size, recipe.rows.length, recipe.seed)
    if recipe.instruct.data:
        instruct.settings_of(recipe, Path(recipe.output) / MODEL)
        for where in instruct.sources(recipe.instruct, root).values():
            next(load_records(where), None)


def _run(recipe: Recipe, root: Path, output: Path, stages: Stages) -> Result:
    alone("data", lambda: _data(recipe, root, _say))
    data = _data(recipe, root, _say if not is_main() else _unsaid)
    base = output / MODEL
    _train(recipe, data, base, stages)
    folder = _instruct(recipe, base, root, stages) if recipe.instruct.data else None
    alone("report", lambda: _report(recipe, data, base, folder, stages))
    return Result(base, folder, output / report.NAME, stages.facts["train"]["bits"])


def _unsaid(line: str) -> None:
    """What the first process has said already."""


# -- what is kept of finished stages -------------------------------------------------------------------------------


class Stages:
    """Finished stages, in the manifest: what each was made from, as a hash, and its facts."""

    def __init__(self, output: Path, recipe: Recipe) -> None:
        self.facts = _stages_in(output / MANIFEST)
        folder = output if is_main() else None
        settings = dataclasses.asdict(recipe)
        self.manifest = Manifest(folder, command=command(), settings=settings, stages=self.facts)

    def done(self, name: str, made_from: str) -> bool:
        return self.facts.get(name, {}).get("made_from") == made_from

    def end(self, name: str, made_from: str, **facts: Any) -> None:
        self.facts[name] = {"made_from": made_from, **facts}
        self.manifest.update(stages=self.facts)


def _stages_in(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def command() -> str:
    """The command line of this process."""
    return shlex.join(["pegbox" if Path(sys.argv[0]).stem in ("pegbox", "__main__") else sys.argv[0], *sys.argv[1:]])


def mark(**facts: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


# -- the stages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What is trained on, and measured on."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    shards: Shards

    def mark(self) -> str:
        """Of all rows, and of what reads them."""
        rows = {name: [shard.sha256 for shard in packed.shards] for name, packed in self.shards.sources.items()}
        return mark(rows=rows, tokenizer=tokenizer.identity(self.tokenizer))


def _data(recipe: Recipe, root: Path, say: Say) -> Data:
    found = corpus.build(recipe, root, say)
    reader = tokenizer.prepare(recipe, found, say)
    return Data(found, reader, shards.build(recipe, found, reader, say))


def _train(recipe: Recipe, data: Data, base: Path, stages: Stages) -> None:
    """The base in its folder: the one that is there if made from the same, else trained now."""
    weights = {name: source.weight for name, source in recipe.sources.items()}
    facts = {"data": data.mark(), "weights": weights}
    made_from = mark(
        **facts,
        model=dataclasses.asdict(recipe.model),
        train=dataclasses.asdict(recipe.train),
        guard=dataclasses.asdict(recipe.guard),
        order=recipe.rows.order,
        seed=recipe.seed,
        held_out={name: tokenizer.file_hash(path) for name, path in data.corpus.held_out.items()},
    )
    if stages.done("train", made_from) and base.is_dir():
        _say(f"training: {base}, as made before")
        return
    counts = data.shards.counts
    mixture = Mixture(counts, weights, sum(counts.values()), recipe.seed, recipe.rows.order)
    model = build(recipe.model, len(data.tokenizer), recipe.rows.length, recipe.seed)
    held_out = {name: list(data.corpus.held_out_texts(name)) for name in data.corpus.held_out}
    fitted = engine.fit(recipe, model, data.tokenizer, RowDataset(data.shards, mixture), held_out, _say, facts=facts)
    nn.Module.to(fitted.model, getattr(torch, recipe.train.saved))
    alone("model", lambda: _save(fitted.model, data.tokenizer, base))
    parameters = sum(p.numel() for p in fitted.model.parameters())
    stages.end("train", made_from, parameters=parameters, steps=fitted.steps, tokens=fitted.tokens, bits=fitted.bits)
    told = ", ".join(f"{name} {value:.3f}" for name, value in fitted.bits.items())
    _say(f"training: {base}" + (f"; bits per byte: {told}" if told else ""))


def _save(model: LlamaForCausalLM, reader: PreTrainedTokenizerFast, base: Path) -> None:
    """Model and tokenizer, under another name until both are whole; a base that answers ends its turns too."""
    turn = reader.get_vocab().get(END_OF_TURN)
    config: Any = model.generation_config
    if turn is not None:
        config.eos_token_id = [reader.eos_token_id, turn]
    part = base.with_name(f".{base.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    save(model, part)
    reader.save_pretrained(part)
    shutil.rmtree(base, ignore_errors=True)
    part.replace(base)


def _instruct(recipe: Recipe, base: Path, root: Path, stages: Stages) -> Path:
    """The folder of the model that answers: the one that is there if made from the same, else made now."""
    output, given = Path(recipe.output), recipe.instruct
    made_from = mark(
        base=stages.facts["train"],
        settings=dataclasses.asdict(dataclasses.replace(given, data=())),  # not where files are, but what they hold
        texts={name: _contents(Path(where)) for name, where in instruct.sources(given, root).items()},
        length=recipe.rows.length,
        seed=recipe.seed,
    )
    folder = output / instruct.MODEL
    if stages.done("instruct", made_from) and folder.is_dir():
        _say(f"instruct: {folder}, as made before")
        return folder
    left = list(output.glob(f".{instruct.MODEL}.*"))  # by merges that were broken off
    if not stages.done("instructing", made_from):
        left.append(output / instruct.ADAPTER)  # of a run with other settings
        stages.end("instructing", made_from)
    alone("cleared", lambda: _remove(left))
    done = instruct.instruct(recipe, base, root, _say)
    parts = {name: dataclasses.asdict(part) for name, part in done.parts.items()}
    stages.end("instruct", made_from, parts=parts, steps=done.steps, loss=done.loss, seconds=done.seconds)
    return folder


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _contents(path: Path) -> str | None:
    return tokenizer.file_hash(path) if path.is_file() else None


def _report(recipe: Recipe, data: Data, base: Path, folder: Path | None, stages: Stages) -> None:
    """report.md and both cards, made anew; what the compressors need is kept."""
    output = Path(recipe.output)
    files = (*data.corpus.files.values(), *data.corpus.held_out.values())
    made_from = mark(files=[tokenizer.file_hash(path) for path in files])
    if not stages.done("compressors", made_from):
        _say("report: xz and PPMd read the texts")
        stages.end("compressors", made_from, bits=report.against_compressors(data.corpus))
    model = load(os.fspath(base), "causal_lm").model
    trained = stages.facts["train"]
    parts = stages.facts["instruct"]["parts"] if folder else {}
    story = report.Story(
        recipe=recipe,
        command=command(),
        made_by=stages.manifest.facts,
        parameters=trained["parameters"],
        texts=data.corpus.report["sources"],
        held_out=data.corpus.report["held_out"],
        packed=data.shards.sources,
        bytes_per_token={
            name: tokenizer.bytes_per_token(data.tokenizer, data.corpus.texts(name)) for name in data.corpus.files
        },
        log=_lines(output / METRICS),
        spikes=_lines(output / SPIKES),
        bits=trained["bits"],
        compressed=stages.facts["compressors"]["bits"],
        tokens=trained["tokens"],
        samples=report.samples(model, data.tokenizer, recipe.prompts, recipe.rows.length, recipe.seed),
        parts={name: Part(**part) for name, part in parts.items()},
    )
    report.write(story, output)
    cards.write(story, base)
    _say(f"report: {output / report.NAME}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# -- a full disk ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _full_disk_told(output: Path) -> Iterator[None]:
    """A full disk as a DataError that says what is intact; torch and safetensors tell it in words of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        words = str(error).lower()
        if getattr(error, "errno", None) not in FULL and not any(said in words for said in FULL_WORDS):
            raise
        kept = last_complete(output / engine.CHECKPOINTS)
        intact = f"the checkpoint {kept} is" if kept else "the stages that were done are"
        raise DataError(
            f"the disk of {output} is full; {intact} intact: make room, and the same command goes on from there"
        ) from error


# -- the plan ------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, root: Path, say: Say) -> None:
    """One text of each source, and what training takes; nothing is written.

    Raises:
        DataError, SettingsError: a source that cannot be read, a model that cannot be built.
    """
    size = 0
    for part, sources in (("sources", recipe.sources), ("held_out", recipe.held_out)):
        for name, source in sources.items():
            first = next((found for found in texts(name, source, root) if found.problem is None), None)
            if first is None:
                raise DataError(f"{part}.{name}: {source.path} holds no text that can be used")
            size += _size(source.path, root) if part == "sources" else 0
            say(f"{part}.{name}: {' '.join(first.text.split())[:SHOWN]!r}")
    vocabulary = recipe.tokenizer.size
    tokens, how = _tokens(recipe, size)
    say(f"training: {tokens / 1e6:,.1f}M tokens, {how}")
    takes = estimate(recipe.model, vocabulary, recipe.rows.length, recipe.train)
    flops = tokens * takes.flops_per_token
    say(f"model: {takes.parameters:,} parameters, {takes.flops_per_token:.3g} FLOPs a token, {flops:.3g} in all")
    rate = flops_per_second()
    say(f"here: {_each(takes, tokens, rate)}, which this machine's products reach")
    for devices in DEVICES:
        takes = estimate(recipe.model, vocabulary, recipe.rows.length, recipe.train, devices=devices)
        say(f"{devices} device{'s' * (devices > 1)}: {_each(takes, tokens, RATE, devices)}, as an A100 has")


def _each(takes: Estimate, tokens: float, rate: float, devices: int = 1) -> str:
    seconds = takes.days(tokens, rate, devices=devices, share=USED) * 86_400
    return f"{takes.memory / 1e9:.1f} GB, {spelled(seconds)} at {100 * USED:.0f} % of {rate / 1e12:.3g} TFLOP/s"


def spelled(seconds: float) -> str:
    """`12 s`, `3 h`, `1.2 days` ..., in the largest unit of which there is one."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def flops_per_second() -> float:
    """What one matrix product reaches here, in the dtype that training would use."""
    dtype = torch.bfloat16 if bf16_units() else torch.float32
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    a @ a
    started = time.perf_counter()
    a @ a
    return 2 * SIDE**3 / (time.perf_counter() - started)


def _tokens(recipe: Recipe, size: int) -> tuple[float, str]:
    """Tokens that are trained on, and where that is from."""
    training = recipe.train
    if training.steps:
        rows = training.steps * training.batch * training.accumulate
        return rows * recipe.rows.length, f"{training.steps:,} steps of one process"
    about = f"about, as {size / 1e6:,.1f} MB of files say"
    return training.epochs * size / engine.BYTES_PER_TOKEN, f"{about}, {training.epochs:g} times"


def _size(paths: str | Sequence[str], root: Path) -> int:
    """Bytes of files, and of compressed ones three times as many."""
    listed = [Path(place(path, root)) for path in ((paths,) if isinstance(paths, str) else paths)]
    files = [file for path in listed for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size * (3 if file.suffix == ".gz" else 1) for file in files)
