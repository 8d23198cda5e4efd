from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that lie beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data sets are not beside this checkout ({SHARED} does not exist)")
    return SHARED
