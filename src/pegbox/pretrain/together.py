"""Several processes of one run, as torchrun starts them: what the first does alone, and the others wait for.

They wait at the launcher's own store, not in a collective: those time out after half an hour, and cleaning a corpus may
take days.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from pegbox.core.errors import SettingsError
from pegbox.train.prepare import is_main

FOREVER = timedelta(days=365)


def alone(name: str, work: Callable[[], object]) -> None:
    """Do a piece of work in the first process; in the others, return once it is done there.

    The launcher ends them all where it fails.

    Args:
        name: of the piece, each of a run another.

    Raises:
        SettingsError: several processes that torchrun did not start.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        work()
        return
    store = _store()
    if is_main():
        work()
        store.set(name, "done")
    else:
        store.wait([name], FOREVER)


def _store() -> PrefixStore:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise SettingsError("several processes have to be started by torchrun or accelerate launch")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"pegbox/{attempt}", TCPStore(host, port, is_master=False, timeout=FOREVER))
