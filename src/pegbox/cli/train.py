"""pegbox train"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "train",
    "pegbox.train.settings:RunSettings",
    builder="pegbox.train.settings:run_settings",
    needs=("model", "data"),
    groups={
        "what is tuned, on what, how": "model data method method_settings objective "
        "objective_settings also_train output",
        "the examples": "valid valid_share columns limit streaming strict template max_length truncation "
        "assistant_only packing",
        "the optimizer": "learning_rate epochs max_steps batch_size gradient_accumulation schedule warmup "
        "weight_decay max_grad_norm optimizer label_smoothing",
        "the machine": "dtype quantise gradient_checkpointing compile attention",
        "the run": "eval_steps save_steps keep best patience resume dry_run logging_steps report_to seed args",
    },
)


def run(context: typer.Context) -> None:
    """Tune a model on a file of examples: train model=... data=... method=lora method.rank=16 output=out/

    A recipe may come first (train recipe.yaml key=value); later values win.  method.KEY sets the method's own settings
    (`pegbox methods NAME` lists them), objective.KEY those of the objective (objective=dpo objective.beta=0.1),
    dry_run=true checks everything, shows the plan and stops before training.
    """
    settings = VERB.read(context)
    from pegbox.train.run import train

    train(settings)
