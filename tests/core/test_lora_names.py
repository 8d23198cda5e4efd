"""LoRA on a U-Net against diffusers: files go both ways, outputs and gradients agree."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pegbox
from pegbox.checks.lab import shake
from pegbox.checks.models import FAMILIES, inputs
from pegbox.core import lora_names
from pegbox.core.errors import AdapterError
from pegbox.core.tuned import Tuned

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'pegbox[diffusion]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'pegbox[peft]'")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def unet() -> Any:
    torch.manual_seed(0)
    return FAMILIES["unet"].build().eval()


def output(model: Any) -> Tensor:
    return model(**inputs(FAMILIES["unet"].batch(0))).sample


def ours(**settings: Any) -> Tuned:
    return shake(pegbox.tune(unet(), "lora", **{"rank": 4, "alpha": 6.0} | settings)).eval()


def quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call diffusers, whose warnings about lost keys are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def theirs(**config: Any) -> Any:
    """A U-Net with diffusers' LoRA of random values."""
    from peft import LoraConfig

    model = unet()
    quietly(model.add_adapter, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(ATTENTION)} | config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"targets": ATTENTION}, {"targets": "resnet.time"}])
def test_diffusers_loads_ours(tmp_path: Path, settings: dict[str, Any]) -> None:
    tuned = ours(**settings)
    lora_names.write(tuned, tmp_path)
    model = unet()
    quietly(model.load_lora_adapter, str(tmp_path), prefix=None, weight_name=lora_names.FILE)
    assert torch.allclose(output(model), output(tuned), atol=1e-5)
    assert not torch.allclose(output(model), output(unet()), atol=1e-3)


def test_a_pipelines_file_loads_with_its_prefix(tmp_path: Path) -> None:
    tuned = ours()
    lora_names.write(tuned, tmp_path, component="unet")
    model = unet()
    quietly(model.load_lora_adapter, str(tmp_path), prefix="unet", weight_name=lora_names.FILE)
    assert torch.allclose(output(model), output(tuned), atol=1e-5)
    assert torch.allclose(output(pegbox.load(unet(), tmp_path)), output(tuned), atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"target_modules": ["proj_in", "ff.net.2", "to_q"]}])
def test_we_load_theirs(tmp_path: Path, config: dict[str, Any]) -> None:
    model = theirs(**config)
    quietly(model.save_lora_adapter, str(tmp_path))
    tuned = pegbox.load(unet(), tmp_path)
    assert torch.allclose(output(tuned), output(model), atol=1e-5)
    assert tuned.method.rank == 4
    assert tuned.method.alpha == pytest.approx(6.0)


def test_gradients_are_theirs(tmp_path: Path) -> None:
    model = theirs()
    quietly(model.save_lora_adapter, str(tmp_path))
    tuned = pegbox.load(unet(), tmp_path)
    for each in (model, tuned):
        output(each).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".lora_" in n}
    assert grads
    for name, grad in grads.items():
        path, _, rest = name.partition(".lora_")
        own = tuned.trainable()[f"graft.{path}.{rest[0].lower()}"].grad
        assert torch.allclose(own, grad, atol=1e-5)


def test_ours_come_back(tmp_path: Path) -> None:
    tuned = ours(rslora=True)
    for names in ("diffusers", "kohya"):
        lora_names.write(tuned, tmp_path / f"{names}.safetensors", names=names)  # type: ignore[arg-type]
        again = pegbox.load(unet(), tmp_path / f"{names}.safetensors")
        assert torch.allclose(output(again), output(tuned), atol=1e-6)


# -- kohya -------------------------------------------------------------------------------------------------------------


