"""What has a role is what the model runs: a graft around a module that is never called would train for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pegbox import anatomy

from .batches import inputs
from .tiny import TINY, tiny

MODELS = [(kind, name, settings) for kind, (_, models) in TINY.items() for name, settings in models]

# By class, modules that only feed a pooled vector, which this class does not use.
NOT_USED = {"LlavaForConditionalGeneration": {"model.vision_tower.post_layernorm"}}


@pytest.mark.parametrize(("kind", "name", "settings"), MODELS, ids=[f"{n}{list(s.values())}" for _, n, s in MODELS])
def test_every_module_with_a_role_is_called(kind: str, name: str, settings: dict[str, object]) -> None:
    model = tiny(kind, name, **settings)
    paths = {path for paths in anatomy.of(model).found.values() for path in paths}
    called = set()
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: called.add(path))
        for path in paths
    ]
    try:
        with torch.no_grad():
            model(**inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    assert paths - called - NOT_USED.get(name, set()) == set()


@pytest.mark.parametrize("kind", TINY)
def test_every_linear_outside_the_heads_has_a_role(kind: str) -> None:
    for name, settings in TINY[kind][1]:
        model = tiny(kind, name, **settings)
        found = anatomy.of(model)
        whole = {"vision", "text", "block", "vision.block", "text.block", "encoder.block", "decoder.block"}
        named = {path for role, paths in found.found.items() if role not in whole for path in paths}
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        without = [p for p in linears if not any(p == n or p.startswith(f"{n}.") for n in named)]
        assert [p for p in without if not p.startswith(BEFORE_THE_HEAD)] == [], name


# Layers of a masked-language head before the one that gives the logits: trained with the base, so all-linear has them.
BEFORE_THE_HEAD = ("cls.predictions.transform", "lm_head.dense", "vocab_transform")
