"""Batches: padding is masked, ignored and of the width asked for; batches of like lengths lose no row."""

from __future__ import annotations

import pytest
import torch

from pegbox.core.errors import SettingsError
from pegbox.data.collate import LabelCollator, PackedCollator, PadCollator, PairCollator, length_grouped
from pegbox.data.encoded import Encoded, EncodedLabel, EncodedPair
from pegbox.data.packing import Packed

A = Encoded([5, 6, 7], [-100, 6, 7], "a")
B = Encoded([8, 9], [-100, 9], "b")


def test_padding_on_the_right():
    batch = PadCollator(pad_token_id=3)([A, B])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (2, 4), (3, 3), (8, 8)])
def test_width_is_rounded_up(multiple, width):
    assert PadCollator(0, multiple)([A, B])["input_ids"].shape == (2, width)


def test_packed_padding_is_a_segment_of_its_own():
    rows = [
        Packed([5, 6, 7, 8, 9], [-100, 6, 7, -100, 9], [0, 1, 2, 0, 1], ("a", "b")),
        Packed([5], [-100], [0], ("c",)),
    ]
    batch = PackedCollator(pad_token_id=3)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [5, 3, 3, 3, 3]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]],
        "labels": [[-100, 6, 7, -100, 9], [-100] * 5],
    }


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [([1, 0], torch.int64), ([0.5, 2.0], torch.float32), ([(0.0, 1.0), (1.0, 1.0)], torch.float32)],
)
def test_labels_are_classes_targets_or_several(labels, dtype):
    rows = [EncodedLabel([5, 6, 7][: 2 + i], label, str(i)) for i, label in enumerate(labels)]
    batch = LabelCollator(pad_token_id=3)(rows)
    assert batch["labels"].dtype == dtype
    assert torch.equal(batch["labels"], torch.tensor(labels))
    assert batch["input_ids"].tolist() == [[5, 6, 3], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert "token_type_ids" not in batch


def test_token_types_are_padded_with_zero():
    rows = [EncodedLabel([5, 6, 7], 0, "a", [0, 1, 1]), EncodedLabel([5], 1, "b", [0])]
    assert LabelCollator(3)(rows)["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_pairs_are_chosen_then_rejected():
    batch = PairCollator(3)([EncodedPair(A, B, "p"), EncodedPair(B, A, "q")])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3], [8, 9, 3], [5, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100], [-100, 9, -100], [-100, 6, 7]]


def test_grouping_by_length_keeps_every_row_and_pads_less():
    lengths = [1 + (37 * i) % 101 for i in range(203)]
    batches = length_grouped(lengths, 8, seed=0, window=8)
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    assert max(map(len, batches)) == 8

    def padding(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    assert padding(batches) < 0.35 * padding(length_grouped(lengths, 8, seed=0, window=1))
    assert batches == length_grouped(lengths, 8, seed=0, window=8)
    assert batches != length_grouped(lengths, 8, seed=1, window=8)
    with pytest.raises(SettingsError, match="batch_size is 0"):
        length_grouped(lengths, 0, seed=0)
