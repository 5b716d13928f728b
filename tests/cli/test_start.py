"""What commands set up before they begin."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxlm.cli.start import use_compilation_cache


def test_the_compilation_cache_is_the_named_one_then_the_environments_then_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    use_compilation_cache("none")
    assert settings == {}
    use_compilation_cache(None)
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "jaxlm" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    settings.clear()
    use_compilation_cache(None)
    assert settings == {}
    use_compilation_cache("named")
    assert settings["jax_compilation_cache_dir"] == "named"
