"""The result of `pegbox.data.check.check`: counts, and the faults that were found with their rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from pegbox.data.faults import FAULTS, Severity

SHOWN = 20  # ids listed with a finding
SUPERVISED = ("chat", "text", "tokenised", "preference", "unpaired")  # kinds whose tokens are the targets


@dataclass(frozen=True)
class Finding:
    """A fault of `pegbox.data.faults.FAULTS` that was found in `count` rows, the first of which are `ids`."""

    name: str
    severity: Severity
    count: int
    ids: tuple[str, ...]
    says: str
    do: str
    detail: str = ""


@dataclass
class Report:
    """What `check` saw.

    `lengths` are percentiles, "p50" to "p100", in `unit` ("tokens" or "characters"). `tokens` (after truncation),
    `trained_tokens` and `lost_tokens` are 0 without a tokenizer. `labels` counts rows by class, or tokens by tag.
    """

    source: str
    format: str
    kind: str
    rows: int = 0
    rejected: int = 0
    unit: str = "characters"
    lengths: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    lost_tokens: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def trained_share(self) -> float | None:
        """Share of the tokens that carry a loss; None where tokens are no targets, or none were counted."""
        return self.trained_tokens / self.tokens if self.tokens and self.kind in SUPERVISED else None

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"trained_share": self.trained_share}, ensure_ascii=False, indent=2)


@dataclass
class Found:
    """Ids of the faulty rows by fault, collected while the rows go by."""

    ids: dict[str, dict[str, None]] = field(default_factory=dict)  # as an ordered set
    details: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, *ids: str) -> None:
        self.ids.setdefault(name, {}).update(dict.fromkeys(ids))

    def findings(self) -> list[Finding]:
        """The faults that have rows, in the order of `FAULTS`."""
        return [self._finding(name) for name in FAULTS if self.ids.get(name)]

    def _finding(self, name: str) -> Finding:
        fault, ids = FAULTS[name], tuple(self.ids[name])
        return Finding(name, fault.severity, len(ids), ids[:SHOWN], fault.says, fault.do, self.details.get(name, ""))
