"""pegbox doctor"""

from __future__ import annotations


def doctor() -> None:
    """What this machine and installation can do: versions, cores, matrix units, optional packages."""
    import importlib.metadata
    import os
    import platform

    import torch
    from rich.table import Table

    from pegbox import __version__
    from pegbox.cli.console import console
    from pegbox.train.hardware import bf16_units

    table = Table("what", "found", show_header=False)
    table.add_row("pegbox", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("cores", f"{os.cpu_count()}, {torch.get_num_threads()} used by torch")
    table.add_row("accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row("bfloat16 matrix units", bf16_units() or "none: float32 is chosen by itself")
    for package in ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "bitsandbytes", "matplotlib"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        table.add_row(package, found)
    console().print(table)
