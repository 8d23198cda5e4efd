"""MTLoRA: a block by hand, streams that know nothing of each other, what trains, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import window_partition, window_reverse

import pegbox
from pegbox.checks.lab import shake
from pegbox.core.dense_heads import DenseHeads
from pegbox.core.errors import CannotMerge, CannotMix, MethodError, SettingsError, TargetError
from pegbox.core.streams import Streams
from pegbox.core.tuned import Tuned
from pegbox.methods.mtlora import SplitGraft, Update, features
from pegbox.objectives.metrics import delta_m

from .tiny import family

TASKS = ("semseg", "depth")
LAST = "encoder.layers.0.blocks.1"  # the last block of the first stage; its windows are shifted
REDUCTION = "encoder.layers.0.downsample.reduction"
CONFIG: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
PLAIN = {"norms": False, "embeddings": False, "downsample": "lora"}  # nothing trains but factors


def swin(kind: Any = SwinModel, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(SwinConfig(**CONFIG, **more)).eval()


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def tuned_swin(shaken: bool = True, **settings: Any) -> Tuned:
    tuned = pegbox.tune(swin(), "mtlora", **{"tasks": TASKS, "rank": 4, "task_rank": 2, **settings})
    return shake(tuned, 1, 0.1) if shaken else tuned


def graft_at(tuned: Tuned, path: str) -> Any:
    return tuned.sites[path].grafts["default"]


def product(update: Update, x: Tensor) -> Tensor:
    return update.scale * x @ update.a.T @ update.b.T


# -- what it computes ------------------------------------------------------------------------------------------------


def split_by_hand(graft: SplitGraft, layer: nn.Linear, xs: list[Tensor], mode: str) -> list[Tensor]:
    """Shared output and each task's, of shared input and each task's."""
    w = F.linear(xs[0], layer.weight, layer.bias)
    own = [w + product(graft.tasks[task], x) for task, x in zip(TASKS, xs[1:], strict=True)]
    if mode == "addition":
        return [w + F.layer_norm(sum(own), w.shape[-1:], graft.norm.weight, graft.norm.bias), *own]
    change = product(graft.shared, xs[0])
    return [w + change, *(y + change if mode == "matrixv2" else y for y in own)]


def block_by_hand(tuned: Tuned, x: Tensor, mode: str) -> list[Tensor]:
    """Streams (B, 64, 16) that leave `LAST`, for what enters it."""
    block = tuned.model.get_submodule(LAST)
    attention, rows, width, window = block.attention, len(x), x.shape[-1], block.window_size
    h = block.layernorm_before(x).view(rows, 8, 8, width)
    h = window_partition(block.cyclic_shift(h), window).view(-1, window**2, width)

    def head(name: str) -> Tensor:
        layer = attention.get_submodule(name)
        y = F.linear(h, layer.weight, layer.bias) + product(graft_at(tuned, f"{LAST}.attention.{name}"), h)
        return y.unflatten(-1, (2, -1)).transpose(1, 2)

    q, k, v = (head(name) for name in ("q_proj", "k_proj", "v_proj"))
    mask = block.get_attn_mask(8, 8, x.dtype, x.device).repeat(rows, 1, 1)[:, None]
    scores = q @ k.transpose(2, 3) * attention.head_dim**-0.5 + attention.relative_position_bias() + mask
    a = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    out = split_by_hand(graft_at(tuned, f"{LAST}.attention.o_proj"), attention.o_proj, [a] * 3, mode)
    maps = [window_reverse(y.view(-1, window, window, width), window, 8, 8) for y in out]
    xs = [x + block.cyclic_shift(m, reverse=True).view(rows, 64, width) for m in maps]
    inner = [block.layernorm_after(y) for y in xs]
    inner = split_by_hand(graft_at(tuned, f"{LAST}.mlp.fc1"), block.mlp.fc1, inner, mode)
    inner = split_by_hand(graft_at(tuned, f"{LAST}.mlp.fc2"), block.mlp.fc2, [F.gelu(y) for y in inner], mode)
    return [x + y for x, y in zip(xs, inner, strict=True)]


def downsampled_by_hand(tuned: Tuned, x: Tensor) -> Tensor:
    """(B, 64, 16) -> (B, 32, 4, 4)."""
    merging = tuned.model.get_submodule("encoder.layers.0.downsample")
    grid = x.view(len(x), 8, 8, -1)
    corners = [grid[:, row::2, column::2] for column in range(2) for row in range(2)]
    h = merging.norm(torch.cat(corners, -1))
    return (F.linear(h, merging.reduction.weight) + product(graft_at(tuned, REDUCTION), h)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_a_stage_by_hand(mode: str) -> None:
    tuned = tuned_swin(mode=mode, **PLAIN)
    seen: dict[str, Tensor] = {}
    block = tuned.model.get_submodule(LAST)
    block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    block.register_forward_hook(lambda _, args, out: seen.update(y=out[0]))
    have = features(tuned, images())
    shared, *own = block_by_hand(tuned, seen["x"], mode)
    assert torch.allclose(seen["y"], shared, atol=1e-4)
    for task, stream in zip(TASKS, own, strict=True):
        assert torch.allclose(have[task][0], downsampled_by_hand(tuned, stream), atol=1e-4)
    assert not torch.allclose(have["semseg"][0], have["depth"][0], atol=1e-2)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
@pytest.mark.parametrize("downsample", ["whole", "lora", "none"])
def test_starts_from_the_base(mode: str, downsample: str) -> None:
    base, x = swin(), images()
    want = base(x, output_hidden_states=True)
    tuned = tuned_swin(False, mode=mode, downsample=downsample)
    have = tuned(x)
    assert torch.equal(have.last_hidden_state, want.last_hidden_state)
    for stages in features(tuned).values():
        for stream, stage in zip(stages, want.reshaped_hidden_states[1:], strict=True):
            assert torch.allclose(stream, stage, atol=1e-6)


def test_addition_does_not_start_from_the_base() -> None:
    tuned = tuned_swin(False, mode="addition")
    assert not tuned.method.traits.identity
    assert not torch.allclose(tuned(images()).last_hidden_state, swin()(images()).last_hidden_state, atol=1e-2)


def test_without_tasks_it_is_lora_with_a_plain_scale() -> None:
    tuned = tuned_swin(tasks=(), scale=4.0)
    lora = pegbox.tune(swin(), "lora", rank=4, alpha=16.0)
    lora.load_state(tuned.state())
    x = images()
    want = lora(x).last_hidden_state
    assert torch.allclose(tuned(x).last_hidden_state, want, atol=1e-5)
    assert torch.allclose(tuned.merge()(x).last_hidden_state, want, atol=1e-4)


def test_the_next_stage_goes_on_from_the_shared_stream() -> None:
    """Task factors change no answer of the model, and no other stage's streams."""
    tuned, x = tuned_swin(), images()
    out, before = tuned(x).last_hidden_state, features(tuned)
    with torch.no_grad():
        graft_at(tuned, f"{LAST}.mlp.fc1").tasks["depth"].b.add_(1.0)
    assert torch.equal(tuned(x).last_hidden_state, out)
    after = features(tuned)
    assert not torch.allclose(after["depth"][0], before["depth"][0], atol=1e-2)
    assert torch.equal(after["depth"][1], before["depth"][1])
    assert torch.equal(after["semseg"][0], before["semseg"][0])


