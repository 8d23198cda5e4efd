"""Matrices that are no module's own weight: fused, of experts, of torch's MultiheadAttention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import Stack, Sum, anatomy
from pegbox.checks import models
from pegbox.checks.lab import bits, require_same_bits, shake
from pegbox.core.errors import CannotMix, TargetError
from pegbox.core.parts import interleaved, stacked

METHODS = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "miss": {"rank": 3},
    "bat": {"rank": 4},
}
IDS = torch.randint(2, 60, (3, 6), generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    torch.manual_seed(0)
    return models.gpt2().eval()


def moe(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 60,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "use_cache": False,
    }
    more = {
        "Mixtral": {"num_local_experts": 3},
        "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


class Attention(nn.Module):
    """torch's own: one fused matrix and an output projection that is never called."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, **given)
        self.out = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        kinds = {"key": h[..., : self.attn.kdim], "value": h[..., : self.attn.vdim]}
        answer: Tensor = self.out(self.attn(h, **kinds, need_weights=False)[0])
        return answer


def attention(**given: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**given).eval()


def output(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids)
    return out if isinstance(out, Tensor) else out.logits


CASES: dict[str, tuple[Any, str | tuple[str, ...]]] = {
    "fused": (gpt2, ("attn.q", "attn.v")),
    "fused one": (gpt2, "c_attn[k]"),
    "experts": (lambda: moe("Mixtral"), ("experts.down_proj", "experts.gate_up_proj")),
    "some experts": (lambda: moe("Mixtral"), ("down_proj[1]", "gate_up_proj[2][gate]")),
    "qwen experts": (lambda: moe("Qwen2Moe"), r".*experts\..*"),
    "attention": (attention, ("attn.q", "attn.out")),
    "attention whole": (attention, ("in_proj_weight", "out_proj")),
    "attention of three": (lambda: attention(kdim=8, vdim=12), ("q_proj_weight", "k_proj_weight", "v_proj_weight")),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return CASES[request.param]


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_method_works_on_parts(name: str, case: tuple[Any, Any], tmp_path: Path) -> None:
    build, targets = case
    model = build()
    before, base = bits(model), output(model)
    tuned = pegbox.tune(model, name, targets=targets, **METHODS[name])
    assert all("[" in path or "weight" in path or "proj" in path for path in tuned.sites)
    torch.testing.assert_close(output(tuned), base, rtol=1e-5, atol=1e-5)
    shake(tuned)
    want = output(tuned)
    assert (want - base).abs().max() > 1e-3
    tuned.train()
    out = tuned(input_ids=IDS)
    (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
    still = [k for k, p in tuned.trainable().items() if p.grad is None or not p.grad.any()]
    assert not still
    assert not any(p.grad is not None for p in model.parameters())
    tuned.eval()
    torch.testing.assert_close(output(tuned.merge()), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(tuned.unmerge()), want)
    tuned.save(tmp_path)
    assert torch.equal(output(pegbox.load(build(), tmp_path)), want)
    require_same_bits(bits(tuned.detach()), before, "the base")
    torch.testing.assert_close(output(model), base)


def test_only_the_named_rows_change() -> None:
    model = gpt2()
    before = bits(model)
    merged = shake(pegbox.tune(model, "lora", rank=2, targets="attn.k")).merge().state_dict()
    changed = {k for k in before if not torch.equal(before[k], merged[k])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    rows = (merged["transformer.h.0.attn.c_attn.weight"] != before["transformer.h.0.attn.c_attn.weight"]).any(0)
    assert rows.nonzero().flatten().tolist() == list(range(32, 64))


def test_parts_of_a_linear_run_as_one_product() -> None:
    tuned = shake(pegbox.tune(gpt2(), "lora", rank=2, targets=("attn.q", "attn.v")))
    site = tuned._sites["transformer.h.0.attn.c_attn"]
    down, up, _ = site.chain[0].factors()  # type: ignore[operator]
    assert (down.shape, up.shape) == ((4, 32), (96, 4))


def test_dropout_of_parts() -> None:
    tuned = shake(pegbox.tune(gpt2(), "lora", rank=2, targets=("attn.q", "attn.v"), dropout=0.5)).eval()
    calm = output(tuned)
    assert not torch.equal(output(tuned.train()), calm)
    assert torch.equal(output(tuned.eval()), calm)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["fused", "attention"])
def test_sums_stacks_and_rows(kind: str, name: str) -> None:
    build, targets = CASES[kind]
    method = pegbox.method(name, targets=targets, **METHODS[name])
    tuned = shake(pegbox.tune(build(), method, name="a"), seed=1)
    tuned.add("b", method)
    shake(tuned, seed=2).eval()
    alone = {"a": output(tuned.use("a")), "b": output(tuned.use("b")), None: output(build())}
    torch.testing.assert_close(output(tuned.use(Sum(a=1.0, b=0.0))), alone["a"], rtol=1e-5, atol=1e-5)
    for plan in (Sum(a=0.5, b=-0.5), Stack("a", "b")):
        want = output(tuned.use(plan))
        torch.testing.assert_close(output(tuned.merge()), want, rtol=1e-5, atol=1e-5)
        tuned.unmerge()
    names = ["b", None, "a"]
    for _ in range(2):  # the second time with what was gathered the first time
        with tuned.rows(names):
            have = output(tuned)
        for row, chosen in enumerate(names):
            torch.testing.assert_close(have[row], alone[chosen][row], rtol=1e-5, atol=1e-5)
    shake(tuned.use("a"), seed=3)
    with tuned.rows(names):
        assert not torch.allclose(output(tuned)[2], alone["a"][2])


def test_rows_of_experts() -> None:
    method = pegbox.method("lora", targets="experts.down_proj", rank=2)
    tuned = shake(pegbox.tune(moe("Mixtral"), method, name="a"), seed=1)
    tuned.add("b", method)
    shake(tuned, seed=2).eval()
    alone = {"a": output(tuned.use("a")), "b": output(tuned.use("b")), None: output(moe("Mixtral"))}
    with tuned.rows(["b", None, "a"]):
        have = output(tuned)
    for row, chosen in enumerate(("b", None, "a")):
        torch.testing.assert_close(have[row], alone[chosen][row], rtol=1e-5, atol=1e-5)


# -- names -----------------------------------------------------------------------------------------------------------


def resolved(model: nn.Module, targets: Any, **given: Any) -> list[str]:
    return anatomy.of(model).resolve(targets, parts=True, **given)


def test_names_of_parts() -> None:
    h = "transformer.h.0.attn.c_attn"
    assert resolved(gpt2(), "attn.q", layers="0") == [f"{h}[q]"]
    assert resolved(gpt2(), ("attn.qkv[v]", "c_attn[q]"), layers="0") == [f"{h}[q]", f"{h}[v]"]
    assert resolved(gpt2(), "attn", layers="0") == [h, "transformer.h.0.attn.c_proj"]
    assert resolved(gpt2(), ("attn.q", "attn.out"), exclude="attn.q", layers="0") == ["transformer.h.0.attn.c_proj"]
    assert resolved(gpt2(), "attn.qkv", exclude="attn.k", layers="0") == [f"{h}[q]", f"{h}[v]"]
    assert not [p for p in resolved(gpt2(), "all-linear") if "[" in p]


def test_names_of_experts() -> None:
    mixtral = moe("Mixtral")
    e = "model.layers.0.mlp.experts"
    assert resolved(mixtral, "down_proj", layers="0") == [f"{e}.down_proj[{i}]" for i in range(3)]
    assert resolved(mixtral, "gate_up_proj[gate]", layers="0") == [f"{e}.gate_up_proj[{i}][gate]" for i in range(3)]
    assert resolved(mixtral, f"{e}.gate_up_proj[1][up]") == [f"{e}.gate_up_proj[1][up]"]
    assert not [p for p in resolved(mixtral, "all-linear") if "experts" in p]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("c_attn[w]", r"c_attn\[w\]"),
        (("c_attn", "c_attn[q]"), "'transformer.h.0.attn.c_attn' and rows of it"),
    ],
)
def test_wrong_names_are_refused(targets: Any, words: str) -> None:
    model = gpt2()
    with pytest.raises(TargetError, match=words):
        pegbox.tune(model, "lora", rank=2, targets=targets)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_an_expert_that_is_not_there() -> None:
    with pytest.raises(TargetError):
        pegbox.tune(moe("Mixtral"), "lora", rank=2, targets="down_proj[7]")


