"""Every data file against tiny models of every architecture it speaks for."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from pegbox import anatomy
from pegbox.anatomy import tables
from pegbox.anatomy.paths import matches
from pegbox.anatomy.roles import ROLES

from .tiny import TINY, tinies

TABLES = tables.by_model_type()


def test_every_model_type_has_a_tiny_model() -> None:
    assert set(TABLES) == set(TINY)


@pytest.mark.parametrize("model_type", TABLES)
def test_roles_are_of_the_vocabulary(model_type: str) -> None:
    assert set(TABLES[model_type].roles) <= set(ROLES)


def test_generic_roles_are_of_the_vocabulary() -> None:
    assert {role for section in tables.generic().values() for role in section} <= set(ROLES)


@pytest.mark.parametrize("model_type", TABLES)
def test_every_pattern_matches_a_module(model_type: str) -> None:
    paths = {path for model in tinies(model_type) for path, _ in model.named_modules()}
    patterns = [pattern for role in TABLES[model_type].roles.values() for pattern in role]
    assert [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in paths)] == []


@pytest.mark.parametrize("model_type", TABLES)
def test_every_weight_in_a_block_has_one_role(model_type: str) -> None:
    for model in tinies(model_type):
        found = anatomy.of(model)
        roles = [path for role, paths in found.roles().items() if not role.endswith("coder.block") for path in paths]
        held = [p for p, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        assert {
            path: roles.count(path) for path in held if found.depth(path) is not None and roles.count(path) != 1
        } == {}


@pytest.mark.parametrize("model_type", TABLES)
def test_projections_are_matrices_and_norms_are_not(model_type: str) -> None:
    for model in tinies(model_type):
        for role, paths in anatomy.of(model).roles().items():
            modules = [model.get_submodule(path) for path in paths]
            if role.startswith(("attn.", "cross.", "mlp.")):
                assert all(isinstance(m, (nn.Linear, Conv1D)) for m in modules), role
            if role.startswith("norm."):
                assert all(p.dim() == 1 for m in modules for p in m.parameters()), role


@pytest.mark.parametrize("model_type", TABLES)
def test_widths_agree_with_the_roles(model_type: str) -> None:
    for model in tinies(model_type):
        found = anatomy.of(model)
        for up, down in zip(found.role("mlp.up"), found.role("mlp.down"), strict=True):
            (inner, hidden), (out, inner_) = _shape(model.get_submodule(up)), _shape(model.get_submodule(down))
            assert (inner, hidden) == (inner_, out)


@pytest.mark.parametrize("model_type", TABLES)
def test_head_is_what_the_model_calls_its_output(model_type: str) -> None:
    for model in tinies(model_type):
        output = model.get_output_embeddings()
        if output is not None:
            assert anatomy.of(model).head == next(path for path, module in model.named_modules() if module is output)


@pytest.mark.parametrize("model_type", TABLES)
def test_embed_runs_where_the_input_embedding_is_kept(model_type: str) -> None:
    for model in tinies(model_type):
        embed = model.get_submodule(anatomy.of(model).embed)
        kept = model.get_input_embeddings()
        assert next(embed.parameters()) is next(kept.parameters())


def _shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in)"""
    return tuple(reversed(module.weight.shape)) if isinstance(module, Conv1D) else tuple(module.weight.shape)
