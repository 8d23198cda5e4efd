"""Texts out of a model: a batch of prompts, a stream, a file of prompts into a file of answers in the same order.

Each row of a batch may use an adapter of its own.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import pegbox
from pegbox.core.errors import DataError, ModelError, SettingsError, did_you_mean
from pegbox.core.settings import build, setting
from pegbox.core.tuned import Tuned
from pegbox.evaluate.opened import open_model
from pegbox.evaluate.prompts import Prompt, ids_of, padded, prompt_of
from pegbox.train.run import output_folder
from pegbox.train.settings import Opening

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Rows = Sequence[str | None]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How texts are drawn."""

    max_new_tokens: int = setting(256, "longest answer, in tokens", at_least=1)
    temperature: float = setting(0.0, "0 takes the likeliest token; above, tokens are drawn", at_least=0)
    top_p: float = setting(1.0, "draw among the likeliest tokens that hold this share", above=0, at_most=1)
    top_k: int | None = setting(None, "draw among so many of the likeliest tokens", at_least=1)
    repetition_penalty: float = setting(1.0, "above 1, tokens that were used become less likely", above=0)
    seed: int = setting(0, "of the draws", at_least=0)
    batch_size: int = setting(8, "prompts of one forward", at_least=1)
    task: str | None = setting(None, "of an adapter that knows several: which, by name or number")
    system: str | None = setting(None, "system message before every prompt that has none")
    template: str | None = setting(None, "chat template by name, for a tokenizer that has none of its own")
    raw: bool = setting(False, "take a text as it is, not as a user's turn")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Decoding):
    """What `pegbox generate` takes as `key=value`."""

    adapter: str | None = setting(None, "folder of an adapter")
    model: str | None = setting(None, "the base, or a whole model")
    quantise: Opening = setting("auto", "how the base is kept; auto: as in the adapter's training")  # noqa: RUF009
    adapters: str | tuple[str, ...] = setting((), "several, as name=folder; a row's column `adapter` chooses")
    prompt: str | None = setting(None, "one prompt")
    data: str | None = setting(None, "a file of prompts")
    output: str | None = setting(None, "the JSON Lines file for the answers to data")


def run(settings: GenerateSettings) -> str:
    """What the command does: answer a prompt, or a file of them; gives what to print."""
    what = settings.adapter or settings.model
    if what is None or (settings.prompt is None) == (settings.data is None):
        raise SettingsError("generate needs adapter= or model=, and one of prompt= and data=")
    base = settings.model if settings.adapter else None
    decoding = Decoding(**{f.name: getattr(settings, f.name) for f in fields(Decoding)})
    adapters = named_folders(settings.adapters)
    opening: dict[str, Any] = {"base": base, "adapters": adapters, "quantise": settings.quantise}
    if settings.prompt is not None:
        which = list(adapters)[:1] if adapters else None
        return generate(what, [settings.prompt], which=which, decoding=decoding, **opening)[0]
    if settings.output is None:
        raise SettingsError("generate with data= needs output=, the file for the answers")
    assert settings.data is not None
    count = generate_file(what, settings.data, settings.output, decoding=decoding, **opening)
    return f"{count} answers in {settings.output}"


def generate(
    what: str | os.PathLike[str] | nn.Module,
    prompts: Sequence[Prompt],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    quantise: str = "auto",
    which: Rows | None = None,
    decoding: Decoding | None = None,
    **settings: Any,
) -> list[str]:
    """Answers to prompts, in their order.

    Args:
        what: an adapter folder, a model's name or folder, or a module (a tuned model too).
        prompts: texts or messages.
        base: of the adapter folder, where it is not the one it names.
        adapters: more adapters by name, to put on the model.
        quantise: how the base is kept; `auto` for as in training.
        which: the adapter of each prompt, None for the base.
        decoding, settings: a Decoding, or its fields.

    Raises:
        ModelError: a model that cannot be loaded, has no tokenizer or does not generate.
        DataError: a prompt without tokens, or too long for the model.
        SettingsError: adapters without a choice among them, or a name that is none of theirs.
    """
    model, reader = opened_with(what, base=base, tokenizer=tokenizer, adapters=adapters, quantise=quantise)
    decoding = decoding or build(Decoding, settings, what="generate")
    which, tasks = _choices(model, which, adapters, len(prompts)), _tasks(model, decoding, [None] * len(prompts))
    return list(_answers(model, reader, prompts, which, tasks, decoding))


