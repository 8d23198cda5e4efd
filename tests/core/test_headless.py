from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.guards import GuardBuilder
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import pegbox
from pegbox.core.cross_entropy import LogitRule
from pegbox.core.errors import ModelError
from pegbox.core.headless import (
    Head,
    find_head,
    logit_rule,
    logits_of,
    replaced,
    through_head,
    unwrap,
)

V = 64
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)).eval()


MODELS = {
    "llama": (llama, LogitRule()),
    "gpt2": (gpt2, LogitRule()),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8)), LogitRule(softcap=30.0)),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)), LogitRule(scale=0.125)),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**SHAPE)), LogitRule(scale=0.0625)),
}


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, and what each position predicts."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (3, 12), generator=draw)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, :3] = -100
    return {"input_ids": ids}, labels


def mean_loss(labels: Tensor, **options: Any) -> Any:
    return lambda head, hidden: head.cross_entropy(hidden, labels, **options)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def _whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, torch.distributed.tensor.DTensor) else grad.clone()


def assert_trains_alike(model: nn.Module, base: nn.Module) -> None:
    """Loss and gradients through the head equal those from the base's full logits."""
    inputs, labels = batch()
    loss, _ = through_head(model, inputs, labels.shape[1], mean_loss(labels))
    logits = logits_of(model(**inputs))
    full = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    ours, theirs = gradients(loss, base), gradients(full, base)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


# -- finding and proving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rule_is_proven_and_loss_equal(name: str) -> None:
    make, rule = MODELS[name]
    model: PreTrainedModel = make().eval()
    inputs, _ = batch()
    assert logit_rule(model, inputs) == rule
    assert_trains_alike(model, model)


def test_proof_happens_once_and_leaves_the_model_alone() -> None:
    model, (inputs, _) = gpt2().train(), batch()  # with dropout
    model.transformer.h[0].eval()
    training: list[bool] = []
    model.transformer.register_forward_hook(lambda module, *_: training.append(module.training))
    state = torch.get_rng_state()
    logit_rule(model, inputs)
    logit_rule(model, inputs)
    assert training == [False]  # one run, in which no statistic moves
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.transformer.h[0].training
    assert "forward" not in model.lm_head.__dict__


