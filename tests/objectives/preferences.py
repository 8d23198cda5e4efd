"""Pairs of answers as batches of tensors, and gradients of a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conftest import V

PROMPTS = (2, 3, 4)
CHOSEN, REJECTED = (5, 3, 7), (4, 6, 2)


def answers(seed: int = 1) -> list[tuple[Tensor, Tensor, int]]:
    """(chosen, rejected, length of their prompt), tokens of three pairs of different lengths."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, V, (n,), generator=draw)

    made = []
    for prompt, a, b in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        start = tokens(prompt)
        made.append((torch.cat([start, tokens(a)]), torch.cat([start, tokens(b)]), prompt))
    return made


def padded(pairs: list[tuple[Tensor, Tensor, int]]) -> dict[str, Tensor]:
    """(2P, T): the chosen answers, then the rejected."""
    rows = [(chosen, prompt) for chosen, _, prompt in pairs] + [(rejected, prompt) for _, rejected, prompt in pairs]
    ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row, _ in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    for row, (_, prompt) in zip(labels, rows, strict=True):
        row[:prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(pairs: list[tuple[Tensor, Tensor, int]], padding: int = 3) -> dict[str, Tensor]:
    """(1, T): each chosen answer with its rejected one behind it, and padding at the end."""
    ids, positions, labels, segments = [], [], [], []
    for number, (chosen, rejected, prompt) in enumerate(pairs):
        for side, answer in enumerate((chosen, rejected)):
            ids.append(answer)
            positions.append(torch.arange(len(answer)))
            labels.append(torch.cat([torch.full((prompt,), -100), answer[prompt:]]))
            segments.append(torch.full((len(answer),), side * len(pairs) + number))
    ids.append(torch.zeros(padding, dtype=torch.long))
    positions.append(torch.arange(padding))
    labels.append(torch.full((padding,), -100))
    segments.append(torch.full((padding,), -1))
    named = {"input_ids": ids, "position_ids": positions, "labels": labels, "segments": segments}
    return {key: torch.cat(value)[None] for key, value in named.items()}


def half(batch: dict[str, Tensor], first: bool) -> dict[str, Tensor]:
    """The chosen or the rejected rows of a padded batch."""
    return {key: value.chunk(2)[0 if first else 1] for key, value in batch.items()}


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that the loss depends on."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Losses and gradients, to 1e-5; of gradients that are large, as IPO's are, to 1e-5 of the largest."""
    torch.testing.assert_close(ours[0].float(), theirs[0].float(), rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(g.abs().max().item() for g in theirs[1].values())
    assert largest > 1e-3
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, largest), msg=name)
