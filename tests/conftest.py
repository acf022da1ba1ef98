import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share tiny.py and the zoo


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written into the user's cache folder."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