def through_diffusers(state: dict[str, Tensor]) -> Any:
    """A U-Net with a kohya file, loaded as diffusers' pipelines do."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    converted, alphas = quietly(StableDiffusionLoraLoaderMixin.lora_state_dict, copy.copy(state))
    model = unet()
    quietly(model.load_lora_adapter, converted, network_alphas=alphas, prefix="unet")
    return model.eval()


def test_diffusers_loads_our_kohya_file(tmp_path: Path) -> None:
    tuned = ours(targets=ATTENTION)
    state = load_file(lora_names.write(tuned, tmp_path / "kohya.safetensors", names="kohya"))
    assert all(k.startswith("lora_unet_") for k in state)
    assert torch.allclose(output(through_diffusers(state)), output(tuned), atol=1e-5)


def uneven(tmp_path: Path, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """A kohya file with a rank and an alpha for each module, also saved as `uneven.safetensors`."""
    state = load_file(lora_names.write(ours(targets=targets), tmp_path / "kohya.safetensors", names="kohya"))
    for place, stem in enumerate(sorted({key.partition(".")[0] for key in state})):
        rank = 1 + place % 4
        state[f"{stem}.lora_down.weight"] = state[f"{stem}.lora_down.weight"][:rank].contiguous()
        state[f"{stem}.lora_up.weight"] = state[f"{stem}.lora_up.weight"][:, :rank].contiguous()
        state[f"{stem}.alpha"] = torch.tensor(0.5 + rank)
    save_file(state, tmp_path / "uneven.safetensors")
    return state


def test_every_module_may_have_its_own_rank_and_alpha(tmp_path: Path) -> None:
    """W + alpha / rank * up down, module by module."""
    state = uneven(tmp_path, ATTENTION)
    model = unet()
    flat = {path.replace(".", "_"): module for path, module in model.named_modules()}
    with torch.no_grad():
        for stem in {key.partition(".")[0] for key in state}:
            down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
            flat[stem.removeprefix("lora_unet_")].weight += state[f"{stem}.alpha"] / len(down) * up @ down
    assert torch.allclose(output(pegbox.load(unet(), tmp_path / "uneven.safetensors")), output(model), atol=1e-5)


def test_so_does_diffusers_read_them(tmp_path: Path) -> None:
    """Outside of attention; there diffusers overlooks alphas that differ."""
    state = uneven(tmp_path, ("ff.net.2", "ff.net.0.proj", "time_emb_proj"))
    loaded = pegbox.load(unet(), tmp_path / "uneven.safetensors")
    assert torch.allclose(output(loaded), output(through_diffusers(state)), atol=1e-5)


def test_a_file_without_alphas_has_a_scale_of_one(tmp_path: Path) -> None:
    tuned = ours(alpha=4.0)
    state = load_file(lora_names.write(tuned, tmp_path / "kohya.safetensors", names="kohya"))
    save_file({k: v for k, v in state.items() if not k.endswith(".alpha")}, tmp_path / "bare.safetensors")
    assert torch.allclose(output(pegbox.load(unet(), tmp_path / "bare.safetensors")), output(tuned), atol=1e-6)


@pytest.mark.parametrize(
    ("end", "older"),
    [
        ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")),
        (
            (".to_q.lora_A.weight", ".to_q.lora_B.weight"),
            (".processor.to_q_lora.down.weight", ".processor.to_q_lora.up.weight"),
        ),
        (
            (".to_out.0.lora_A.weight", ".to_out.0.lora_B.weight"),
            (".processor.to_out_lora.down.weight", ".processor.to_out_lora.up.weight"),
        ),
    ],
)
def test_older_spellings(tmp_path: Path, end: tuple[str, str], older: tuple[str, str]) -> None:
    tuned = ours(targets=("to_q", "to_out.0"), alpha=4.0)
    state = load_file(lora_names.write(tuned, tmp_path))
    for new, old in zip(end, older, strict=True):
        state = {(f"unet.{k.removesuffix(new)}{old}" if k.endswith(new) else k): v for k, v in state.items()}
    save_file(state, tmp_path / "old.safetensors")
    assert torch.allclose(output(pegbox.load(unet(), tmp_path / "old.safetensors")), output(tuned), atol=1e-6)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_unet_nowhere_to_q.lora_down.weight": torch.zeros(4, 16)}, "names no module of this model"),
        ({"mid_block.resnets.0.time_emb_proj.dora_scale": torch.zeros(4)}, "no tensor of plain LoRA"),
        ({"conv_in.lora_A.weight": torch.zeros(4, 3, 3, 3)}, "has no B"),
        ({"time_embedding.linear_1.alpha": torch.tensor(1.0)}, "has no A"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    state = load_file(lora_names.write(ours(targets="to_q"), tmp_path))
    save_file(state | changes, tmp_path / "wrong.safetensors")
    model = unet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        pegbox.load(model, tmp_path / "wrong.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_damaged_file_and_one_for_another_model_are_refused(tmp_path: Path) -> None:
    place = lora_names.write(ours(), tmp_path)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1, 1)}
    save_file(text, tmp_path / "text.safetensors")
    with pytest.raises(AdapterError, match="nothing for this model"):
        pegbox.load(unet(), tmp_path / "text.safetensors")
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(AdapterError, match="damaged"):
        pegbox.load(unet(), tmp_path)


def test_only_lora_is_written(tmp_path: Path) -> None:
    tuned = pegbox.tune(unet(), "bitfit")
    with pytest.raises(AdapterError, match="no plain LoRA form"):
        lora_names.write(tuned, tmp_path)


# -- the original layout -----------------------------------------------------------------------------------------------

ORIGINAL = {  # of the tiny U-Net: two sizes, a layer a block, attention in the first
    "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_1_1_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_1_0_emb_layers_1": "up_blocks.0.resnets.1.time_emb_proj",
    "output_blocks_2_1_transformer_blocks_0_ff_net_2": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    "output_blocks_3_1_transformer_blocks_0_attn1_to_v": "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
}
CONVOLUTIONS = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "output_blocks_1_1_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0_out_layers_3": "up_blocks.1.resnets.1.conv2",
    "out_2": "conv_out",
}


def test_names_of_the_original_layout(tmp_path: Path) -> None:
    """As kohya's scripts write for XL: the same modules as in diffusers' layout."""
    tuned = ours(targets=tuple(ORIGINAL.values()), alpha=4.0)
    state = load_file(lora_names.write(tuned, tmp_path))
    renamed = {}
    for short, path in ORIGINAL.items():
        renamed[f"lora_unet_{short}.lora_down.weight"] = state[f"{path}.lora_A.weight"]
        renamed[f"lora_unet_{short}.lora_up.weight"] = state[f"{path}.lora_B.weight"]
    save_file(renamed, tmp_path / "original.safetensors")
    assert torch.allclose(output(pegbox.load(unet(), tmp_path / "original.safetensors")), output(tuned), atol=1e-6)


@pytest.mark.parametrize("short", ORIGINAL | CONVOLUTIONS)
def test_each_name_of_the_original_layout(short: str) -> None:
    path = (ORIGINAL | CONVOLUTIONS)[short]
    unet().get_submodule(path)
    assert lora_names._in_diffusers_layout(short, 1) == path.replace(".", "_")
