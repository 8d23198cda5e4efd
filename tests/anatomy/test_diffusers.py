"""The data files of diffusers' models, known by their class."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from pegbox import anatomy
from pegbox.anatomy import tables
from pegbox.anatomy.paths import matches
from pegbox.anatomy.roles import ROLES

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'pegbox[diffusion]'")

SIZES: dict[str, Any] = {"sample_size": 8, "in_channels": 3}
UNET = SIZES | {"out_channels": 3, "block_out_channels": (16, 24), "layers_per_block": 1, "norm_num_groups": 4}
DIT = SIZES | {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}
PLAIN = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
TINY: dict[str, list[dict[str, Any]]] = {
    "UNet2DModel": [
        UNET | PLAIN | {"attention_head_dim": 4, "num_class_embeds": 5},
        UNET | PLAIN | {"attention_head_dim": 4, "class_embed_type": "timestep"},
    ],
    "UNet2DConditionModel": [
        UNET | CROSS | {"num_class_embeds": 5, "encoder_hid_dim": 10, "encoder_hid_dim_type": "text_proj"},
        UNET
        | CROSS
        | {
            "class_embed_type": "timestep",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 60,
        },
    ],
    "DiTTransformer2DModel": [DIT | {"num_embeds_ada_norm": 10}],
    "PixArtTransformer2DModel": [
        DIT | {"out_channels": 6, "cross_attention_dim": 16, "caption_channels": 10, "num_embeds_ada_norm": 10}
    ],
}


@cache
def models(name: str) -> list[nn.Module]:
    torch.manual_seed(0)
    return [getattr(diffusers, name)(**settings).eval() for settings in TINY[name]]


def test_every_class_has_a_tiny_model() -> None:
    assert set(tables.by_class()) == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_it_is_known_by_its_class(name: str) -> None:
    for model in models(name):
        found = anatomy.of(model)
        assert (found.model_type, found.source) == (None, tables.by_class()[name].source)
        assert set(tables.by_class()[name].roles) <= set(ROLES)
        assert found.head in ("conv_out", "proj_out", "proj_out_2")


@pytest.mark.parametrize("name", TINY)
def test_every_pattern_matches_a_module(name: str) -> None:
    paths = {path for model in models(name) for path, _ in model.named_modules()}
    patterns = [pattern for role in tables.by_class()[name].roles.values() for pattern in role]
    assert [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in paths)] == []


WHOLE = ("unet.down", "unet.mid", "unet.up")  # blocks by another name


@pytest.mark.parametrize("name", TINY)
def test_every_weight_in_a_block_has_one_role(name: str) -> None:
    for model in models(name):
        found = anatomy.of(model)
        roles = [path for role, paths in found.roles().items() if role not in WHOLE for path in paths]
        held = [p for p, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        wrong = {p: roles.count(p) for p in held if found.depth(p) is not None and roles.count(p) != 1}
        assert wrong == {}


@pytest.mark.parametrize("name", TINY)
def test_projections_are_matrices(name: str) -> None:
    for model in models(name):
        for role, paths in anatomy.of(model).roles().items():
            modules = [model.get_submodule(path) for path in paths]
            if role.startswith(("attn.", "cross.", "mlp.", "resnet.time", "modulation")):
                assert all(isinstance(m, nn.Linear) for m in modules), role
            if role in ("resnet.conv", "resnet.shortcut", "downsample", "upsample"):
                assert all(isinstance(m, nn.Conv2d) for m in modules), role
            if role.startswith("norm."):
                assert all(p.dim() == 1 for m in modules for p in m.parameters()), role


def test_the_blocks_of_a_unet_come_in_the_order_in_which_they_run() -> None:
    found = anatomy.of(models("UNet2DConditionModel")[0])
    assert found.blocks == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert found.role("unet.up") == ["up_blocks.0", "up_blocks.1"]
    assert found.resolve("all-linear")
    assert "conv_out" not in found.resolve("all-linear")