def test_attention_runs_once() -> None:
    tuned = tuned_swin()
    rows = []
    tuned.model.get_submodule(f"{LAST}.attention.q_proj").register_forward_hook(lambda m, a, y: rows.append(len(a[0])))
    tuned(images())
    assert rows == [2 * 4]  # rows of the batch, windows


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_removing_a_task_leaves_the_others(mode: str) -> None:
    both, one = tuned_swin(mode=mode), tuned_swin(mode=mode, tasks=("depth",))
    one.load_state({key: value for key, value in both.state().items() if ".tasks.semseg." not in key})
    x = images()
    for have, want in zip(features(one, x)["depth"], features(both, x)["depth"], strict=True):
        assert torch.allclose(have, want, atol=1e-6)


def split(tuned: Tuned, x: Tensor) -> list[Tensor]:
    """The shared and the tasks' outputs of one linear layer where streams part."""
    graft_at(tuned, f"{LAST}.mlp.fc1").flow.apart = False
    return list(tuned.model.get_submodule(f"{LAST}.mlp.fc1")(x.repeat(3, 1)).chunk(3))


def test_dropout_is_drawn_once_where_streams_part() -> None:
    tuned = tuned_swin(dropout=0.5, task_rank=4)
    graft = graft_at(tuned, f"{LAST}.mlp.fc1")
    with torch.no_grad():
        for task in graft.tasks.values():
            task.a.copy_(graft.shared.a)
            task.b.copy_(graft.shared.b)
    tuned.train()
    x = torch.randn(5, 16)
    shared, *own = split(tuned, x)
    assert torch.allclose(own[0], shared, atol=1e-6)
    assert torch.allclose(own[1], shared, atol=1e-6)
    tuned.eval()
    assert not torch.allclose(split(tuned, x)[0], shared, atol=1e-3)


