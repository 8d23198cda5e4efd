"""Every data file against tiny models of every architecture it speaks for."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from pegbox import anatomy
from pegbox.anatomy import tables
from pegbox.anatomy.paths import matches, within
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
def test_every_pattern_matches_a_module_or_a_parameter(model_type: str) -> None:
    models = tinies(model_type)
    paths = {
        path for model in models for named in (model.named_modules(), model.named_parameters()) for path, _ in named
    }
    patterns = [pattern for role in TABLES[model_type].roles.values() for pattern in role]
    assert [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in paths)] == []


@pytest.mark.parametrize("model_type", TABLES)
def test_every_weight_in_a_block_has_one_role(model_type: str) -> None:
    for model in tinies(model_type):
        found = anatomy.of(model)
        roles = [path for role, paths in found.roles().items() if not role.endswith(".block") for path in paths]
        held = [p for p, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        counts = {path: roles.count(path) for path in held if found.depth(path) is not None}
        assert {path: count for path, count in counts.items() if count != 1 and not path.endswith(BIASES_ONLY)} == {}


BIASES_ONLY = "attention.self"  # DeBERTa's keeps the biases of q and v, and no matrix


@pytest.mark.parametrize("model_type", TABLES)
def test_projections_are_matrices_and_norms_are_not(model_type: str) -> None:
    for model in tinies(model_type):
        for role, paths in anatomy.of(model).roles().items():
            modules = [model.get_submodule(path) for path in paths]
            if role.startswith(("attn.", "cross.", "mlp.")) and role not in ("mlp.router", "mlp.experts"):
                assert all(isinstance(m, (nn.Linear, Conv1D)) for m in modules), role
            if role.startswith("norm."):
                assert all(p.dim() == 1 for m in modules for p in m.parameters()), role


@pytest.mark.parametrize("model_type", TABLES)
def test_widths_agree_with_the_roles(model_type: str) -> None:
    for model in tinies(model_type):
        found = anatomy.of(model).found
        if "mlp.gate_up" in found:
            for both, down in zip(found["mlp.gate_up"], found["mlp.down"], strict=True):
                (inner, hidden), (out, inner_) = _shape(model.get_submodule(both)), _shape(model.get_submodule(down))
                assert (inner, hidden) == (2 * inner_, out)
            continue
        for up, down in zip(found.get("mlp.up", ()), found.get("mlp.down", ()), strict=True):
            (inner, hidden), (out, inner_) = _shape(model.get_submodule(up)), _shape(model.get_submodule(down))
            assert (inner, hidden) == (inner_, out)


@pytest.mark.parametrize("model_type", TABLES)
def test_head_is_what_the_model_calls_its_output(model_type: str) -> None:
    for model in tinies(model_type):
        output = model.get_output_embeddings()
        if output is not None:
            path = next(path for path, module in model.named_modules() if module is output)
            assert within(path, anatomy.of(model).role("head"))  # the new DeBERTa heads name a layer inside theirs


@pytest.mark.parametrize("model_type", TABLES)
def test_embed_runs_where_the_input_embedding_is_kept(model_type: str) -> None:
    for model in tinies(model_type):
        embeds = [model.get_submodule(path) for path in anatomy.of(model).role("embed")]
        kept = next(_input_embeddings(model).parameters())
        assert any(next(embed.parameters()) is kept for embed in embeds)


def _input_embeddings(model: nn.Module) -> nn.Module:
    """A model of two towers may name none of its own; then a tower's counts."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        found = anatomy.of(model).found
        return model.get_submodule((found.get("text") or found["vision"])[0]).get_input_embeddings()


def _shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in)"""
    return tuple(reversed(module.weight.shape)) if isinstance(module, Conv1D) else tuple(module.weight.shape)
