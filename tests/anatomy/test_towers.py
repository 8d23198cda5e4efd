"""Models of two towers: each tower's roles are those of its own type, and targets can keep to one tower."""

from __future__ import annotations

import pytest
from torch import nn

import pegbox
from pegbox import anatomy, methods
from pegbox.anatomy.discover import discover
from pegbox.checks import Case
from pegbox.checks.lab import shake
from pegbox.core.errors import TargetError

from .batches import inputs, number
from .tiny import DECODER, LLAVA, tiny

PAIRS = [("clip", "CLIPModel"), ("siglip", "SiglipModel"), ("llava", "LlavaForConditionalGeneration")]
PAIRS += [("gemma3", "Gemma3ForConditionalGeneration")]


@pytest.fixture(params=PAIRS, ids=[name for _, name in PAIRS])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny(*request.param)


def test_blocks_are_those_of_the_towers_in_model_order(model: nn.Module) -> None:
    found = anatomy.of(model)
    order = [path for path, _ in model.named_modules()]
    assert sorted(found.role("vision.block") + found.role("text.block"), key=order.index) == found.blocks
    assert [len(found.role(role)) for role in ("vision", "vision.block", "text", "text.block")] == [1, 2, 1, 2]
    assert [found.depth(path) for path in found.blocks] == [0, 1, 2, 3]


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_has_the_roles_of_its_own_type(model: nn.Module, tower: str) -> None:
    found = anatomy.of(model)
    (path,) = found.role(tower)
    for role, paths in anatomy.of(model.get_submodule(path)).roles().items():
        assert {f"{path}.{p}" for p in paths} <= set(found.role(role)), role


@pytest.mark.parametrize(("tower", "other"), [("vision", "text"), ("text", "vision")])
def test_targets_can_keep_to_one_tower(model: nn.Module, tower: str, other: str) -> None:
    found = anatomy.of(model)
    (path,) = found.role(tower)
    whole = found.resolve(tower)
    assert whole
    assert all(p.startswith(f"{path}.") for p in whole)
    queries = found.resolve("attn.q", exclude=other)
    assert queries == [f"{path}.{p}" for p in anatomy.of(model.get_submodule(path)).role("attn.q")]
    between = found.found.get("projector", ())
    linears = found.resolve("all-linear", exclude=other)
    assert [p for p in linears if not p.startswith(between)] == [p for p in whole if not p.startswith(between)]


def test_a_tower_is_tuned_alone() -> None:
    model = tiny("clip", "CLIPModel")
    tuned = pegbox.tune(model, "lora", rank=2, targets=("attn.q", "attn.v"), exclude="text")
    try:
        assert set(tuned.sites) == {f"vision_model.encoder.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"}
    finally:
        tuned.detach()
    tuned = pegbox.tune(model, "full", targets="text")
    try:
        assert {key.split(".")[1] for key in tuned.trainable()} == {"text_model"}
    finally:
        tuned.detach()


def test_embeddings_heads_and_projectors_of_a_vision_language_model() -> None:
    found = anatomy.of(tiny("llava", "LlavaForConditionalGeneration"))
    assert found.role("embed") == [
        "model.vision_tower.embeddings.patch_embedding",
        "model.language_model.embed_tokens",
    ]
    assert (found.source, found.head) == ("vlm.toml", "lm_head")
    assert found.role("projector") == ["model.multi_modal_projector"]
    assert found.role("norm.mlp")[-1] == "model.language_model.layers.1.post_attention_layernorm"


@pytest.mark.parametrize("language_model", ["mistral", "qwen2", "gemma2"])
def test_any_language_model_may_follow_the_vision_tower(language_model: str) -> None:
    model = tiny("llava", "LlavaForConditionalGeneration", text_config={"model_type": language_model, **DECODER})
    found = anatomy.of(model)
    assert len(found.role("text.block")) == 2
    assert found.role("attn.out")[-1] == "model.language_model.layers.1.self_attn.o_proj"


def llava(taken: int | list[int], **vision: object) -> nn.Module:
    """Takes the vision tower's states after some of its three blocks, by their place among four."""
    sizes = {**LLAVA["vision_config"], "num_hidden_layers": 3, **vision}
    return tiny("llava", "LlavaForConditionalGeneration", vision_config=sizes, vision_feature_layer=taken)


@pytest.mark.parametrize(
    ("taken", "read"), [(-1, 3), (-2, 2), (1, 1), ([-2, 0], 2), ([1, -1], 3)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("vision", [{}, {"model_type": "dinov2"}], ids=["known", "discovered"])
def test_blocks_of_a_tower_that_are_not_read_have_no_role(
    taken: int | list[int], read: int, vision: dict[str, str]
) -> None:
    found = anatomy.of(llava(taken, **vision))
    every = [path for path, _ in found.model.named_modules() if path.startswith("model.vision_tower.")]
    never = {path for path in every if path.endswith(tuple(f"layers.{n}" for n in range(read, 3)))}
    never |= {path for path in every if path.endswith(tuple(f"layer.{n}" for n in range(read, 3)))}
    assert len(never) == 3 - read
    assert len(found.role("vision.block")) == read
    chosen = [path for role in found.roles() for path in found.role(role)] + found.resolve("all-linear")
    assert [path for path in chosen if any(f"{path}.".startswith(f"{n}.") for n in never)] == []


@pytest.mark.parametrize("name", methods.names())
def test_nothing_trains_where_nothing_is_read(name: str) -> None:
    model = llava(-2)
    try:
        tuned = pegbox.tune(model, Case(name).built())
    except TargetError:
        return
    try:
        number(shake(tuned)(**inputs(model))).backward()
        assert [key for key, p in tuned.trainable().items() if p.grad is None] == []
    finally:
        tuned.detach()
        model.zero_grad()


def test_what_is_not_read_is_named_by_its_path_alone() -> None:
    found, late = anatomy.of(llava(-2)), "model.vision_tower.encoder.layers.2.mlp.fc1"
    assert found.resolve(late) == [late]
    assert late not in found.resolve("fc1")
    for item in ("layers.2.mlp.fc1", r".*layers\.2\.mlp\.fc1"):
        with pytest.raises(TargetError, match="nothing in this model depends"):
            found.resolve(item)
        assert found.resolve("mlp.up", exclude=item) == found.resolve("mlp.up")
    tuned = pegbox.tune(llava(-2), "full", targets=late)
    assert set(tuned.trainable()) == {f"base.{late}.weight", f"base.{late}.bias"}
    tuned.detach()
    with pytest.raises(TargetError, match=r"up to model\.vision_tower\.encoder\.layers\.1"):
        pegbox.tune(llava(-2), "ladder", targets="vision.block", reduction=4, heads=2)


def test_a_tower_of_an_unknown_type_is_discovered() -> None:
    vision = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    found = anatomy.of(tiny("llava", "LlavaForConditionalGeneration", vision_config=vision))
    assert len(found.role("vision.block")) == 2
    assert found.role("attn.q")[0].startswith("model.vision_tower.")
    assert found.head == "lm_head"


def test_the_towers_of_a_wrapped_model_are_discovered() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llava", "LlavaForConditionalGeneration")

    known, guessed = anatomy.of(Wrapped().inner), discover(Wrapped())
    for role in ("vision", "vision.block", "text", "text.block", "projector", "attn.q", "mlp.up"):
        assert list(guessed[role]) == [f"inner.{path}" for path in known.role(role)], role
    assert LLAVA["vision_feature_layer"] == -1
