import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share tiny.py and the zoo
# diffusers copies the pipeline files of loaded folders there, by name: test processes must not share it.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written into the user's cache folder."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
