"""Every method against every check of the public suite.  A new method adds one line to CASES."""

from __future__ import annotations

import pytest

from pegbox import checks, methods
from pegbox.checks import Case, Trial

WITH_MLP = ("llama", "gpt2", "bert", "t5", "vit", "nf4", "int8", "tied", "odd")  # that have mlp.up and mlp.down
AS_LORA = ("llama", "gpt2", "bert", "t5")  # of methods whose grafts are another's, which has all families
# of low-rank updates that are made in another way: at other kinds of sites docs/sites.md tries every method
LOW_RANK = (*AS_LORA, "nf4", "odd")

CASES = [
    Case("adaptformer", families=("llama", "gpt2", "t5", "vit", "nf4", "tied", "odd")),
    Case("adaptformer", families=("bert",)),  # whose MLP is no module
    Case("bat", {"rank": 4}),
    Case("bitfit"),
    Case("compacter", {"division": 2, "reduction": 4}),
    Case("compacter", {"division": 2, "reduction": 4, "factorized": False, "share": False}, families=("t5",)),
    Case("diffora", {"rank": 4, "alpha": 6.0}, families=AS_LORA),
    Case(
        "diffora",
        {"rank": 4, "alpha": 6.0, "chosen": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")},
        families=("llama",),
    ),
    Case("dora", {"rank": 4, "alpha": 6.0}),
    Case("dora", {"rank": 4, "alpha": 3.0, "start": "pissa"}, families=("llama", "gpt2")),
    Case("eva", {"rank": 4, "alpha": 6.0}, families=AS_LORA),
    Case("full"),
    Case("gradnormlorp", {"rank": 4, "alpha": 6.0, "projection_rank": 2}, families=AS_LORA),
    Case("gradnormlorp", {"mode": "full"}, families=("llama", "bert")),
    Case("ia3", families=WITH_MLP),
    Case("ia3", {"targets": "all-linear", "inputs": "fold"}, families=("mlp",)),
    Case("increlora", {"rank": 3, "step": 2, "alpha": 32.0}, families=LOW_RANK),
    Case("increlora", {"rank": 3, "first": 2, "reserve": False, "fixed_scale": True}, families=("llama", "bert")),
    Case("lisa", {"active": 1, "period": 2}),
    Case("ladder", {"reduction": 4, "heads": 2}),
    Case("lora", {"rank": 4, "alpha": 6.0}),
    Case("lora", {"rank": 4, "alpha": 3.0, "rslora": True, "b_rate": 16.0}, families=("llama",)),
    Case("lora", {"rank": 4, "alpha": 6.0, "start": "pissa"}, families=("llama", "gpt2", "odd")),
    Case("lora", {"rank": 4, "alpha": 6.0, "start": "olora", "rslora": True}, families=("llama",)),
    Case("lora_ga", {"rank": 4, "alpha": 3.0}, families=AS_LORA),
    Case("loldu", {"rank": 4, "alpha": 6.0}, families=LOW_RANK),
    Case("loldu", {"rank": 4, "alpha": 2.0, "start": "zeros"}, families=("llama",)),
    Case("meteora", {"targets": "all-linear", "ranks": (2, 3), "train": "all"}, families=LOW_RANK),
    Case("meteora", {"targets": "all-linear", "ranks": (2, 3, 2), "train": "all"}, families=("llama", "bert")),
    Case("mhr", {"rank": 2, "skills": 2, "heads": 2, "alpha": 6.0}, families=LOW_RANK),
    Case("mhr", {"rank": 4, "skills": 3, "heads": 2}, families=("llama", "gpt2")),
    Case("mhr", {"rank": 2, "train": "average", "heads": 1, "alpha": 6.0}, families=("llama",)),
    Case("miss", {"rank": 5}),
    Case("miss", {"rank": 8, "mini": 4}, families=("llama", "gpt2")),
    Case("mola", {"rank": 2, "alpha": 6.0, "experts": 2}),
    Case("mola", {"rank": 2, "alpha": 6.0, "experts": 3}, families=("llama", "gpt2", "vit", "nf4", "odd")),
    Case("mola", {"rank": 2, "alpha": 6.0, "experts": (1, 3), "top_k": 1}, families=("llama", "bert")),
    Case("mola", {"rank": 2, "alpha": 3.0, "start": "pissa"}, families=("llama",)),
    Case("monarch"),
    Case("monarch", {"blocks": 2, "rank": 3, "start": "random"}, families=("llama", "gpt2")),
    Case("more", {"blocks": 4, "rank": 2}),
    Case("mtlora", {"rank": 4, "scale": 1.5}, families=(*AS_LORA, "vit")),
    Case("nlora", {"rank": 4, "alpha": 6.0}, families=LOW_RANK),
    Case("nlora", {"rank": 4, "alpha": 6.0, "subtract": True, "rslora": True}, families=("llama", "gpt2", "odd")),
    Case("nlora", {"rank": 4, "alpha": 6.0, "start": "random"}, families=("llama", "bert")),
    Case("nlora", {"rank": 4, "alpha": 6.0, "train": "middle"}, families=("llama", "t5", "nf4")),
    Case("parallel", {"bottleneck": 4}, families=WITH_MLP),
    Case("parallel", {"targets": "all-linear", "bottleneck": 4}, families=("mlp", "unet")),
    Case("parallel", {"bottleneck": 4, "scale": 0.7, "activation": "identity", "learn_scale": True}, families=WITH_MLP),
    Case("p_tuning", {"tokens": 3, "hidden": 6}),
    Case("p_tuning", {"tokens": 3, "hidden": 6, "encoder": "lstm", "lstm_layers": 1}, families=("llama", "bert", "t5")),
    Case("p_tuning", {"tokens": 3, "encoder": "none"}, families=("llama",)),
    Case("prefix_tuning", {"tokens": 3}),
    Case("prefix_tuning", {"tokens": 3, "projection": True, "hidden": 6}, families=("llama", "gpt2", "bert", "vit")),
    Case("prefix_tuning", {"tokens": 3, "stacks": "decoder"}, families=("t5",)),
    Case("prompt_tuning", {"tokens": 3}),
    Case("s2ft", {"down": 0.25}),
    Case(
        "s2ft",
        {"down": 0.1, "up": 0.1, "out": 0.5, "v": 0.5, "choose": "weight"},
        families=("llama", "gpt2", "bert", "t5", "vit", "tied", "odd"),
    ),
    Case("scedit"),
    Case("scedit", {"down_ratio": 0.5, "use_layers": (0, 3)}, families=("unet",)),
    Case(
        "scedit",
        {"hints": ("edges",), "hint_channels": 1, "hint_width": 6, "hint_ratio": 0.25, "hint_halvings": 0},
        families=("unet",),
    ),
    Case("series", {"bottleneck": 4}),
    Case(
        methods.make("series", {"preset": "llm-adapters", "bottleneck": 4, "learn_scale": True, "bias": True}),
        families=("llama",),
    ),
    Case("triadaptlora", {"rank": 3, "first": 2, "alpha": 64.0}, families=LOW_RANK),
]

TRIALS = [trial for case in CASES for trial in checks.plan(case)]
DECLARED = [trial for trial in TRIALS if trial.reason is None]


@pytest.mark.parametrize("trial", DECLARED, ids=[f"{t.title}-{t.name}" for t in DECLARED])
def test_does_what_it_declares(trial: Trial) -> None:
    result = checks.attempt(trial)
    assert not result.bad, f"{result.status}: {result.message}\n{result.about}"


def test_every_method_has_a_line() -> None:
    assert {case.built().name() for case in CASES} == set(methods.names())


def test_every_check_applies_to_some_method() -> None:
    assert {trial.check.name for trial in DECLARED} == set(checks.CHECKS)


def test_what_does_not_apply_has_a_reason() -> None:
    """Few words that name a trait, a setting or what a family lacks; nothing is left out in silence."""
    reasons = {trial.reason for trial in TRIALS if trial.reason}
    words = ("traits.", "setting", "does not generate", "no gradient checkpointing", "not installed")
    assert all(any(word in reason for word in words) for reason in reasons), reasons