def generate_file(
    what: str | os.PathLike[str] | nn.Module,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    quantise: str = "auto",
    decoding: Decoding | None = None,
    **settings: Any,
) -> int:
    """Answer every prompt of a file: each row again with `response`, one JSON object a line, in order.

    The output gets its name when it is whole.  A row's `adapter` chooses among `adapters`.

    Returns:
        How many rows there were.

    Raises:
        DataError: a row that cannot be read or has no prompt; nothing has been generated then.
    """
    rows = _rows(source)
    prompts = [prompt_of(row, f"{os.fspath(source)}, row {k + 1}") for k, row in enumerate(rows)]
    model, reader = opened_with(what, base=base, tokenizer=tokenizer, adapters=adapters, quantise=quantise)
    which = _choices(model, [row.get("adapter") for row in rows] if adapters else None, adapters, len(rows))
    decoding = decoding or build(Decoding, settings, what="generate")
    tasks = _tasks(model, decoding, [row.get("task") for row in rows])
    target = output_folder(os.fspath(Path(output).parent)) / Path(output).name
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row, answer in zip(rows, _answers(model, reader, prompts, which, tasks, decoding), strict=True):
            file.write(json.dumps({**row, "response": answer}, ensure_ascii=False, default=str) + "\n")
    partial.replace(target)
    return len(rows)


def stream(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, decoding: Decoding | None = None
) -> Iterator[str]:
    """The answer to one prompt, in pieces as they are made; leaving off early stops the model too."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    decoding = decoding or Decoding()
    inputs, config = _inputs(model, tokenizer, [prompt], decoding), _config(model, tokenizer, decoding)
    tasks = _tasks(model, decoding, [None])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failed = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            with _drawn(decoding.seed), _using(model, None, tasks):
                model.generate(  # type: ignore[operator]
                    **inputs,
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda ids, scores: torch.full((len(ids),), stop.is_set())]
                    ),
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


# -- opening -----------------------------------------------------------------------------------------------------


def opened_with(
    what: str | os.PathLike[str] | nn.Module,
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    quantise: str = "auto",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model that generates, its tokenizer, and more adapters put on it by name."""
    model, reader = open_model(what, model=base, tokenizer=tokenizer, quantise=quantise)
    for name, folder in (adapters or {}).items():
        model = pegbox.load(model, folder, name=name)
    plain: Any = model.model if isinstance(model, Tuned) else model
    if not callable(getattr(plain, "can_generate", None)) or not plain.can_generate():
        raise ModelError(f"a {type(plain).__name__} generates no text; pegbox.evaluate.classify may be what is wanted")
    return model.eval(), reader


def named_folders(given: str | Sequence[str]) -> dict[str, str]:
    """`("a=out/a", "b=out/b")` by name."""
    listed = [part for part in given.split(",") if part] if isinstance(given, str) else list(given)
    pairs = [item.partition("=") for item in listed]
    for name, sign, folder in pairs:
        if not (name and sign and folder):
            raise SettingsError(f"adapters are given as name=folder, got {name + sign + folder!r}")
    return {name.strip(): folder.strip() for name, _, folder in pairs}


def _choices(model: nn.Module, which: Rows | None, adapters: Mapping[str, Any] | None, count: int) -> Rows | None:
    """The adapter of each prompt, checked; None where the model is used as it stands."""
    if which is None:
        if adapters and len(adapters) > 1:
            raise SettingsError(
                f"there are {len(adapters)} adapters, so each prompt must name one of {', '.join(adapters)}"
            )
        return None
    if not isinstance(model, Tuned):
        raise SettingsError("prompts name adapters, and the model has none")
    if len(which) != count:
        raise SettingsError(f"{count} prompts and {len(which)} names of adapters; there must be one for each")
    for name in which:
        if name is not None and name not in model.adapters:
            raise SettingsError(f"no adapter {name!r}{did_you_mean(name, model.adapters)}")
    return which


