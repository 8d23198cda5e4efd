"""The published layouts of a row, one entry each: the columns it needs, how their values look, how it is read.

A new layout is a new entry in `LAYOUTS`; the first entry that fits wins, so the narrower stand before the wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pegbox.data import images, labels
from pegbox.data.conversations import Message, look_like, messages, parsed, text, tools, transcript
from pegbox.data.rejects import RowError

Row = Mapping[str, Any]
Example = dict[str, Any]
Names = dict[str, tuple[str, ...]]
Convert = Callable[[Row], Example]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published layout.

    `needs` and `takes` map what a value is to the columns it may stand in, the usual one first. `fits`, `convert` and
    `learn` see rows under the former names. `learn` is for what only many rows together tell (the type of a label):
    it gives the kind and the reader.
    """

    name: str
    kind: str  # chat, text, classification, tagging, preference, unpaired, tokenised, image
    shape: str  # a row, as a user would write it
    needs: Names
    takes: Names = field(default_factory=dict)
    fits: Callable[[Row], bool]
    convert: Convert
    learn: Callable[[Iterable[Row]], tuple[str, Convert]] | None = None

    def bind(self, columns: Iterable[str]) -> dict[str, str]:
        """What each value is -> the column it stands in, among those that are there."""
        there = set(columns)
        found = {
            name: next((c for c in known if c in there), None) for name, known in (self.needs | self.takes).items()
        }
        return {name: column for name, column in found.items() if column is not None}

    def misses(self, columns: Iterable[str]) -> list[str]:
        """The usual names of the columns it needs and does not find."""
        bound = self.bind(columns)
        return [known[0] for name, known in self.needs.items() if name not in bound]

    def matches(self, columns: Iterable[str], sample: Sequence[Row]) -> bool:
        """Whether the columns are there and most of the rows look as they should."""
        columns = set(columns)
        if self.misses(columns):
            return False
        bound = self.bind(columns)
        rows = ({name: row.get(column) for name, column in bound.items()} for row in sample)
        return 2 * sum(self.fits(row) for row in rows) > len(sample)


def _columns(**usual: str) -> Names:
    return {name: tuple(known.split()) for name, known in usual.items()}


# Chat


def _opening(row: Row) -> list[Message]:
    """What comes before the answer: system, history, and the prompt as text or turns."""
    turns = messages(row["turns"]) if row.get("turns") else []
    prompt = row.get("prompt")
    if isinstance(prompt, (list, Mapping)):
        turns += messages(prompt, "prompt")
    elif prompt is not None or row.get("input") or row.get("context"):
        parts = [text(row[name], name) for name in ("context", "prompt", "input") if row.get(name)]
        turns.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    return [*_system(row, turns), *_history(row.get("history")), *turns]


def _system(row: Row, turns: Sequence[Message]) -> list[Message]:
    """The system column; turns that open with a system turn of their own keep theirs."""
    if not row.get("system") or (turns and turns[0]["role"] == "system"):
        return []
    return [{"role": "system", "content": text(row["system"], "system")}]


def _history(value: Any) -> list[Message]:
    pairs = parsed(value, "history") if value else []
    if not _is_list(pairs) or not all(_is_list(pair) and len(pair) == 2 for pair in pairs):
        raise RowError("history is not a list of [question, answer]", f"found {value!r:.80}")
    return [
        {"role": role, "content": text(said, "history")}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def _answer(value: Any, name: str) -> list[Message]:
    """An answer: text, one turn, or turns."""
    if isinstance(value, (list, Mapping)):
        return messages(value, name)
    return [{"role": "assistant", "content": text(value, name)}]


def _chat(turns: list[Message], row: Row) -> Example:
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("no assistant turn", f"roles: {', '.join(turn['role'] for turn in turns) or 'none'}")
    return {"messages": turns} | _tools(row)


def _tools(row: Row) -> Example:
    declared = tools(row.get("tools"))
    return {"tools": declared} if declared else {}


def _conversation(row: Row) -> Example:
    return _chat(_opening(row), row)


def _exchange(row: Row) -> Example:
    return _chat([*_opening(row), *_answer(row.get("answer"), "answer")], row)


# Preferences


def _preference(row: Row) -> Example:
    opening = _opening(row)
    chosen, rejected = _reply(row.get("chosen"), "chosen"), _reply(row.get("rejected"), "rejected")
    if _whole(chosen) and _whole(rejected):  # both tell the whole conversation, prompt included
        shared = _shared(chosen, rejected)
        system = opening[:1] if opening and opening[0]["role"] == "system" and shared[0]["role"] != "system" else []
        opening, chosen, rejected = [*system, *shared], chosen[len(shared) :], rejected[len(shared) :]
    return _pair(opening, chosen, rejected, row)


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Row) -> Example:
    if not chosen or not rejected or chosen == rejected:
        raise RowError("chosen and rejected do not differ")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | _tools(row) | _margin(row.get("margin"))


