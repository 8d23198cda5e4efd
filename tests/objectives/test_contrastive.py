"""Contrastive learning, against transformers' own loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from pegbox import objectives
from pegbox.core.errors import DataError
from pegbox.objectives.metrics import recall_of_own

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = TOWER | {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def pairs(n: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (n, 6), generator=draw)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, 8, 8, generator=draw)}


def test_the_loss_is_that_of_transformers(clip: CLIPModel) -> None:
    batch = pairs()
    theirs = clip(**batch, return_loss=True).loss
    ours = objectives.get("clip")(clip, batch)["ce"]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    halved = objectives.get("contrastive")(clip, batch, num_items=10.0)["ce"]
    torch.testing.assert_close(halved, theirs / 2, rtol=1e-6, atol=1e-6)


def test_recall_counts_ties_against_a_pair(clip: CLIPModel) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 1.0], [9.0, 8.0, 7.0]])
    assert recall_of_own(scores, 1) == pytest.approx(1 / 3)
    assert recall_of_own(scores, 2) == pytest.approx(2 / 3)
    measured = objectives.get("contrastive").measure(objectives.get("contrastive").predict(clip, pairs()))
    assert measured.keys() == {"recall_at_1", "recall_at_5"}
    assert measured["recall_at_5"] == 1.0


def test_a_model_of_one_tower_is_refused() -> None:
    class One(torch.nn.Module):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"logits": pixel_values}

    with pytest.raises(DataError, match="two towers"):
        objectives.get("contrastive")(One(), pairs())
    with pytest.raises(DataError, match="pixel_values"):
        objectives.get("contrastive").count({"input_ids": pairs()["input_ids"]})
