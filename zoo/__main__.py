"""All models of the zoo, one after the other: `python -m zoo [NAME ...]`, or `make zoo`.

Each goes on where it was broken off, and writes its folder once it meets its bars.  nano-unet is judged by nano-vit, so
the order is this one.
"""

from __future__ import annotations

import json
import sys

from zoo import clip, llama, unet, vit

BUILDERS = {builder.NAME: builder.build for builder in (llama, vit, unet, clip)}


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in BUILDERS]:
        raise SystemExit(f"the zoo makes no {unknown[0]!r}; expected some of {', '.join(BUILDERS)}")
    for name in names or BUILDERS:
        print(f"# {name}", flush=True)
        print(json.dumps(BUILDERS[name](), indent=1), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