def _tasks(model: nn.Module, decoding: Decoding, named: Sequence[Any]) -> list[int] | None:
    """The number of each prompt's task, one for all or as their rows name it; None where the model asks for none."""
    if not (isinstance(model, Tuned) and len(model.active) == 1 and model.method.tasks_needed()):
        if decoding.task is not None:
            raise SettingsError(
                f"task={decoding.task} is for an adapter that knows several tasks; this model asks for none"
            )
        return None
    known = model.method.tasks_known()
    wanted = [task if decoding.task is None else decoding.task for task in named]
    for k, task in enumerate(wanted):
        if task is None:
            told = f" ({', '.join(known)})" if known else ""
            raise SettingsError(
                f"this adapter knows several tasks{told}, and prompt {k + 1} names none; give task=NAME, or a column "
                "task of the data"
            )
        if task not in known and not str(task).isdecimal():
            raise SettingsError(f"no task {task!r}{did_you_mean(str(task), known)}")
    return [known.index(task) if task in known else int(task) for task in wanted]


# -- generating --------------------------------------------------------------------------------------------------


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    which: Rows | None,
    tasks: Sequence[int] | None,
    decoding: Decoding,
) -> Iterator[str]:
    config = _config(model, tokenizer, decoding)
    for start in range(0, len(prompts), decoding.batch_size):
        some = slice(start, start + decoding.batch_size)
        inputs = _inputs(model, tokenizer, prompts[some], decoding, start)
        with _drawn(decoding.seed + start), _using(model, which and which[some], tasks and tasks[some]):
            out = model.generate(**inputs, generation_config=config)  # type: ignore[operator]
        new = out if _has_encoder(model) else out[:, inputs["input_ids"].shape[1] :]  # (rows, new tokens)
        yield from tokenizer.batch_decode(new, skip_special_tokens=True)


def _inputs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], decoding: Decoding, first: int = 0
) -> dict[str, torch.Tensor]:
    how = {"template": decoding.template, "system": decoding.system, "raw": decoding.raw}
    rows = [ids_of(prompt, tokenizer, **how) for prompt in prompts]  # type: ignore[arg-type]
    _check_lengths(model, [len(row) for row in rows], decoding, first)
    ids, mask = padded(rows, _pad(tokenizer), left=not _has_encoder(model))
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _check_lengths(model: nn.Module, lengths: Sequence[int], decoding: Decoding, first: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or _has_encoder(model):
        return
    for k, length in enumerate(lengths):
        if length + decoding.max_new_tokens > limit:
            raise DataError(
                f"prompt {first + k + 1} has {length} tokens; with max_new_tokens={decoding.max_new_tokens} that is "
                f"more than the {limit} the model holds"
            )


def _config(model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> GenerationConfig:
    """The model's own generation settings (end tokens above all), drawn as asked."""
    config: Any = copy.deepcopy(model.generation_config)
    draws = decoding.temperature > 0
    config.update(
        do_sample=draws,
        max_new_tokens=decoding.max_new_tokens,
        max_length=None,
        temperature=decoding.temperature if draws else None,
        top_p=decoding.top_p if draws else None,
        top_k=(decoding.top_k or 0) if draws else None,
        min_p=None,
        typical_p=None,
        repetition_penalty=decoding.repetition_penalty,
        pad_token_id=_pad(tokenizer),
    )
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    return config


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(k for k in known if isinstance(k, int))


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


@contextlib.contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """Draws from `seed`, and the global generators as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _using(model: nn.Module, which: Rows | None, tasks: Sequence[int] | None) -> Iterator[None]:
    """Inside, rows have adapters and tasks of their own."""
    with contextlib.ExitStack() as stack:
        if isinstance(model, Tuned) and which is not None:
            stack.enter_context(model.rows(which))
        if isinstance(model, Tuned) and tasks is not None:
            stack.enter_context(model.given(task_ids=tasks))
        yield


def _rows(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    from pegbox.data.sources import load_records

    rows = []
    for found in load_records(os.fspath(source)):
        if found.row is None:
            raise DataError(f"{found.source}, line {found.line}: {found.problem}")
        rows.append(dict(found.row))
    return rows
