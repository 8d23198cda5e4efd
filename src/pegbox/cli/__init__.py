"""The command line: `pegbox VERB key=value ...`, one file per verb.

Nothing heavy is imported until a command runs, so that `pegbox --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from pegbox.core.errors import PegboxError

INTERRUPTED = 130  # as shells report Ctrl-C
NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")  # what they say of kernels that they lack on being imported


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line on standard error and exit code 2, no traceback.

    Args:
        words: what follows `pegbox`; from the process if None.
    """
    from pegbox.cli.app import USAGE_ERRORS, app

    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = app(None if words is None else list(words), standalone_mode=False)
    except PegboxError as error:
        _fail(str(error), 2)
    except USAGE_ERRORS as error:
        if (message := error.format_message()).startswith("Usage:"):  # a group of verbs without one: its help
            print(message, file=sys.stderr)
            raise SystemExit(2) from None
        _fail(message, 2)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        raise SystemExit(0) from None
    if code == INTERRUPTED:  # typer turns Ctrl-C into a code
        _fail("interrupted", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}" if code == 2 else message, file=sys.stderr)
    raise SystemExit(code) from None
