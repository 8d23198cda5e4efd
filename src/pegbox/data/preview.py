"""A report and the mask of single rows, for the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pegbox.data.report import Finding, Report
from pegbox.data.supervision import IGNORED, special_tokens
from pegbox.data.tokenise import Encoded

TRAINED, CONTEXT = "green", "dim"
SPECIAL = "reverse"  # added to either
SEVERITY = {"error": "bold red", "warning": "yellow", "note": "cyan"}
LEGEND = Text.assemble("mask: ", ("trained", TRAINED), ", ", ("context", CONTEXT), ", ", ("special token", SPECIAL))


def render(report: Report) -> Group:
    """The report as a table of counts and, below it, the findings."""
    return Group(_counts(report), *_findings(report))


def mask(row: Encoded, tokenizer: Any) -> Text:
    """The text of a tokenised row: trained tokens green, context dim, special tokens reversed."""
    special = set(special_tokens(tokenizer))
    styles = [_style(token, label, special) for token, label in zip(row.input_ids, row.labels, strict=True)]
    text = Text()
    for style, start, stop in _runs(styles):
        text.append(_decoded(row.input_ids, start, stop, tokenizer), style=style)
    return text


def _style(token: int, label: int, special: set[int]) -> str:
    base = CONTEXT if label == IGNORED else TRAINED
    return f"{base} {SPECIAL}" if token in special else base


def _runs(styles: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Stretches of one style, as (style, start, stop)."""
    start = 0
    for style, group in itertools.groupby(styles):
        stop = start + sum(1 for _ in group)
        yield style, start, stop
        start = stop


def _decoded(tokens: Sequence[int], start: int, stop: int, tokenizer: Any) -> str:
    """The text of some tokens as it stands after the token before them: many tokenizers drop a leading space."""
    before = tokenizer.decode(tokens[start - 1 : start]) if start else ""
    text: str = tokenizer.decode(tokens[max(start - 1, 0) : stop])
    return text[len(before) :]


def _counts(report: Report) -> Table:
    table = Table(show_header=False, box=None, title=f"{report.source}: {report.format}", title_justify="left")
    rows = {"rows": f"{report.rows}" + (f" (and {report.rejected} rejected)" if report.rejected else "")}
    if report.lengths:
        rows[f"length in {report.unit}"] = ", ".join(f"{name} {value}" for name, value in report.lengths.items())
    if report.trained_share is not None:
        rows["trained tokens"] = f"{report.trained_tokens} of {report.tokens} ({report.trained_share:.1%})"
    if report.labels:
        rows["labels"] = _shortened([f"{label} {count}" for label, count in report.labels.items()])
    for name, value in rows.items():
        table.add_row(Text(name, CONTEXT), Text(value))
    return table


def _findings(report: Report) -> list[RenderableType]:
    if not report.findings:
        return [Text("no fault found", TRAINED)]
    return [_finding(finding) for finding in report.findings]


def _finding(finding: Finding) -> Text:
    detail = f" ({finding.detail})" if finding.detail else ""
    return Text.assemble(
        (f"{finding.severity} ", SEVERITY[finding.severity]),
        (f"{finding.name} ({finding.count}): ", "bold"),
        f"{finding.says}{detail}\n",
        (f"    rows {_shortened(finding.ids, 5)}\n    {finding.do}", CONTEXT),
    )


def _shortened(items: Sequence[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
