"""What commands do to their process before they begin."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli.start import importing

THREADS = """
import ctypes, sys, threading
from jaxlm.machine import limit_heaps
if sys.argv[1] == "one":
    limit_heaps()
libc, everybody, held = ctypes.CDLL(None), threading.Barrier(4), []
def work():
    held.append([bytearray(10_000) for _ in range(100)])
    everybody.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of Linux")
@pytest.mark.parametrize(("how", "own", "one"), [("one", None, True), ("many", None, False), ("one", "4", False)])
def test_threads_share_one_heap_unless_the_user_says_otherwise(how: str, own: str | None, one: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment |= {} if own is None else {"MALLOC_ARENA_MAX": own}
    call = [sys.executable, "-c", THREADS, how]
    text = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    assert text.count("<heap nr=") >= 1 and (text.count("<heap nr=") == 1) == one, text


LARGE = """
from jaxlm.machine import keep_freed_blocks
keep_freed_blocks()
block = bytearray(100 << 20)
(heap,) = [line.split()[0] for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
first, last = (int(place, 16) for place in heap.split("-"))
print(last - first >= 100 << 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of Linux")
@pytest.mark.parametrize("own", [None, "MALLOC_TOP_PAD_"])
def test_large_blocks_are_kept_in_the_heap_unless_the_user_says_otherwise(own: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {} if own is None else {own: "0"}
    text = subprocess.run([sys.executable, "-c", LARGE], env=environment, capture_output=True, text=True, check=True)
    assert text.stdout.strip() == str(own is None)


def test_imports_are_not_searched_for_garbage_and_later_objects_are() -> None:
    frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
        with pytest.raises(ImportError), importing():
            importlib.import_module("there_is_no_such_module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


CACHED = """
import sys
from pathlib import Path
import jax
from jax.experimental.compilation_cache import compilation_cache
from jaxlm.cli.start import use_compilation_cache

def start():
    jax.clear_caches()
    compilation_cache.reset_cache()
    use_compilation_cache(sys.argv[1], least_seconds=0.0)
    print(jax.jit(lambda x: x + 1)(1))
    (entry,) = Path(sys.argv[1]).glob("jit__lambda-*-cache")
    return entry

entry = start()
entry.write_bytes(entry.read_bytes()[: int(sys.argv[2])])
assert start() == entry
print(entry.stat().st_size > 500)
start()
"""


@pytest.mark.parametrize("left", [0, 500])
def test_a_compiled_program_that_was_cut_short_is_compiled_anew_once(tmp_path: Path, left: int) -> None:
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-c", CACHED, str(tmp_path), str(left)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2", "True", "2"]
    (entry,) = tmp_path.glob("jit__lambda-*-cache")
    # XLA may say there what it thinks of this processor.
    assert "Error reading" not in done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {entry}: this compiled program was cut short; it is removed, and compiled anew"]
