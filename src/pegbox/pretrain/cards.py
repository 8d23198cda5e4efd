"""What lies beside a base's weights: README.md, the model card, and DATA.md, the data card; made of what is known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pegbox.pretrain.report import Story, bits_section, made_by_section, table, texts_section, trained_on

MODEL, DATA = "README.md", "DATA.md"


def write(story: Story, folder: Path) -> None:
    """Both cards, in the folder of the model."""
    (folder / MODEL).write_text(model_card(story), encoding="utf-8")
    (folder / DATA).write_text(data_card(story), encoding="utf-8")


def model_card(story: Story) -> str:
    """Front matter of the hub, architecture, training, results, use."""
    recipe = story.recipe
    facts: dict[str, Any] = {"license": recipe.licence} if recipe.licence else {}
    facts |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pegbox", "pretrained"]}
    front = yaml.safe_dump(facts, sort_keys=False)
    head = (
        f"# {recipe.name}\n\nA language model of {story.parameters:,} parameters, of the Llama architecture, trained "
        f"from nothing on {trained_on(story)}. What it was trained on: [{DATA}]({DATA})."
    )
    limits = (
        "## Limits\n\nIt continues texts like those it was trained on. It has not been made safe, and what it states "
        "as a fact need not be one."
    )
    settings = {"model": asdict(recipe.model), "train": asdict(recipe.train), "rows.length": recipe.rows.length}
    parts = [head, limits, bits_section(story), f"## Settings\n\n{_settings(settings)}", _use(), made_by_section(story)]
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def data_card(story: Story) -> str:
    """Where the texts are from, under which licences, what was dropped and why, what was held out."""
    recipe = story.recipe
    origin = table(
        ("source", "licence", "cite"),
        ((name, source.licence or "not given", source.cite or "-") for name, source in recipe.sources.items()),
    )
    kept_out = ", ".join(recipe.held_out) or "none"
    cleaning = {"clean": asdict(recipe.clean), "duplicates": asdict(recipe.duplicates)}
    cleaning |= {f"sources.{name}.clean": dict(s.clean) for name, s in recipe.sources.items() if s.clean}
    parts = [
        f"# Texts of {recipe.name}",
        origin,
        texts_section(story),
        _dropped(story),
        f"## Held out\n\nNever trained on: {kept_out}."
        + (_decontaminated(recipe.duplicates.held_out) if recipe.held_out else ""),
        f"## Settings\n\n{_settings(cleaning)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _dropped(story: Story) -> str:
    reasons = list(dict.fromkeys(reason for found in story.texts.values() for reason in found["dropped"]))
    if not reasons:
        return "## Dropped\n\nNothing."
    rows = [(name, *(found["dropped"].get(reason, 0) for reason in reasons)) for name, found in story.texts.items()]
    return f"## Dropped\n\nTexts, by the first reason that held.\n\n{table(('source', *reasons), rows)}"


def _decontaminated(words: int | None) -> str:
    if words is None:
        return " Training texts were not compared with them."
    return f" Training texts that share {words} words in a row with one of them were dropped."


def _settings(parts: dict[str, Any]) -> str:
    rows = []
    for part, values in parts.items():
        flat = {f"{part}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {part: values}
        rows += [(f"`{key}`", f"`{value}`") for key, value in flat.items()]
    return table(("setting", "value"), rows)


def _use() -> str:
    return """\
## Use

with the folder of this card in the place of FOLDER:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer("It was", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0], skip_special_tokens=True))
```"""
