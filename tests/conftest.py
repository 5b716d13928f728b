"""Settings for the whole test session; they have to be in place before JAX is imported."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

# A few tests are for accelerators: JAXLM_TEST_PLATFORMS=cuda,cpu pytest tests/models -k cudnn
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXLM_TEST_PLATFORMS", "cpu")
# Eight fake devices for the sharding tests. Programs here are tiny: compiling them well would cost more than it saves.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # They make compiling twice as slow here; newer versions know nothing else, and have no such flag.
        *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib") < "0.11" else []),
    ]
)
# Results must come from this checkout's code, compiled now.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import HealthCheck, settings

# Tracing makes many objects that stay: looking through all of them again and again is a tenth of the time.
gc.set_threshold(50_000, 20, 50)

settings.register_profile("jaxlm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxlm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="write docs/models.md from what tests/models/test_matrix.py finds"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--matrix"):
        from tests.models.matrix import Matrix

        config.option.markexpr = ""  # the slow ones too
        config.pluginmanager.register(Matrix())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


# Every compiled program keeps some mappings of memory, and a process that has reached Linux's limit of 65,530
# (vm.max_map_count) ends in a segmentation fault. All programs of the suite together come near it.
MANY_MAPPINGS = 15_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs() -> Iterator[None]:
    """Forgets compiled programs behind a module, once there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.is_file() and len(mappings.read_bytes().splitlines()) > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