@pytest.mark.parametrize("name", ["series"])
def test_methods_that_change_outputs_name_the_whole(name: str) -> None:
    with pytest.raises(TargetError, match=r"'attn\.q' is only some rows of a matrix .* target attn\.qkv instead"):
        pegbox.tune(gpt2(), name, targets="attn.q", bottleneck=2)
    with pytest.raises(TargetError, match=r"MultiheadAttention"):
        pegbox.tune(attention(), name, targets="out_proj", bottleneck=2)


def test_rows_in_proportion_and_in_turn() -> None:
    assert stacked(("q", "k", "v"), 8, (2, 1, 1)) == {"q": (range(4),), "k": (range(4, 6),), "v": (range(6, 8),)}
    assert interleaved(("q", "k"), 8, groups=2) == {
        "q": (range(2), range(4, 6)),
        "k": (range(2, 4), range(6, 8)),
    }
    with pytest.raises(TargetError, match="cannot be shared"):
        stacked(("q", "k", "v"), 8)


def test_a_batch_of_rows_that_do_not_fit_is_refused() -> None:
    tuned = shake(pegbox.tune(moe("Mixtral"), "lora", rank=2, targets="down_proj", name="a"))
    with pytest.raises(CannotMix), tuned.rows(["a", None]):
        output(tuned)
