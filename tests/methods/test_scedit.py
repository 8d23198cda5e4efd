"""SCEdit: what it edits, and only that; its scales, hints and sizes; what of the U-Net's encoder is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import Stack
from pegbox.checks.lab import shake
from pegbox.checks.models import FAMILIES, inputs
from pegbox.core import Skips
from pegbox.core.errors import MethodError, ModelError, SettingsError, TargetError
from pegbox.methods.lora import LoRA
from pegbox.methods.scedit import SCEdit

from .tiny import family

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'pegbox[diffusion]'")

BOTH: dict[str, Any] = {"hints": ("edges",), "hint_width": 6, "hint_ratio": 0.25, "hint_halvings": 0}
TWO: dict[str, Any] = BOTH | {"hints": ("edges", "depth")}
ROWS = 4


def batch() -> dict[str, Tensor]:
    return inputs(FAMILIES["unet"].batch(0))


def hint(seed: int = 0, size: int = 8, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(50 + seed))


def unconditional() -> Any:
    """A UNet2DModel of three sizes: its up blocks are called with positions, not names."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def output(model: Any, **given: Any) -> Tensor:
    return model(**(batch() | given)).sample.detach()


def tuned_with(model: Any = None, size: float = 0.1, **settings: Any) -> Any:
    return shake(pegbox.tune(model or family("unet"), "scedit", **settings), size=size).eval()


@contextmanager
def seen_by(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the up blocks' layers are called with, by path."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0].detach()}))
        for path, module in model.named_modules()
        if path.startswith("up_blocks") and path.split(".")[-2:-1] == ["resnets"]
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# -- start and scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, BOTH | {"tuner": False}, BOTH, TWO])
def test_the_start_is_the_base(settings: dict[str, Any]) -> None:
    want = output(family("unet"))
    tuned = pegbox.tune(family("unet"), "scedit", **settings).eval()
    hints = {name: hint(i) for i, name in enumerate(settings.get("hints", ()))}
    with tuned.given(hint=hints):
        assert torch.equal(output(tuned), want)


def test_scales_of_zero_are_the_base_after_training() -> None:
    want, tuned = output(family("unet")), tuned_with(**BOTH)
    with tuned.given(hint=hint()):
        both = output(tuned)
        with tuned.given(tuner_scale=0.0):
            control = output(tuned)
        with tuned.given(tuner_scale=0.0, control_scale=0.0):
            assert torch.equal(output(tuned), want)
    with tuned.given(control_scale=0.0):
        tuner = output(tuned)
    outputs = [want, both, control, tuner]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])


def test_scales_are_settings_too() -> None:
    tuned = tuned_with(**BOTH)
    other = tuned_with(**BOTH, tuner_scale=0.3, control_scale=0.7)
    with tuned.given(hint=hint(), tuner_scale=0.3, control_scale=0.7), other.given(hint=hint()):
        assert torch.equal(output(tuned), output(other))


def test_the_equation() -> None:
    """x' = x + tau T(x) + kappa s (c + T'(x + c)), seen at the decoder's layers."""
    tuned, base = tuned_with(**BOTH), family("unet")
    with seen_by(base) as plain:
        output(base)
    with (
        seen_by(tuned.model) as edited,
        tuned.given(hint=hint(), tuner_scale=0.5, control_scale=0.8, hint_scales={"edges": 2.0}),
    ):
        output(tuned)
        graft = tuned.sites["up_blocks.0"].chain[0]
        encoder = tuned.sites[""].chain[0].encoders["edges"]
        features = encoder(hint())
    first = "up_blocks.0.resnets.0"  # the first layer of the decoder: nothing before it is changed
    channels = graft.skips[0].channels
    x = plain[first][:, -channels:]
    c = features[-1]
    want = x + 0.5 * graft.edits["tuner/0"](x) + 1.6 * (c + graft.edits["hint_edges/0"](x + c))
    assert torch.allclose(edited[first][:, -channels:], want, atol=1e-5)
    assert torch.equal(edited[first][:, :-channels], plain[first][:, :-channels]), (
        "the part that is no skip is left alone"
    )


def test_two_conditions_of_which_one_has_no_weight_are_the_other() -> None:
    tuned = tuned_with(**TWO)
    alone = tuned_with(**BOTH)
    state = tuned.state()
    alone.load_state({k: state[k] for k in alone.state()})
    with alone.given(hint=hint()):
        want = output(alone)
    with tuned.given(hint={"edges": hint(), "depth": hint(1)}, hint_scales={"depth": 0.0}):
        assert torch.equal(output(tuned), want)
    with tuned.given(hint={"edges": hint()}, hint_scales={"depth": 0.0}):
        assert torch.equal(output(tuned), want), "a hint without weight may be missing"
    with tuned.given(hint={"edges": hint(), "depth": hint(1)}):
        assert not torch.allclose(output(tuned), want, atol=1e-4)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("build", [unconditional, lambda: family("unet")])
