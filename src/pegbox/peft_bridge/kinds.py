"""What is to be known of PEFT's tuners beyond what their code says: how each is reached, and what each can do.

Where nothing is said here, a tuner puts layers around linears, starts as the identity, merges, and may differ from row
to row of a batch.  `tests/peft_bridge` holds every word of this against PEFT's own model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

How = Literal["layers", "attention", "prompt", "prefix"]
Kinds = Literal["linears", "matrices", "modules"]
Need = Literal["bias", "token ids", "blocks"]


@dataclass(frozen=True)
class Facts:
    """Of one tuner.

    Attributes:
        how: what it puts where: layers around modules, around attention, virtual tokens, or a prefix of the cache.
        targets: where, if nothing is said.
        kinds: what its layers can go around.
        identity, merges, per_row, needs, xfail: see `Traits`.
        defaults: of settings for which PEFT has none, or none that holds for every model.
        named: settings that name modules, and their defaults in the language of targets.
        of_steps: it acts after every step, and must know how many there are.
        tied: it changes what is tied to a target as well.
        of_tasks: rows may be of different tasks, given as `task_ids` in the context.
    """

    how: How = "layers"
    targets: str | tuple[str, ...] = "all-linear"
    kinds: Kinds = "linears"
    identity: bool = True
    merges: bool = True
    per_row: bool = True
    needs: tuple[Need, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_steps: bool = False
    of_tasks: bool = False
    tied: bool = False
    xfail: Mapping[str, str] = field(default_factory=dict)


FACTS: dict[str, Facts] = {
    "adalora": Facts(of_steps=True, defaults={"total_step": None}),
    "adamss": Facts(of_steps=True),
    "adaption_prompt": Facts(
        "attention", "attn", "modules", merges=False, needs=("blocks",),
        defaults={"adapter_len": 10, "adapter_layers": 2},
    ),
    **{name: Facts(kinds="matrices") for name in ("boft", "hira", "hra", "loha", "lokr", "lora", "oft")},
    "beft": Facts(needs=("bias",)),
    "cartridge": Facts("prefix", "attn", "modules", identity=False, merges=False, needs=("blocks",),
                       defaults={"num_virtual_tokens": 20}),
    "ia3": Facts(
        targets=("attn.k", "attn.v", "attn.qkv", "mlp.down"), named={"feedforward_modules": ("mlp.down",)},
    ),
    "lily": Facts(merges=False, per_row=False),
    "ln_tuning": Facts(
        targets=("norm.embed", "norm.attn", "norm.cross", "norm.mlp", "norm.block", "norm.final"), kinds="modules",
        needs=("blocks",),
    ),
    "multitask_prompt_tuning": Facts("prompt", "embed", "matrices", identity=False, merges=False,
                                     needs=("token ids",), of_tasks=True, defaults={"num_virtual_tokens": 20}),
    "p_tuning": Facts("prompt", "embed", "matrices", identity=False, merges=False, needs=("token ids",),
                      defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128}),
    "peanut": Facts(merges=True),
    "poly": Facts(merges=False, of_tasks=True),
    "prefix_tuning": Facts("prefix", "attn", "modules", identity=False, merges=False, needs=("blocks",),
                           defaults={"num_virtual_tokens": 20}),
    "prompt_tuning": Facts("prompt", "embed", "matrices", identity=False, merges=False, needs=("token ids",),
                           defaults={"num_virtual_tokens": 20}),
    "trainable_tokens": Facts(targets="embed", kinds="matrices", needs=("token ids",), tied=True,
                              defaults={"token_indices": (0, 1)}),
}  # fmt: skip

# not reached, and why
REFUSED: dict[str, str] = {
    "cpt": "its loss is part of PEFT's own model class, with a mask of token types in every batch; "
    "peft:prompt_tuning trains the same virtual tokens on any objective",
    "shadow": "it runs a second backbone through hooks of PEFT's own model class; PEFT's get_peft_model runs it",
    "xlora": "it mixes LoRA adapters that are trained already; load them here and use Sum(a=0.5, b=0.5)",
}

# models on which PEFT itself cannot run a tuner, and why
NOT_ON: dict[str, dict[str, str]] = {
    "adaption_prompt": {"bert": "PEFT has it for Llama, Mistral and GPT-2"},
}

# tuners whose files hold what the tuner has made, not what made it: read as the tuner that has just that
FINISHED: dict[str, str] = {"p_tuning": "prompt_tuning"}

# PEFT's settings that are not offered, and why
WITHHELD: dict[str, str] = {
    "alora_invocation_tokens": "it reads the ids of the whole batch from hooks of PEFT's model class",
    "arrow_config": "it routes among adapters that are trained already",
    "bias": "it trains the base's own biases; use the method bitfit beside",
    "corda_config": "it rewrites the base's weights",
    "ensure_weight_tying": "a merged weight is untied here, and the config says so",
    "ephemeral_gpu_offload": "devices are not a method's business here",
    "eva_config": "it needs data when it is built",
    "layer_replication": "it changes the base's structure",
    "loftq_config": "it rewrites the base's weights",
    "lora_ga_config": "it rewrites the base's weights, from gradients",
    "megatron_config": "Megatron's layers are not reached",
    "megatron_core": "Megatron's layers are not reached",
    "monteclora_config": "its loss is part of PEFT's trainer callback",
    "prompt_tuning_init_state_dict_path": "load the file instead",
    "runtime_config": "devices are not a method's business here",
    "save_indices": "indices are always drawn again from the seed",
    "save_only_topk_weights": "such a file cannot be trained further",
    "target_parameters": "name the modules that hold them in targets",
    "tokenizer_kwargs": "prompts start from the vocabulary or from noise here",
    "tokenizer_name_or_path": "prompts start from the vocabulary or from noise here",
    "prompt_tuning_init_text": "prompts start from the vocabulary or from noise here",
    "prompt_tuning_init_task": "load the file instead",
    "trainable_token_indices": "use the method peft:trainable_tokens beside",
    "use_qalora": "it needs a GPTQ base",
    "qalora_group_size": "it needs a GPTQ base",
}

# values that a setting cannot have here: they change the base, or look at data
WITHHELD_VALUES: dict[str, tuple[str, ...]] = {
    "init_lora_weights": (
        "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "mini", "kasa", "pissa_niter_[number of iters]",
    ),
    "prompt_tuning_init": ("TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"),
}  # fmt: skip


def facts(tuner: str) -> Facts:
    return FACTS.get(tuner, Facts())
