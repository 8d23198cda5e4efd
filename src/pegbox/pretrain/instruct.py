"""The supervised stage: from a base to a model that answers.

What is trained on is chosen first (`pegbox.pretrain.entropy`), then `pegbox.train` tunes the base by any method, and
the result is merged into an ordinary model folder, proven equal to what was trained:

    output/instruct_data/chosen.jsonl       the conversations that were kept
                         entropies.jsonl    each one that was scored: source, id, entropy, whether it was kept
                         parts.json         rows by source
    output/adapter/                         the run: adapter, checkpoints, manifest
    output/instruct/                        the model, with its chat template and card
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox import methods
from pegbox.core.errors import DataError, SettingsError, did_you_mean
from pegbox.data.examples import read
from pegbox.data.identity import fingerprint, surface
from pegbox.data.readers import readable
from pegbox.pretrain.entropy import answer_entropy, select
from pegbox.pretrain.settings import InstructSettings, Recipe
from pegbox.pretrain.sources import place
from pegbox.pretrain.together import alone
from pegbox.train.settings import RunSettings, run_settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase as Tokenizer

Say = Callable[[str], None]
Example = dict[str, Any]

DATA, CHOSEN, ENTROPIES, PARTS = "instruct_data", "chosen.jsonl", "entropies.jsonl", "parts.json"
ADAPTER, MODEL = "adapter", "instruct"
OURS = ("model", "data", "method", "method_settings", "output", "resume", "seed")  # the stage itself says these


@dataclass(frozen=True)
class Part:
    """What became of one source: `read = rejected + repeated + unscored + left + kept` rows.

    Attributes:
        rejected: rows of no known layout.
        repeated: the same words as an earlier one's, of any source.
        unscored: a run would reject them, as those without an answer; counted only where entropies are.
        left: out by their entropy.
        entropy: mean of the kept ones, nats a token; None where everything is kept unscored.
    """

    read: int
    rejected: int
    repeated: int
    unscored: int
    left: int
    kept: int
    entropy: float | None


@dataclass(frozen=True)
class Instructed:
    """A finished supervised stage.

    Attributes:
        model: folder of the whole model.
        adapter: folder of the run, which holds the adapter.
        parts: by source.
        steps, loss, seconds: of the run.
    """

    model: Path
    adapter: Path
    parts: Mapping[str, Part]
    steps: int
    loss: float | None
    seconds: float


def instruct(recipe: Recipe, base: Path, root: Path, say: Say) -> Instructed:
    """Choose, tune, merge; goes on where an interrupted run of the same recipe stopped.

    Args:
        base: folder of the pre-trained model.
        root: what the paths in `recipe.instruct.data` start from.

    Raises:
        DataError: instruction data that cannot be read, or is none.
        SettingsError: settings that `pegbox train` would refuse too; a selection that keeps nothing.
        CannotMerge, ParityError: from the merge.
    """
    from pegbox.evaluate.export import merge
    from pegbox.train.run import train

    output = Path(recipe.output)
    settings = settings_of(recipe, base)
    alone("chosen", lambda: choose(recipe, base, root, settings, say))
    found = json.loads((output / DATA / PARTS).read_text())
    parts = {name: Part(**part) for name, part in found.items()}
    done = train(settings)
    folder = output / MODEL
    alone("merged", lambda: merge(output / ADAPTER, folder, base, overwrite=True))
    say(f"instruct: {folder}, {recipe.instruct.method} merged into the base, equal to what was trained")
    return Instructed(folder, output / ADAPTER, parts, done.steps, done.train_loss, done.seconds)


def settings_of(recipe: Recipe, base: Path) -> RunSettings:
    """The settings of the supervised run.

    Raises:
        SettingsError: what the stage itself settles is among `instruct.run`, a method that does not merge, or a wrong
            setting.
    """
    given = recipe.instruct
    if taken := [key for key in given.run if key in OURS]:
        raise SettingsError(f"instruct.run.{taken[0]} is settled by the stage itself; instruct.method names the method")
    if methods.get(given.method).traits.merge == "no":
        known = [name for name in methods.names() if methods.get(name).traits.merge != "no"]
        raise SettingsError(
            f"instruct.method {given.method!r} changes more than weights, so that it cannot be merged into a model"
            f"{did_you_mean(given.method, known, most=20)}"
        )
    output = Path(recipe.output)
    return run_settings(
        {"max_length": recipe.rows.length}
        | dict(given.run)
        | {
            "model": os.fspath(base),
            "data": os.fspath(output / DATA / CHOSEN),
            "method": given.method,
            "method_settings": given.method_settings,
            "output": os.fspath(output / ADAPTER),
            "resume": "auto",
            "seed": recipe.seed,
        }
    )


# -- choosing ----------------------------------------------------------------------------------------------------


def choose(recipe: Recipe, base: Path, root: Path, run: RunSettings, say: Say) -> dict[str, Part]:
    """Write the conversations to train on, and what became of the others; each source is told in one line."""
    folder = Path(recipe.output) / DATA
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: _conversations(name, where, folder) for name, where in sources(recipe.instruct, root).items()}
    fresh = _without_repeats({name: rows for name, (rows, _) in found.items()})
    values = _entropies(fresh, recipe.instruct, base, run)
    kept = _kept(values, recipe.instruct)
    parts = {}
    for name, (rows, rejected) in found.items():
        of = values[name]
        scored = [of[k] for k in kept[name] if not math.isnan(of[k])]
        unscored = sum(map(math.isnan, of)) if recipe.instruct.select != "all" else 0
        parts[name] = Part(
            read=len(rows) + rejected,
            rejected=rejected,
            repeated=len(rows) - len(of),
            unscored=unscored,
            left=len(of) - unscored - len(kept[name]),
            kept=len(kept[name]),
            entropy=sum(scored) / len(scored) if scored else None,
        )
        say(f"instruct: {name}: {told(parts[name])}")
    _write(folder / CHOSEN, (fresh[name][k] for name in fresh for k in kept[name]))
    if recipe.instruct.select != "all":
        _write(folder / ENTROPIES, _scored(fresh, values, kept))
    _write_text(folder / PARTS, json.dumps({name: asdict(part) for name, part in parts.items()}, indent=1) + "\n")
    return parts


def told(part: Part) -> str:
    """`kept 40 of 100 (10 repeated, 50 left out by their entropy)`"""
    lost = {
        "rejected": part.rejected,
        "repeated": part.repeated,
        "without an answer": part.unscored,
        "left out by their entropy": part.left,
    }
    said = ", ".join(f"{count:,} {why}" for why, count in lost.items() if count)
    return f"kept {part.kept:,} of {part.read:,}" + (f" ({said})" if said else "")


def sources(settings: InstructSettings, root: Path) -> dict[str, str]:
    """The instruction data by name; each file of a folder or of a pattern is a source of its own.

    Raises:
        SettingsError: two of one name.
        DataError: a folder or a pattern holds no file.
    """
    listed = (settings.data,) if isinstance(settings.data, str) else settings.data
    found: dict[str, str] = {}
    for where in (where for given in listed for where in _places(given, root)):
        path = Path(where)
        name = path.name.partition(".")[0]
        name = name if name not in found else f"{path.parent.name}/{name}"
        if name in found:
            raise SettingsError(f"instruct.data has two sources {name!r}, {found[name]} and {where}; rename one")
        found[name] = where
    if not found:
        raise DataError(f"instruct.data {', '.join(listed)}: no file there that could be read")
    return found


def _places(given: str, root: Path) -> list[str]:
    """The files that a setting means, or the one place."""
    found = place(given, root)
    if Path(found).is_dir():
        return [os.fspath(file) for file in sorted(Path(found).rglob("*")) if file.is_file() and readable(file)]
    return sorted(glob.glob(found, recursive=True)) if glob.has_magic(given) else [found]


def _conversations(name: str, path: str, folder: Path) -> tuple[list[Example], int]:
    """Conversations of a source, and how many of its rows could not be read; those are listed in a file."""
    examples = read(path, rejected_to=folder / f"rejected_{name.replace('/', '_')}.jsonl")
    if examples.kind != "chat":
        raise DataError(
            f"instruct.data {path} holds {examples.kind} ({examples.format.describe()}); "
            "expected conversations or instructions"
        )
    return list(examples), examples.counts.rejected


def _without_repeats(found: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """The first of those that say the same, whatever its case, spacing and source."""
    seen: set[str] = set()
    fresh: dict[str, list[Example]] = {name: [] for name in found}
    for name, rows in found.items():
        for row in rows:
            mark = fingerprint(surface(row))
            if mark not in seen:
                fresh[name].append(row)
                seen.add(mark)
    return fresh


def _entropies(
    fresh: Mapping[str, Sequence[Example]], settings: InstructSettings, base: Path, run: RunSettings
) -> dict[str, list[float]]:
    """By source; NaN throughout where the choice does not need them."""
    if settings.select == "all":
        return {name: [math.nan] * len(rows) for name, rows in fresh.items()}
    model, tokenizer = _opened(base)
    how: dict[str, Any] = {"max_length": run.max_length, "template": run.template}
    return {name: answer_entropy(model, tokenizer, rows, **how) for name, rows in fresh.items()}


def _opened(base: Path) -> tuple[nn.Module, Tokenizer]:
    from pegbox.train.model import load

    loaded = load(os.fspath(base), "sft")
    return loaded.model, loaded.tokenizer


def _kept(values: Mapping[str, Sequence[float]], settings: InstructSettings) -> dict[str, list[int]]:
    """Indices within each source."""
    if settings.select == "all":
        return {name: list(range(len(of))) for name, of in values.items()}
    how: dict[str, Any] = {"band": settings.band, "share": settings.share}
    if settings.per_source:
        return {name: select(of, settings.select, **how) for name, of in values.items()}
    places = [(name, k) for name, of in values.items() for k in range(len(of))]
    kept: dict[str, list[int]] = {name: [] for name in values}
    for rank in select([values[name][k] for name, k in places], settings.select, **how):
        name, k = places[rank]
        kept[name].append(k)
    return kept


def _scored(
    fresh: Mapping[str, Sequence[Example]], values: Mapping[str, Sequence[float]], kept: Mapping[str, Sequence[int]]
) -> Iterator[Example]:
    for name, rows in fresh.items():
        chosen = set(kept[name])
        for k, (row, value) in enumerate(zip(rows, values[name], strict=True)):
            known = None if math.isnan(value) else round(value, 6)  # JSON has no NaN
            yield {"source": name, "id": row["id"], "entropy": known, "kept": k in chosen}


def _write(path: Path, rows: Iterator[Example]) -> None:
    """JSON Lines; the file gets its name when it is whole."""
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.partial")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
