"""What of each row would be trained: rows tokenised and masked as for a run, and looked through for faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pegbox.data.faults import spells_out
from pegbox.data.report import SUPERVISED, Found, Report
from pegbox.data.tokenise import (
    Encoded,
    Rejected,
    encode_all,
    encode_classification_all,
    encode_preference_all,
    encode_tokens_all,
)

Example = Mapping[str, Any]

IGNORED = -100  # label of a token without a loss; torch's cross_entropy passes over it
WHOLE = 2**30  # longer than any row: rows are encoded uncut, what a cut takes is counted afterwards


class Tokens(Protocol):
    """A row of tokens, with labels or not."""

    @property
    def input_ids(self) -> Sequence[int]: ...


Sides = tuple[Tokens, ...]  # the encoded texts of a row: of a preference two, else one
EncodeRows = Callable[[Sequence[Example]], tuple[dict[str, Sides], list[Rejected]]]  # sides by id


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens by id: those with a part to play (`eos_token` ...), and those merely declared special."""
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


def encoder(kind: str, tokenizer: Any, assistant_only: bool, template: str | None) -> EncodeRows:
    """How rows of a kind are tokenised and masked, uncut. Texts with labels or tags have no masks."""

    def preferences(rows: Sequence[Example]) -> tuple[dict[str, Sides], list[Rejected]]:
        pairs, rejected = encode_preference_all(rows, tokenizer, max_length=WHOLE, template=template)
        return {pair.id: (pair.chosen, pair.rejected) for pair in pairs}, rejected

    def labelled(rows: Sequence[Example]) -> tuple[dict[str, Sides], list[Rejected]]:
        used, rejected = encode_classification_all([{**r, "label": 0} for r in rows], tokenizer, None, max_length=WHOLE)
        return {row.id: (row,) for row in used}, rejected

    def tagged(rows: Sequence[Example]) -> tuple[dict[str, Sides], list[Rejected]]:
        blank = [{**row, "tags": ["O"] * len(row["tokens"])} for row in rows]
        used, rejected = encode_tokens_all(blank, tokenizer, ["O"], max_length=WHOLE)
        return {row.id: (row,) for row in used}, rejected

    def modelled(rows: Sequence[Example]) -> tuple[dict[str, Sides], list[Rejected]]:
        used, rejected = encode_all(rows, tokenizer, max_length=WHOLE, assistant_only=assistant_only, template=template)
        return {row.id: (row,) for row in used}, rejected

    special = {"preference": preferences, "classification": labelled, "regression": labelled, "tagging": tagged}
    return special.get(kind, modelled)


@dataclass
class Supervision:
    """Looks at rows in batches; adds their tokens to `report` and their faults to `found`."""

    tokenizer: Any
    encode: EncodeRows
    max_length: int
    truncation: str
    report: Report
    found: Found
    lengths: dict[str, int] = field(default_factory=dict)  # id -> tokens, uncut, of the longest side
    reasons: Counter[str] = field(default_factory=Counter)  # why rows could not be encoded

    def look(self, rows: Sequence[Example]) -> None:
        harmless = (self.tokenizer.unk_token, self.tokenizer.mask_token)
        special = [token for token in special_tokens(self.tokenizer).values() if token not in harmless]
        self.found.add("special-in-text", *(row["id"] for row in rows if spells_out(row, special)))
        encoded, rejected = self.encode(rows)
        for bad in rejected:
            self.reasons[bad.reason] += 1
            self.found.add("unencodable", bad.id)
        for id, sides in encoded.items():
            self.lengths[id] = max(len(side.input_ids) for side in sides)
            for side in sides:
                self._side(side, id)

    def _side(self, side: Tokens, id: str) -> None:
        length, unknown = len(side.input_ids), self.tokenizer.unk_token_id
        if unknown is not None and unknown in side.input_ids:
            self.found.add("unknown-tokens", id)
        over = max(length - self.max_length, 0)
        lost = length if over and self.truncation == "drop" else over
        if lost:
            self.report.lost_tokens += lost
            self.found.add("truncated", id)
        self.report.tokens += length - lost
        if isinstance(side, Encoded) and self.report.kind in SUPERVISED and lost < length:
            self._targets(side, over, id)

    def _targets(self, side: Encoded, over: int, id: str) -> None:
        kept = side.labels[over:] if self.truncation == "left" else side.labels[: len(side.labels) - over]
        trained = sum(label != IGNORED for label in kept)
        self.report.trained_tokens += trained
        if not trained:
            self.found.add("target-cut", id)
        if not side.end_trained:
            self.found.add("end-untrained", id)
