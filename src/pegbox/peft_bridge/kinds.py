"""What is to be known of PEFT's tuners beyond what their code says: how each is reached, and what each can do.

Where nothing is said here, a tuner puts layers around linears, starts as the identity, merges, and may differ from row
to row of a batch.  `tests/peft_bridge` holds every word of this against PEFT's own model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

How = Literal["layers", "attention", "prompt", "prefix"]
Kinds = Literal["linears", "lookups", "matrices", "modules"]
Need = Literal["bias", "norms", "lookups", "token ids", "blocks"]


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
        casts: its layers compute in whatever dtype their input has, with masters in float32.
        allocates: what it takes from training while it trains, by what matters least.
        of_class: its layers go around `nn.Linear` itself and no subclass.
        tied: it changes what is tied to a target as well.
        of_tasks: rows may be of different tasks, given as `task_ids` in the context.
        small: settings that fit the tiny models of the suite, see `Method.small`.
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
    casts: bool = True
    allocates: Literal["ranks", "subspaces"] | None = None
    of_tasks: bool = False
    of_class: bool = False
    tied: bool = False
    small: Mapping[str, Any] = field(default_factory=dict)
    xfail: Mapping[str, str] = field(default_factory=dict)


OWN_SEED = "what it draws hangs on PEFT's own seed, which is a setting"
OF_THE_BASE = "it is made of the base's weights, so that one made of a merged base is another"
SPARSE = "PEFT's layer makes a sparse tensor in every forward, which torch.compile does not trace"
DRAWS = "it draws at every call while it trains"
DECOMPOSED = "PEFT's layer computes with its decomposition of the matrix in bfloat16"
GROUPED = "PEFT's layer mixes the groups of a grouped convolution, which no grouped kernel does"
DISTANCES = "T5 sees distances, and padding on the left comes between the virtual tokens and the text"
BLIND = "PEFT's layer reads the weight without its gradient, so what lies beneath gets none through it"

FACTS: dict[str, Facts] = {
    "adalora": Facts(
        allocates="ranks", defaults={"total_step": None}, small={"init_r": 4, "target_r": 2, "lora_alpha": 24},
    ),
    "adamss": Facts(allocates="subspaces", xfail={"a_stack_is_one_around_the_other": OF_THE_BASE}),
    "adaption_prompt": Facts(
        "attention", "attn", "modules", merges=False, casts=False, needs=("blocks",),
        defaults={"adapter_len": 10, "adapter_layers": 2}, small={"adapter_len": 3, "adapter_layers": 1},
        xfail={"a_sum_adds_changes": "it goes around the whole attention, whose outputs are several"},
    ),
    **{name: Facts(kinds="matrices") for name in ("hira", "loha", "lokr")},
    "boft": Facts(kinds="matrices", small={"boft_block_size": 2}),
    "lora": Facts(kinds="matrices", small={"r": 4, "lora_alpha": 6}, xfail={
        "merged_equals_forward[conv]": GROUPED,
        "unmerge_restores_bits[conv]": GROUPED,
    }),
    "oft": Facts(kinds="matrices", small={"oft_block_size": 2}),
    "c3a": Facts(identity=False, small={"block_size": 2}),
    "fourierft": Facts(identity=False, small={"n_frequency": 20}),
    "glora": Facts(of_class=True, xfail={
        "merged_equals_forward_in_bf16": "PEFT's layer adds its output to the base's and takes the base's off again, "
        "all in bfloat16, and rounds three times",
        **{
            f"{check}[{family}]": "D multiplies the base's biases, which are zero in this model"
            for check in ("gradients_reach_what_trains", "training_lowers_the_loss")
            for family in ("bert", "vit")
        },
        "training_lowers_the_loss[dit]": "C changes the biases of keys, which change nothing in attention",
    }),
    "frod": Facts(defaults={"progressbar": False}, xfail={
        "seams_are_declared": "its shares have bounds that PEFT's configuration class does not tell",
        "other_seed_other_bits": OWN_SEED,
        "compiles_whole": SPARSE,
        "merged_equals_forward_in_bf16": DECOMPOSED,
        **{f"masters_stay_float32[{family}]": DECOMPOSED for family in ("gpt2", "mlp", "dit")},
        "a_stack_is_one_around_the_other": OF_THE_BASE,
        "a_stack_runs_all": "its layer computes with its own decomposition, and calls nothing beneath",
    }),
    "hra": Facts(kinds="matrices", xfail={"a_stack_runs_all": BLIND}),
    "osf": Facts(xfail={"a_stack_is_one_around_the_other": OF_THE_BASE}),
    "randlora": Facts(xfail={"other_seed_other_bits": OWN_SEED}),
    "shira": Facts(
        xfail={"other_seed_other_bits": OWN_SEED, "a_stack_runs_all": BLIND, "compiles_whole": SPARSE},
    ),
    "psoft": Facts(xfail={"a_stack_is_one_around_the_other": OF_THE_BASE}),
    "pvera": Facts(xfail={
        "other_seed_other_bits": OWN_SEED,
        "recomputation_keeps_gradients": DRAWS,
        "resumes_to_the_same_bits": DRAWS,
        "training_lowers_the_loss[mlp]": DRAWS,
        "training_lowers_the_loss[conv]": DRAWS,
    }),
    "road": Facts(small={"group_size": 2}),
    "supertuning": Facts(small={"sparsity": 0.9}),
    "tinylora": Facts(xfail={"other_seed_other_bits": OWN_SEED}),
    "unilora": Facts(identity=False, small={"theta_d_length": 4000}),
    "vblora": Facts(identity=False, small={"vector_length": 2, "num_vectors": 8, "r": 8}),
    "vera": Facts(xfail={"other_seed_other_bits": OWN_SEED}),
    "waveft": Facts(xfail={
        "other_seed_other_bits": OWN_SEED,
        "compiles_whole": "PEFT's wavelet transform asks for types in a way that torch.compile does not trace",
    }),
    "beft": Facts(needs=("bias",), xfail={"other_seed_other_bits": "what it draws is set to zero"}),
    "cartridge": Facts("prefix", "attn", "modules", identity=False, merges=False, needs=("blocks",),
                       defaults={"num_virtual_tokens": 20}, small={"num_virtual_tokens": 3},
                       xfail={"padding_changes_nothing[t5]": DISTANCES}),
    "ia3": Facts(
        targets=("attn.k", "attn.v", "attn.qkv", "mlp.down"), named={"feedforward_modules": ("mlp.down",)},
        xfail={"other_seed_other_bits": "what it draws is set to one"},
    ),
    "lily": Facts(merges=False, per_row=False, xfail={
        "a_packed_row_is_its_examples": "its router is averaged over all tokens of the batch",
        **{
            f"padding_changes_nothing[{family}]": "its router is averaged over all tokens of the batch"
            for family in ("llama", "gpt2", "nf4", "int8", "tied")
        },
    }),
    "ln_tuning": Facts(
        targets=("norm.embed", "norm.attn", "norm.cross", "norm.mlp", "norm.block", "norm.final"), kinds="modules",
        needs=("blocks", "norms"), casts=False,
        xfail={"a_stack_runs_all": "the outer one's trained norms stand in the place of the inner one's"},
    ),
    "multitask_prompt_tuning": Facts("prompt", "embed", "matrices", identity=False, merges=False,
                                     needs=("token ids",), of_tasks=True, defaults={"num_virtual_tokens": 20},
                                     small={"num_virtual_tokens": 3, "num_tasks": 2},
                                     xfail={"padding_changes_nothing[t5]": DISTANCES}),
    "p_tuning": Facts("prompt", "embed", "matrices", identity=False, merges=False, needs=("token ids",),
                      defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
                      small={"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "poly": Facts(
        small={"r": 2, "n_skills": 2},
        targets=(
            "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down",
        ),
        merges=False, of_tasks=True, xfail={
            "compiles_whole": "its router looks at the task ids",
            "recomputation_keeps_gradients": "its router draws at every call while it trains",
            "resumes_to_the_same_bits": "its router draws at every call while it trains",
        },
    ),
    "prefix_tuning": Facts("prefix", "attn", "modules", identity=False, merges=False, needs=("blocks",),
                           defaults={"num_virtual_tokens": 20}, small={"num_virtual_tokens": 3}),
    "prompt_tuning": Facts("prompt", "embed", "matrices", identity=False, merges=False, needs=("token ids",),
                           defaults={"num_virtual_tokens": 20}, small={"num_virtual_tokens": 3}),
    "trainable_tokens": Facts(targets="embed", kinds="lookups", needs=("lookups",), tied=True,
                              defaults={"token_indices": (0, 1)}, small={"token_indices": tuple(range(10))},
                              xfail={"a_stack_runs_all": "the outer one's rows stand in the place of the inner one's"}),
}  # fmt: skip

# not reached, and why
REFUSED: dict[str, str] = {
    "cpt": "its loss is part of PEFT's own model class, with a mask of token types in every batch; "
    "peft:prompt_tuning trains the same virtual tokens on any objective",
    "shadow": "it runs a second backbone through hooks of PEFT's own model class; PEFT's get_peft_model runs it",
    "xlora": "it mixes LoRA adapters that are trained already; load them here and use Sum(a=0.5, b=0.5)",
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