# -- gradients -------------------------------------------------------------------------------------------------------


def zero(p: nn.Parameter) -> bool:
    return p.grad is None or not p.grad.any()


def test_tasks_have_gradients_of_their_own() -> None:
    tuned = tuned_swin()
    sum(stage.square().sum() for stage in features(tuned, images())["semseg"]).backward()
    own = tuned.adapter().own()
    assert all(zero(p) for key, p in own.items() if ".tasks.depth." in key)
    assert not any(zero(p) for key, p in own.items() if ".tasks.semseg." in key)


@pytest.mark.parametrize(("mode", "direct"), [("matrix", False), ("matrixv2", True)])
def test_shared_factors_learn_from_tasks_in_matrixv2_alone(mode: str, direct: bool) -> None:
    tuned = tuned_swin(mode=mode)
    _, *own = split(tuned, torch.randn(5, 16))
    sum(y.square().sum() for y in own).backward()
    graft = graft_at(tuned, f"{LAST}.mlp.fc1")
    assert zero(graft.shared.a) is not direct
    assert zero(graft.shared.b) is not direct
    assert not zero(graft.tasks["semseg"].a)


def test_shared_factors_of_a_stage_learn_from_later_tasks() -> None:
    tuned = tuned_swin()
    features(tuned, images())["semseg"][1].square().sum().backward()
    assert not zero(graft_at(tuned, f"{LAST}.mlp.fc2").shared.a)
    assert zero(graft_at(tuned, f"{LAST}.mlp.fc2").tasks["semseg"].a)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its new name is newer than 5.0
def test_checkpointing_keeps_the_gradients_of_tasks() -> None:
    grads = []
    for again in (False, True):
        tuned = tuned_swin().train()
        if again:
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        features(tuned, images())["depth"][0].square().sum().backward()
        grads.append(graft_at(tuned, f"{LAST}.attention.o_proj").tasks["depth"].b.grad)
    assert torch.allclose(*grads, atol=1e-5)


# -- what trains -----------------------------------------------------------------------------------------------------


def test_the_formula_of_its_parameters() -> None:
    tuned = tuned_swin(False, **PLAIN)
    count = 0
    for width in (16, 32):
        attention, mlp = 2 * width, width + 4 * width
        count += 2 * 4 * (4 * attention + 2 * mlp)  # blocks r (i + o)
        count += len(TASKS) * 2 * (attention + 2 * mlp)  # |T| r_t (i + o), in the last block
    count += 4 * (64 + 32)  # the reduction
    assert tuned.count()[0] == count
    assert count == sum(tuned.method.size(site) for site in tuned.sites.values())