class Odd(nn.Module):
    """A model of one linear layer that does something of its own to its logits."""

    def __init__(self, config: Any = None, after: Any = None, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.after, self.calls = config, after, calls
        self.embed, self.out = nn.Embedding(V, 8), nn.Linear(8, V)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        for _ in range(self.calls):
            logits = self.out(self.embed(input_ids))
        return {"logits": logits if self.after is None else self.after(logits)}


ODD = {
    "its own softcap": (lambda: Odd(after=lambda z: 50 * torch.tanh(z / 50)), "its config does not tell"),
    "a wrong declaration": (
        lambda: Odd(SimpleNamespace(final_logit_softcapping=30.0), lambda z: 20 * torch.tanh(z / 20)),
        "its config does not tell",
    ),
    "normalised": (lambda: Odd(after=lambda z: z.log_softmax(-1)), "its config does not tell"),
    "two calls": (lambda: Odd(calls=2), "calls its head 2 times"),
}


@pytest.mark.parametrize("name", ODD)
def test_unknown_rule_falls_back_to_full_logits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = ODD[name]
    model, (inputs, _) = make(), batch()
    with caplog.at_level(logging.WARNING, "pegbox"):
        assert logit_rule(model, inputs) is None
        assert_trains_alike(model, model)
    assert [reason in r.message for r in caplog.records] == [True]


def test_logits_of_other_shapes_are_no_rule(caplog: pytest.LogCaptureFixture) -> None:
    assert logit_rule(Odd(after=lambda z: z[:, -1]), batch()[0]) is None
    assert "expected (batch, tokens, vocabulary)" in caplog.text
    assert logit_rule(Odd(after=lambda z: z[..., :-1]), batch()[0]) is None
    assert "its config does not tell" in caplog.text


def test_a_model_that_cannot_run_on_tokens_alone_is_no_rule(caplog: pytest.LogCaptureFixture) -> None:
    assert logit_rule(Odd(), {"pixel_values": torch.zeros(1, 3)}) is None
    assert "fail (TypeError" in caplog.text


def test_declared_rule_that_is_not_applied_is_not_believed() -> None:
    model = Odd(SimpleNamespace(final_logit_softcapping=30.0, logit_scale=2.0))
    assert logit_rule(model, batch()[0]) == LogitRule()


def test_scale_and_softcap_together() -> None:
    model = softcapped()
    assert logit_rule(model, batch()[0]) == LogitRule(0.5, 10.0)
    assert_trains_alike(model, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rules_are_proven_in_half_precision(dtype: torch.dtype) -> None:
    for make, rule in MODELS.values():
        assert logit_rule(make().to(dtype), batch()[0]) == rule


def test_model_without_a_head_gives_full_logits(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    assert find_head(model) is None
    inputs, labels = batch()
    model.forward = lambda input_ids: model[1](model[0](input_ids))  # type: ignore[method-assign]
    loss, output = through_head(model, inputs, 12, mean_loss(labels))
    expected = F.cross_entropy(model[1](model[0](inputs["input_ids"])).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    assert output.shape == (3, 12, V)


def test_full_logits_of_virtual_tokens_are_cut_off() -> None:
    model, (inputs, labels) = Odd(after=lambda z: nn.functional.pad(z, (0, 0, 3, 0)), calls=2), batch()
    loss, _ = through_head(model, inputs, 12, mean_loss(labels))
    logits = model(**inputs)["logits"][:, 3:]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("output", ["object", "mapping", "tuple", "tensor"])
def test_logits_of_every_kind_of_output(output: str) -> None:
    logits = torch.zeros(2)
    outputs = {"object": SimpleNamespace(logits=logits), "mapping": {"logits": logits}, "tuple": (logits, 1)}
    assert logits_of(outputs.get(output, logits)) is logits


@pytest.mark.parametrize("output", [None, {"loss": 1}, (), ("a",), SimpleNamespace(logits=None)])
def test_output_without_logits_is_an_error(output: Any) -> None:
    with pytest.raises(ModelError, match="no logits"):
        logits_of(output)


# -- replacing ---------------------------------------------------------------------------------------------------------


def test_a_replaced_forward_is_restored_on_error() -> None:
    model = llama()
    with pytest.raises(ValueError, match="input_ids"), replaced(model.lm_head, torch.neg):
        model()
    assert "forward" not in model.lm_head.__dict__


def test_another_patch_of_the_head_is_put_back_exactly() -> None:
    head = nn.Linear(4, 4)

    def patch(x: Tensor) -> Tensor:
        return x + 1

    head.forward = patch  # type: ignore[method-assign]
    with replaced(head, torch.neg), replaced(head, lambda x: x * 2):
        assert head(torch.ones(4)).tolist() == [2.0] * 4
    assert head.__dict__["forward"] is patch


def test_patched_or_grafted_head_is_not_plain() -> None:
    model = llama()
    assert find_head(model) == (model.lm_head, True)
    tuned = pegbox.tune(model, "lora", targets="head")
    assert find_head(tuned) == (model.lm_head, False)
    tuned.detach()
    assert find_head(model) == (model.lm_head, True)


def test_subclass_of_linear_is_not_plain() -> None:
    class Quantised(nn.Linear):
        pass

    model = llama()
    model.lm_head = Quantised(32, V, bias=False)
    assert find_head(model) == (model.lm_head, False)
    assert_trains_alike(model, model)


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "series", "prompt_tuning", "full"])
def test_tuned_models_train_alike(method: str) -> None:
    assert_trains_alike(tuned := pegbox.tune(llama(attention_bias=True), method), tuned)


def test_grafted_head_gets_gradients() -> None:
    tuned = pegbox.tune(llama(), "lora", targets=("head", "attn.q"), rank=2)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.normal_(std=0.1)
    inputs, labels = batch()
    loss, _ = through_head(tuned, inputs, 12, mean_loss(labels))
    assert any("lm_head" in name and grad.any() for name, grad in gradients(loss, tuned).items())
    assert_trains_alike(tuned, tuned)


def test_patched_head_gets_gradients() -> None:
    model = llama()
    extra = nn.Parameter(torch.randn(V))
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) * extra  # type: ignore[method-assign]
    assert_trains_alike(model, model)
    extra.grad = None
    inputs, labels = batch()
    through_head(model, inputs, 12, mean_loss(labels))[0].backward()
    ours = extra.grad
    extra.grad = None
    F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(ours, extra.grad)


def test_adapter_per_row_on_the_head() -> None:
    tuned = pegbox.tune(llama(), "lora", targets="head", rank=2)
    tuned.add("other", tuned.method)
    with torch.no_grad():
        for adapter in tuned.adapters.values():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.3)
    with tuned.rows(["default", None, "other"]):
        assert_trains_alike(tuned, tuned)


def test_whole_copy_of_the_head_trains() -> None:
    tuned = pegbox.tune(llama(), "lora", also_train=("lm_head",))
    assert_trains_alike(tuned, tuned)


def test_tied_head_trains() -> None:
    model = llama(tie_word_embeddings=True)
    assert_trains_alike(model, model)


def test_token_values_come_back_in_shape() -> None:
    for make, rule in MODELS.values():
        model, (inputs, labels) = make().eval(), batch()
        got, _ = through_head(model, inputs, 12, lambda head, x, y=labels: head.log_probs(x, y))
        everything = F.log_softmax(model(**inputs).logits, -1)
        expected = everything.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        worth = torch.randn(3, 12)
        ours, theirs = gradients((got * worth).sum(), model), gradients((expected * worth).sum(), model)
        for name, grad in theirs.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5, msg=f"{name} {rule}")