def test_parameters(build: Any, ratio: float) -> None:
    """sum over skips of 2 rho C^2 + C + rho C, whatever the list of channels."""
    model = build()
    widths = [model.conv_in.out_channels]
    for block in model.down_blocks:
        widths += [layer.out_channels for layer in block.resnets]
        widths += [block.resnets[-1].out_channels] * bool(block.downsamplers)
    tuned = pegbox.tune(model, "scedit", down_ratio=ratio)
    assert [skip.channels for skip in tuned.adapter().shared.of_encoder] == widths
    assert tuned.count()[0] == sum(2 * int(ratio * c) * c + c + int(ratio * c) for c in widths)


@pytest.mark.parametrize(
    "settings", [BOTH, TWO, BOTH | {"use_layers": (0, 2)}, BOTH | {"tuner": False, "hint_halvings": 3}]
)
def test_parameters_with_hints(settings: dict[str, Any]) -> None:
    tuned = pegbox.tune(unconditional(), "scedit", **settings)
    method: Any = tuned.method
    assert tuned.count()[0] == sum(method.size(site) for site in tuned.sites.values())


def test_stable_diffusions_skips() -> None:
    """[1280 x 5, 640 x 3, 320 x 4] in the decoder's order, and 19.68M parameters in all."""
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel()
    skips = Skips(model, pegbox.anatomy.of(model), [f"up_blocks.{i}" for i in range(4)], ())
    assert [skip.channels for skip in skips.edited] == [1280] * 5 + [640] * 3 + [320] * 4
    assert [skip.level for skip in skips.of_encoder] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    total = sum(2 * skip.channels**2 + 2 * skip.channels for skip in skips.edited)
    assert round(total / 1e6, 2) == 19.68


@pytest.mark.parametrize("size", [8, 9, 7, 13])
def test_odd_sizes(size: int) -> None:
    tuned = tuned_with(**BOTH)
    given = {"sample": torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(7))}
    with tuned.given(hint=hint(size=size)):
        out = output(tuned, **given)
    assert out.shape == (ROWS, 3, size, size)
    assert not torch.allclose(out, output(family("unet"), **given), atol=1e-4)


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_a_hint_may_be_larger_than_the_sample(halvings: int) -> None:
    tuned = tuned_with(**BOTH | {"hint_halvings": halvings})
    with seen_by(tuned.model), tuned.given(hint=hint(size=8 * 2**halvings)):
        features = tuned.sites[""].chain[0].encoders["edges"](hint(size=8 * 2**halvings))
        output(tuned)
    assert [f.shape[-1] for f in features] == [8, 8, 4, 4], "the sizes of the skips, so that nothing is resized"


# -- which skips -------------------------------------------------------------------------------------------------------


def _all(tuned: Any) -> list[Any]:
    return list(Skips(tuned.model, tuned.anatomy, tuned.anatomy.role("unet.up"), ()).edited)


@pytest.mark.parametrize("place", range(4))
def test_one_layer_is_one_skip(place: int) -> None:
    """Of the layers of the decoder, the first whose input changes is the one named."""
    base = family("unet")
    tuned = tuned_with(use_layers=(place,))
    with seen_by(base) as plain:
        output(base)
    with seen_by(tuned.model) as changed:
        output(tuned)
    order = sorted(plain)
    differs = [not torch.equal(plain[path], changed[path]) for path in order]
    assert differs.index(True) == place
    assert all(differs[place:])
    channels = _all(tuned)[place].channels
    assert torch.equal(plain[order[place]][:, :-channels], changed[order[place]][:, :-channels])
    assert not torch.equal(plain[order[place]][:, -channels:], changed[order[place]][:, -channels:])


@pytest.mark.parametrize("use_layers", [(0,), (3,), (0, 3), (1, 2)])
def test_a_subset_with_hints_trains_all_it_has(use_layers: tuple[int, ...]) -> None:
    tuned = tuned_with(**BOTH, use_layers=use_layers)
    with tuned.given(hint=hint()):
        tuned(**batch()).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trainable().values())


def test_targets_choose_up_blocks() -> None:
    tuned = pegbox.tune(family("unet"), "scedit", targets="up_blocks.1")
    assert set(tuned.sites) == {"up_blocks.1"}
    assert [skip.place for skip in tuned.adapter().shared.edited] == [2, 3]


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, BOTH, TWO])
@pytest.mark.parametrize("build", [unconditional, lambda: family("unet")])
def test_everything_trains_and_nothing_of_the_base(build: Any, settings: dict[str, Any]) -> None:
    tuned = tuned_with(build(), **settings)
    given = (
        batch()
        if "encoder_hidden_states" in _accepted(tuned.model)
        else {k: batch()[k] for k in ("sample", "timestep")}
    )
    hints = {name: hint(i) for i, name in enumerate(settings.get("hints", ()))}
    with tuned.given(hint=hints):
        tuned(**given).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trainable().values())
    assert all(p.grad is None for p in tuned.model.parameters())


def _accepted(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(type(model).forward).parameters)


def _kept(tuned: Any, given: dict[str, Tensor]) -> dict[int, Tensor]:
    """Tensors that autograd keeps, parameters aside, by storage."""
    own = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tuned(**given).sample.sum()
    return kept