@pytest.mark.parametrize("mode", ["matrix", "addition"])
def test_what_trains_beside_the_factors(mode: str) -> None:
    tuned = tuned_swin(False, mode=mode)
    base = tuned.model
    whole = {key.rpartition(".d.")[0].removeprefix("graft.") for key in tuned.trainable() if ".d." in key}
    norms = {path for path, m in base.named_modules() if isinstance(m, nn.LayerNorm)}
    tables = {path for path, _ in base.named_modules() if path.endswith(".relative_position_bias")}
    assert len(tables) == 4
    assert whole == norms | tables | {"embeddings.patch_embeddings.projection", REDUCTION}
    rest = {key.rpartition(".")[2] for key in tuned.trainable() if ".d." not in key and ".norm." not in key}
    assert rest == {"a", "b"}
    assert tuned.count()[0] == sum(tuned.method.size(site) for site in tuned.sites.values())
    assert not any(p.requires_grad for p in base.parameters())


def test_what_trains_whole_is_used() -> None:
    tuned, x = tuned_swin(False), images()
    before = features(tuned, x)["depth"][0]
    for path in ("embeddings.patch_embeddings.projection", REDUCTION, f"{LAST}.attention.relative_position_bias"):
        graft = graft_at(tuned, path)
        kept = {name: p.detach().clone() for name, p in graft.d.items()}
        with torch.no_grad():
            for p in graft.d.values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.allclose(features(tuned, x)["depth"][0], before, atol=1e-3)
        graft.load_state_dict({f"d.{name}": value for name, value in kept.items()})
    assert torch.equal(features(tuned, x)["depth"][0], before)


def test_ranks_of_each_stage() -> None:
    tuned = tuned_swin(False, rank=(2, 4), task_rank=(1, 3), downsample="lora")
    assert graft_at(tuned, f"{LAST}.mlp.fc1").shared.a.shape == (2, 16)
    assert graft_at(tuned, REDUCTION).a.shape == (2, 64)
    last = graft_at(tuned, "encoder.layers.1.blocks.1.mlp.fc1")
    assert (last.shared.a.shape, last.tasks["depth"].a.shape) == ((4, 32), (3, 32))
    with pytest.raises(SettingsError, match="lists 3 stages, and this model has 2"):
        tuned_swin(rank=(2, 4, 4))


def test_task_factors_in_all_blocks() -> None:
    tuned = tuned_swin(mode="addition", intermediate=True)
    first = graft_at(tuned, "encoder.layers.0.blocks.0.mlp.fc2")
    assert isinstance(first, SplitGraft)
    features(tuned, images())["depth"][0].square().sum().backward()
    assert not zero(first.tasks["semseg"].b)  # by way of the shared stream
    with pytest.raises(SettingsError, match="nothing reads those factors"):
        tuned_swin(intermediate=True)


@pytest.mark.parametrize("downsample", ["whole", "lora"])
def test_saved_and_loaded(tmp_path: Path, downsample: str) -> None:
    tuned, x = tuned_swin(downsample=downsample), images()
    tuned.save(tmp_path)
    again = pegbox.load(swin(), tmp_path)
    assert torch.equal(again(x).last_hidden_state, tuned(x).last_hidden_state)
    have, want = features(again), features(tuned)
    assert all(torch.equal(a, b) for task in TASKS for a, b in zip(have[task], want[task], strict=True))


# -- other models ----------------------------------------------------------------------------------------------------


def test_a_backbone_of_feature_maps() -> None:
    tuned = pegbox.tune(swin(SwinBackbone, out_features=["stage1", "stage2"]), "mtlora", tasks=TASKS, rank=4)
    shake(tuned)
    assert [y.shape for y in tuned(images()).feature_maps] == [(2, 16, 8, 8), (2, 32, 4, 4)]
    assert [y.shape for y in features(tuned)["semseg"]] == [(2, 32, 4, 4), (2, 32, 4, 4)]