def test_token_values_with_virtual_tokens_before_them() -> None:
    tuned = pegbox.tune(llama(), "prompt_tuning", tokens=5)
    inputs, labels = batch()
    got, _ = through_head(tuned, inputs, 12, lambda head, x: head.token_losses(x, labels))
    expected = F.cross_entropy(tuned(**inputs).logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(got.flatten(), expected)
    prompt = next(iter(tuned.trainable().values()))
    ours = torch.autograd.grad(got.sum(), prompt)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), prompt)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its new name is newer than 5.0
def test_gradient_checkpointing() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_trains_alike(model, model)


def test_without_gradients() -> None:
    model, (inputs, labels) = llama(), batch()
    with torch.no_grad():
        loss, _ = through_head(model, inputs, 12, mean_loss(labels))
    assert not loss.requires_grad
    full = F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(full.item())


def test_head_called_twice_after_its_proof_is_an_error() -> None:
    model, (inputs, labels) = Odd(), batch()
    logit_rule(model, inputs)
    model.calls = 2
    with pytest.raises(ModelError, match="called its head 2 times"):
        through_head(model, inputs, 12, mean_loss(labels))
    assert "forward" not in model.out.__dict__


def test_head_on_full_logits() -> None:
    logits, labels = torch.randn(2, 3, V), torch.tensor([[1, 2, -100], [3, 4, 5]])
    head = Head(lambda z: z)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(head.cross_entropy(logits, labels), expected)


# -- wrapped -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_ddp(one_process: None, options: dict[str, bool]) -> None:
    base = llama()
    model = DistributedDataParallel(pegbox.tune(base, "full"), **options)
    assert unwrap(model) is base
    inputs, labels = batch()
    for _ in range(2):
        loss, _ = through_head(model, inputs, 12, mean_loss(labels))
        ours = gradients(loss, base)
    full = F.cross_entropy(base(**inputs).logits.flatten(0, 1), labels.flatten())
    for name, grad in gradients(full, base).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("own_group", [True, False])
def test_fsdp2(one_process: None, reshard: bool, own_group: bool) -> None:
    """The head's weight is whole only inside the model's forward, and there the loss is computed."""
    model, mesh = llama(), init_device_mesh("cpu", (1,))
    inputs, labels = batch()
    theirs = gradients(F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()), model)
    for block in [*model.model.layers, *([model.lm_head] if own_group else [])]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    loss, _ = through_head(model, inputs, 12, mean_loss(labels))
    ours = gradients(loss, model)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def softcapped() -> Odd:
    config = SimpleNamespace(final_logit_softcapping=10.0, logit_scale=0.5)
    return Odd(config, lambda z: 10.0 * torch.tanh(0.5 * z / 10.0))


@pytest.mark.parametrize("make", [lambda: llama(num_hidden_layers=1), softcapped], ids=["llama", "softcapped"])
def test_compiled_model_is_one_graph(make: Callable[[], nn.Module]) -> None:
    base = make()
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    assert unwrap(compiled) is base
    inputs, labels = batch()
    for unlabelled in (0, 4):
        labels[0, :unlabelled] = -100
        loss, _ = through_head(compiled, inputs, 12, mean_loss(labels))
        full = F.cross_entropy(logits_of(base(**inputs)).flatten(0, 1), labels.flatten())
        assert loss.item() == pytest.approx(full.item(), rel=1e-6)
        ours = gradients(loss, base)
        for parameter, grad in gradients(full, base).items():
            torch.testing.assert_close(ours[parameter], grad, rtol=1e-4, atol=1e-6)
    assert "forward" not in find_head(base)[0].__dict__  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, while it compiles
def test_compiled_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other models, proven before, are collected while it compiles."""
    others = [llama(num_hidden_layers=1) for _ in range(6)]
    tuned = pegbox.tune(llama(num_hidden_layers=1), "lora")
    inputs, labels = batch()
    for model in (*others, tuned):
        logit_rule(model, inputs)  # the proof itself does not compile
    guarded = GuardBuilder.TYPE_MATCH

    def collected(self: GuardBuilder, guard: Any) -> Any:
        if others:
            others.clear()
            gc.collect()
        return guarded(self, guard)

    monkeypatch.setattr(GuardBuilder, "TYPE_MATCH", collected)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(ids: Tensor, y: Tensor) -> Tensor:
        return through_head(tuned, {"input_ids": ids}, 12, lambda head, x: head.cross_entropy(x, y))[0]

    loss = step(inputs["input_ids"], labels)
    full = F.cross_entropy(tuned(**inputs).logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    ours = gradients(loss, tuned)
    for name, grad in gradients(full, tuned).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)