def test_nothing_of_the_encoder_is_kept() -> None:
    """No output of a down or the middle block has a graph; what is kept is less than LoRA keeps on the same U-Net."""
    tuned, graphs = tuned_with().train(), []
    for path, module in tuned.model.named_modules():
        if path.startswith(("down_blocks", "mid_block", "conv_in", "time_embedding")) and not list(module.children()):
            module.register_forward_hook(lambda m, a, out: graphs.append(out.grad_fn))
    kept = _kept(tuned, batch())
    assert graphs
    assert all(graph is None for graph in graphs)
    lora = pegbox.tune(family("unet"), LoRA(rank=4, targets=("attn", "cross"))).train()
    size = lambda tensors: sum(t.untyped_storage().nbytes() for t in tensors.values())  # noqa: E731
    assert size(kept) < size(_kept(lora, batch()))


def test_gradient_checkpointing_keeps_gradients() -> None:
    grads = []
    for recompute in (False, True):
        tuned = tuned_with(**BOTH).train()
        if recompute:
            tuned.model.enable_gradient_checkpointing()
        with tuned.given(hint=hint()):
            tuned(**batch()).sample.square().mean().backward()
        grads.append({k: p.grad for k, p in tuned.trainable().items()})
    assert all(torch.allclose(grads[0][k], grads[1][k], atol=1e-5) for k in grads[0])


def test_the_objective_hands_the_hint_over() -> None:
    from pegbox import objectives

    tuned, given = tuned_with(**BOTH), batch()
    data = {"latents": given["sample"], "encoder_hidden_states": given["encoder_hidden_states"], "hint": hint()}
    fixed = data | {"noise": hint(5), "timesteps": given["timestep"]}
    objective = objectives.get("denoising")
    first, second = objective(tuned, fixed)["mse"], objective(tuned, fixed | {"hint": hint(9)})["mse"]
    assert first != second
    first.backward()
    assert all(p.grad is not None for p in tuned.trainable().values())


# -- files and company -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, TWO])
def test_a_file_holds_the_tuners_and_gives_the_same_image(tmp_path: Path, settings: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    tuned = tuned_with(**settings)
    tuned.save(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == tuned.state().keys()
    assert not any(k.startswith("base.") for k in keys)
    loaded = pegbox.load(family("unet"), tmp_path)
    hints = {name: hint(i) for i, name in enumerate(settings.get("hints", ()))}
    assert torch.equal(denoised(loaded, hints), denoised(tuned, hints))


@torch.no_grad()
def denoised(tuned: Any, hints: dict[str, Tensor]) -> Tensor:
    """Four DDIM steps from noise of a fixed seed."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x = hint(3)
    with tuned.given(hint=hints):
        for t in scheduler.timesteps:
            said = tuned(x, t, encoder_hidden_states=batch()["encoder_hidden_states"]).sample
            x = scheduler.step(said, t, x).prev_sample
    return x


def test_it_stacks_with_lora_in_either_order() -> None:
    outputs = []
    for order in ((SCEdit(), LoRA(rank=4)), (LoRA(rank=4), SCEdit())):
        names = [method.name() for method in order]
        tuned: Any = pegbox.tune(family("unet"), order[0], name=names[0])
        shake(tuned, seed=1 if names[0] == "scedit" else 2)
        tuned.add(names[1], order[1])
        shake(tuned, seed=1 if names[1] == "scedit" else 2)
        outputs.append(output(tuned.use(Stack(*names)).eval()))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_rows_have_their_own_hints() -> None:
    tuned = tuned_with(**BOTH)
    with tuned.given(hint=hint()):
        want, base = output(tuned), output(family("unet"))
        with tuned.rows(["default", None, "default", None]):
            have = output(tuned)
    for row in range(ROWS):
        assert torch.allclose(have[row], (base if row % 2 else want)[row], atol=1e-5)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    tuned = tuned_with(**BOTH)
    with pytest.raises(ModelError, match="needs hint 'edges'"):
        output(tuned)
    with pytest.raises(ModelError, match=r"of 1 row or 4, got shape \(3, 3, 8, 8\)"), tuned.given(hint=hint(rows=3)):
        output(tuned)
    with pytest.raises(MethodError, match=r"'hints'.*did you mean 'hint'"), tuned.given(hints=hint()):
        pass
    two = tuned_with(**TWO)
    with pytest.raises(ModelError, match="Tensor in its place"), two.given(hint=hint()):
        output(two)
    with pytest.raises(SettingsError, match="skip 9 is none"):
        tuned_with(use_layers=(9,))
    with pytest.raises(TargetError, match=r"unet\.up"):
        pegbox.tune(family("dit"), "scedit")


def test_one_hint_serves_all_rows() -> None:
    tuned = tuned_with(**BOTH)
    with tuned.given(hint=hint(rows=1)):
        one = output(tuned)
    with tuned.given(hint=hint(rows=1).expand(ROWS, -1, -1, -1)):
        assert torch.allclose(output(tuned), one, atol=1e-6)