def test_an_image_size_of_odd_grids() -> None:
    stages = features(tuned_swin(), torch.randn(1, 3, 36, 28))["depth"]
    assert [y.shape for y in stages] == [(1, 32, 5, 4), (1, 32, 5, 4)]


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_one_stage(name: str) -> None:
    """A model whose blocks lie in one list has streams in its last block."""
    model = family(name)
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)} if name == "vit" else {"input_ids": torch.randint(1, 60, (2, 7))}
    tuned = pegbox.tune(model, "mtlora", tasks=TASKS, rank=4, task_rank=2)
    assert sum(isinstance(graft_at(tuned, path), SplitGraft) for path in tuned.sites) == (3 if name == "vit" else 4)
    with tuned.disabled():
        want = tuned(**batch, output_hidden_states=True)
    assert torch.equal(tuned(**batch).logits, want.logits)
    (stream,) = features(tuned)["depth"]
    assert stream.shape == want.hidden_states[-1].shape
    shake(tuned)
    assert not torch.allclose(*(features(tuned, **batch)[task][0] for task in TASKS), atol=1e-2)


def test_half_precision() -> None:
    tuned = pegbox.tune(swin().to(torch.bfloat16), "mtlora", tasks=TASKS, rank=4)
    shake(tuned)
    stage = features(tuned, images().bfloat16())["depth"][0]
    assert stage.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in tuned.trainable().values())


# -- heads and scores ------------------------------------------------------------------------------------------------


def test_dense_heads() -> None:
    tuned = tuned_swin()
    stages = features(tuned, images())
    heads = DenseHeads([y.shape[1] for y in stages["semseg"]], {"semseg": 5, "depth": 1})
    out = heads(stages, (32, 32))
    assert {task: y.shape for task, y in out.items()} == {"semseg": (2, 5, 32, 32), "depth": (2, 1, 32, 32)}
    out["depth"].square().mean().backward()
    assert not zero(graft_at(tuned, f"{LAST}.mlp.fc2").tasks["depth"].a)
    assert zero(graft_at(tuned, f"{LAST}.mlp.fc2").tasks["semseg"].a)


def test_delta_m() -> None:
    single = {"semseg": 0.5, "depth": 2.0}
    assert delta_m(single, single, lower=("depth",)) == 0
    assert delta_m({"semseg": 0.6, "depth": 1.8}, single, lower=("depth",)) == pytest.approx((20 + 10) / 2)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_tasks_do_not_merge() -> None:
    with pytest.raises(CannotMerge, match="acts on activations"):
        tuned_swin().merge()


def test_targets_must_part_the_streams() -> None:
    with pytest.raises(TargetError, match=r"nothing in encoder.layers.0.blocks.1 where tasks can part"):
        tuned_swin(targets=("attn.q", "attn.v"))


def test_a_block_needs_one_attention() -> None:
    with pytest.raises(TargetError, match="need blocks with one attn in each"):
        pegbox.tune(family("t5"), "mtlora", tasks=TASKS)


@pytest.mark.parametrize("tasks", [("a", "a"), ("a.b",), ("",)])
def test_names_of_tasks(tasks: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="tasks must be distinct names"):
        tuned_swin(tasks=tasks)


def test_an_attention_that_does_more_than_project() -> None:
    tuned = tuned_swin()
    tuned.add("above", pegbox.method("lora", rank=2)).use(["default", "above"])
    with pytest.raises(MethodError, match="another adapter does, so that tasks have no streams after it"):
        tuned(images())
    tuned.add("again", pegbox.method("mtlora", tasks=TASKS, rank=2)).use(["default", "again"])
    with pytest.raises(CannotMix, match="two adapters part streams"):
        tuned(images())


def test_features_are_there_after_a_forward_of_tasks() -> None:
    tuned = tuned_swin()
    assert isinstance(tuned.adapter().shared, Streams)
    features(tuned, images())
    with pytest.raises(MethodError, match="no forward with the adapter of tasks has run"):
        features(tuned)
    with pytest.raises(MethodError, match="no adapter in use has tasks"):
        features(tuned_swin(tasks=()), images())
    with torch.no_grad():
        tuned.train()(images())
    with pytest.raises(MethodError, match="use_reentrant"):
        features(tuned)