def _margin(value: Any) -> Example:
    """By how much the chosen answer is better, where a row says so."""
    if value is None or value == "":
        return {}
    try:
        return {"margin": float(value)}
    except (TypeError, ValueError):
        raise RowError("margin is not a number", f"found {value!r}") from None


def _reply(value: Any, name: str) -> list[Message]:
    turns = transcript(value) if isinstance(value, str) else None
    return turns if turns is not None else _answer(value, name)


def _whole(turns: Sequence[Message]) -> bool:
    return bool(turns) and turns[0]["role"] in ("system", "user")


def _shared(a: Sequence[Message], b: Sequence[Message]) -> list[Message]:
    """The turns two conversations open with alike; the answers, where those are alike too, stay out."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    if not count:
        raise RowError("chosen and rejected open with different prompts")
    return list(a[:count])


def _rejected_answer(row: Row) -> Example:
    """ms-swift: a conversation, and another text for its last answer."""
    turns = _opening(row) + (_answer(row["answer"], "answer") if row.get("answer") is not None else [])
    prompt, chosen = _last_answer(turns)
    return _pair(prompt, chosen, _answer(row.get("rejected"), "rejected_response"), row)


def _last_answer(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's", f"it is {turns[-1]['role'] if turns else 'missing'}")
    return turns[:-1], turns[-1:]


def _rejected_turns(row: Row) -> Example:
    return _preference({**row, "turns": None, "chosen": row["turns"]})


def _unpaired(row: Row) -> Example:
    """One answer and whether it was wanted (KTO)."""
    label = labels.truth(row.get("label"))
    answer = _answer(row["answer"], "completion") if row.get("answer") is not None else []
    prompt, completion = (_opening(row), answer) if answer else _last_answer(_opening(row))
    return {"prompt": prompt, "completion": completion, "label": label} | _tools(row)


# Classification


def _learn_label(rows: Iterable[Row]) -> tuple[str, Convert]:
    kind, read = labels.learn(row.get("label") for row in rows)
    return kind, lambda row: _classified(row) | {"label": read(row.get("label"))}


def _classified(row: Row) -> Example:
    if "turns" in row:
        return {"messages": _opening(row)}
    pair = {"text_pair": text(row.get("text_pair"), "text_pair")} if "text_pair" in row else {}
    return {"text": text(row.get("text"), "text")} | pair


def _learn_image_label(rows: Iterable[Row]) -> tuple[str, Convert]:
    rows = list(rows)
    kind, read = labels.learn(row.get("label") for row in rows)
    if kind == "regression":
        kind, read = labels.learn(str(row.get("label")) for row in rows)
    return "image", lambda row: {"image": images.canonical(row.get("image")), "label": read(row.get("label"))}


def _tagged(row: Row) -> Example:
    tokens, tags = parsed(row.get("tokens"), "tokens"), parsed(row.get("tags"), "tags")
    if not _is_list(tokens) or not _is_list(tags):
        raise RowError("tokens or tags is not a list")
    if len(tokens) != len(tags):
        raise RowError("tokens and tags differ in number", f"{len(tokens)} tokens, {len(tags)} tags")
    if not tokens or not all(isinstance(tag, (str, int)) for tag in tags):
        raise RowError("no tokens" if not tokens else "a token has no tag, or one that is no name or number")
    return {"tokens": [text(token, "token") for token in tokens], "tags": tags}


# Text and tokens


def _plain(row: Row) -> Example:
    return {"text": text(row.get("text"), "text")}


def _tokenised(row: Row) -> Example:
    found = {
        name: parsed(row[name], name) for name in ("input_ids", "labels", "attention_mask") if row.get(name) is not None
    }
    for name, value in found.items():
        if not _is_list(value) or not all(isinstance(item, int) for item in value):
            raise RowError(f"{name} is not a list of whole numbers")
        if len(value) != len(found["input_ids"]):
            raise RowError("columns differ in length", f"{name} has {len(value)}, input_ids {len(found['input_ids'])}")
    if not found.get("input_ids"):
        raise RowError("input_ids is missing or empty")
    return found


# How values look


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and value != ""


def _has_label(row: Row) -> bool:
    label = row.get("label")
    return _scalar(label) or (isinstance(label, list) and all(_scalar(item) for item in label))


def _readable(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), (str, int, float)) for name in names)


def _in_turns(row: Row) -> bool:
    return look_like(row.get("turns"), "role", "content") or look_like(row.get("turns"), "from", "value")


def _answered(row: Row) -> bool:
    return _readable(row, "prompt", "answer")


def _true_or_false(row: Row) -> bool:
    return str(row.get("label")).strip().lower() in labels.TRUTH


TURNS = _columns(turns="messages conversations conversation")
AROUND = _columns(system="system", tools="tools functions")
ALPACA = _columns(prompt="instruction", answer="output response answer")
ALPACA_TAKES = _columns(input="input context", history="history", **{n: c[0] for n, c in AROUND.items()})
LABEL = _columns(label="label labels")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)


def _text_pair(first: str, second: str) -> Layout:
    return Layout(
        name=f"text pair classification ({first}, {second})",
        kind="classification",
        shape=f'{{"{first}": "...", "{second}": "...", "label": name, number or score}}',
        needs=_columns(text=first, text_pair=second) | LABEL,
        fits=lambda row: _readable(row, "text", "text_pair") and _has_label(row),
        convert=_classified,
        learn=_learn_label,
    )


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="pre-tokenised",
        kind="tokenised",
        shape='{"input_ids": [...], "labels": [...], "attention_mask": [...]}',
        needs=_columns(input_ids="input_ids"),
        takes=_columns(labels="labels", attention_mask="attention_mask"),
        fits=lambda row: _is_list(row.get("input_ids")) or str(row.get("input_ids")).startswith("["),
        convert=_tokenised,
    ),
    Layout(
        name="token classification",
        kind="tagging",
        shape='{"tokens": ["Ada", ...], "tags": ["B-PER", ...]}',
        needs=_columns(tokens="tokens words", tags="tags ner_tags labels pos_tags"),
        fits=lambda row: _is_list(row.get("tokens")) or str(row.get("tokens")).startswith("["),
        convert=_tagged,
    ),
    Layout(
        name="image classification",
        kind="image",
        shape='{"image": path, bytes or {"bytes", "path"}, "label": name or number}',
        needs=_columns(image=" ".join(images.COLUMNS), label="label labels fine_label"),
        fits=lambda row: images.looks_like(row.get("image")) and _has_label(row),
        convert=lambda row: {"image": images.canonical(row.get("image")), "label": row.get("label")},
        learn=_learn_image_label,
    ),
    Layout(
        name="preference, ms-swift (rejected_messages)",
        kind="preference",
        shape='{"messages": [...], "rejected_messages": [...]}',
        needs=TURNS | _columns(rejected="rejected_messages"),
        takes=AROUND,
        fits=_in_turns,
        convert=_rejected_turns,
    ),
    Layout(
        name="preference, ms-swift (rejected_response)",
        kind="preference",
        shape='{"messages": [...], "rejected_response": "..."}',
        needs=TURNS | _columns(rejected="rejected_response"),
        takes=AROUND,
        fits=_in_turns,
        convert=_rejected_answer,
    ),
    Layout(
        name="preference, ms-swift (query, response, rejected_response)",
        kind="preference",
        shape='{"query": "...", "response": "...", "rejected_response": "..."}',
        needs=_columns(prompt="query", answer="response", rejected="rejected_response"),
        takes=_columns(history="history") | AROUND,
        fits=_answered,
        convert=_rejected_answer,
    ),
    Layout(
        name="preference",
        kind="preference",
        shape='{"prompt": "..." or [turns], "chosen": "..." or [turns], "rejected": "..." or [turns]}',
        needs=_columns(chosen="chosen", rejected="rejected"),
        takes=_columns(prompt="prompt instruction question query", input="input", history="history")
        | _columns(turns="conversations", margin="margin")
        | AROUND,
        fits=lambda row: row.get("chosen") is not None and row.get("rejected") is not None,
        convert=_preference,
    ),
    Layout(
        name="unpaired (KTO)",
        kind="unpaired",
        shape='{"prompt": ..., "completion": ..., "label": true}',
        needs=_columns(prompt="prompt", answer="completion", label="label kto_tag"),
        takes=AROUND,
        fits=_true_or_false,
        convert=_unpaired,
    ),
    Layout(
        name="unpaired (KTO), conversation",
        kind="unpaired",
        shape='{"messages": [...], "label": true} or {"conversations": [...], "kto_tag": true}',
        needs=TURNS | _columns(label="kto_tag label"),
        takes=AROUND,
        fits=lambda row: _in_turns(row) and str(row.get("label")).strip().lower() in ("true", "false"),
        convert=_unpaired,
    ),
    Layout(
        name="unpaired (KTO), alpaca",
        kind="unpaired",
        shape='{"instruction": "...", "output": "...", "kto_tag": true}',
        needs=ALPACA | _columns(label="kto_tag"),
        takes=ALPACA_TAKES,
        fits=_true_or_false,
        convert=_unpaired,
    ),
    Layout(
        name="conversation classification",
        kind="classification",
        shape='{"messages": [...], "label": name, number or score}',
        needs=TURNS | LABEL,
        takes=_columns(system="system"),
        fits=lambda row: _in_turns(row) and _has_label(row),
        convert=_classified,
        learn=_learn_label,
    ),
    Layout(
        name="messages",
        kind="chat",
        shape='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        needs=TURNS,
        takes=AROUND,
        fits=lambda row: look_like(row.get("turns"), "role", "content"),
        convert=_conversation,
    ),
    Layout(
        name="ShareGPT",
        kind="chat",
        shape='{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        needs=_columns(turns="conversations conversation messages"),
        takes=AROUND,
        fits=lambda row: look_like(row.get("turns"), "from", "value"),
        convert=_conversation,
    ),
    *(_text_pair(first, second) for first, second in PAIRS),
    Layout(
        name="text classification",
        kind="classification",
        shape='{"text": "...", "label": name, number or score}',
        needs=_columns(text="text sentence") | LABEL,
        fits=lambda row: _readable(row, "text") and _has_label(row),
        convert=_classified,
        learn=_learn_label,
    ),
    Layout(
        name="alpaca",
        kind="chat",
        shape='{"instruction": "...", "input": "...", "output": "..."}',
        needs=ALPACA,
        takes=ALPACA_TAKES,
        fits=_answered,
        convert=_exchange,
    ),
    Layout(
        name="prompt-completion",
        kind="chat",
        shape='{"prompt": "..." or [turns], "completion": "..." or [turns]}',
        needs=_columns(prompt="prompt", answer="completion"),
        takes=AROUND,
        fits=lambda row: row.get("prompt") is not None and row.get("answer") is not None,
        convert=_exchange,
    ),
    Layout(
        name="query-response",
        kind="chat",
        shape='{"query": "...", "response": "..."}',
        needs=_columns(prompt="query question prompt input", answer="response answer output target completion"),
        takes=_columns(history="history", context="context") | AROUND,
        fits=_answered,
        convert=_exchange,
    ),
    Layout(
        name="plain text",
        kind="text",
        shape='{"text": "..."}',
        needs=_columns(text="text"),
        fits=lambda row: _readable(row, "text"),
        convert=_plain,
    ),
)
