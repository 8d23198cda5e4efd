"""pegbox check"""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    subjects: Annotated[list[str], typer.Argument(help="Names of methods, or method files (my_method.py).")],
    only: Annotated[str, typer.Option(help="Run these checks alone, separated by commas.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List what passed and what does not apply.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run the conformance suite on methods: check lora | check my_method.py.  Exit code 1 where something failed."""
    import json
    import sys

    from pegbox import checks

    def show(result: checks.Result) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{result.method}: {result.check} on {result.family}", end="", file=sys.stderr, flush=True)

    report = checks.run(subjects, only=[name for name in only.split(",") if name], on_result=show)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(json.dumps(report.as_data(), indent=2) if as_json else checks.render(report, verbose=verbose))
    if not report.ok:
        raise typer.Exit(1)
