"""EVA and LoRA-GA beside HF PEFT's, on the same batches: what is equal, and what PEFT does in another way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import pegbox
from pegbox.checks.models import FAMILIES
from pegbox.core.low_rank_start import started
from pegbox.train import Callback

RANK, ALPHA = 8, 12.0
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]  # 32 inputs each: the drawn SVD of 32 directions is exact
NAME = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers


def llama() -> Any:
    """Of embeddings whose directions are told apart by their lengths."""
    torch.manual_seed(0)
    model = FAMILIES["llama"].build().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.8 ** torch.arange(32))
    return model


def batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(50, (6, 12), generator=draw) for _ in range(4)]
    return [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]


def looked(method: str, **settings: Any) -> pegbox.core.Tuned:
    tuned = pegbox.tune(llama(), method, rank=RANK, alpha=ALPHA, targets=tuple(TARGETS), start_settings=settings)
    Callback(tuned).calibrate(batches())
    return tuned


def in_peft(tuned: pegbox.core.Tuned, folder: Path) -> Any:
    tuned.save(folder)
    return PeftModel.from_pretrained(llama(), str(folder), is_trainable=True).eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_directions(ours: Tensor, theirs: Tensor, within: float = 1e-4) -> None:
    """Rows, up to their length and sign."""
    cosines = nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(len(ours)), rtol=0, atol=within)


@pytest.fixture(scope="module")
def eva() -> pegbox.core.Tuned:
    return looked("eva", tau=0.999, batches=400)


def test_evas_ranks_and_directions_are_pefts(eva: pegbox.core.Tuned) -> None:
    """PEFT holds directions of two batches against each other with their signs, and so may see some batches more."""
    found = EvaConfig(rho=2.0, tau=0.999, use_label_mask=False)
    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights="eva", eva_config=found)
    theirs = get_eva_state_dict(llama(), batches(), config, show_progress_bar=False)
    ours = {path: graft.a for path, graft in started(eva, "default").items()}
    assert sum(map(len, ours.values())) == sum(map(len, theirs.values())) == RANK * len(theirs)
    assert by_inputs(ours) == by_inputs(theirs)  # among layers with equal inputs PEFT gives the first the most
    assert len(set(by_inputs(ours).values())) > 2, "the ranks differ"
    for path, a in ours.items():
        both = min(len(a), len(theirs[path]))
        same_directions(a[:both], theirs[path][:both], within=1e-2)


def by_inputs(found: Mapping[str, Tensor]) -> dict[str, int]:
    """Ranks together of layers that read the same."""
    ranks: dict[str, int] = {}
    for path, a in found.items():
        key = path.replace("v_proj", "q_proj")
        ranks[key] = ranks.get(key, 0) + len(a)
    return ranks


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_peft_runs_what_was_found(method: str, eva: pegbox.core.Tuned, tmp_path: Path) -> None:
    """Ranks and alphas by layer, and factors that stand apart: outputs and gradients are those here, to 1e-5."""
    tuned = eva if method == "eva" else looked(method)
    for graft in started(tuned, "default").values():
        nn.init.normal_(graft.b, std=0.1)
    theirs = in_peft(tuned, tmp_path)
    batch = batches()[0]
    torch.testing.assert_close(theirs(**batch).logits, tuned(**batch).logits, rtol=1e-5, atol=1e-5)
    want = gradients(theirs)
    gradients(tuned)
    for path, graft in started(tuned, "default").items():
        rank = len(graft.a)  # of twice as many where A_0 and B_0 are in the file
        a, b = (want[f"{NAME}{path}.lora_{x}.default.weight"] for x in "AB")
        torch.testing.assert_close(graft.a.grad, a[:rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(graft.b.grad, b[:, :rank], rtol=1e-5, atol=1e-5)


def test_lora_gas_directions_are_pefts_and_its_lengths_are_the_papers() -> None:
    """PEFT has the gradient's singular values in B, and the scale in B alone; the paper has neither."""
    tuned = looked("lora_ga", batches=4)
    model = llama()
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the first layer's inputs need no gradient, that the base has changed
        preprocess_loraga(model, config, lambda: backward(model))
        theirs = dict(get_peft_model(model, config).named_parameters())
    for path, graft in started(tuned, "default").items():
        a, b = (theirs[f"{NAME}{path}.lora_{x}.default.weight"] for x in "AB")
        same_directions(graft.a, a)
        same_directions(graft.b.T, b.T)
        c = graft.b.shape[0] ** 0.25 / 16**0.5
        torch.testing.assert_close(torch.stack(list(lengths(graft.a, graft.b.T))), torch.full((2, RANK), c))
        torch.testing.assert_close(a.norm(dim=1), torch.ones(RANK), rtol=1e-4, atol=1e-4)
        assert b.norm(dim=0).max() > 1.01 * b.norm(dim=0).min()


def backward(model: nn.Module) -> None:
    for batch in batches():
        model(**batch).loss.backward()


def lengths(*rows: Tensor) -> Iterator[Tensor]:
    return (x.detach().norm(dim=1) for x in rows)
