"""Every test starts from the same seed; uninitialised memory is NaN; CUDA tests skip where there is
none.
"""

from __future__ import annotations

import gc
import os
import sys
import types
from collections.abc import Iterator

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The tests already fill the cores: compilers that start processes of their own would wait for
# these.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch  # after the line above, which CUDA reads once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# A device that is not in use queues each seed with the text of the whole stack, once per kind of
# device: in the deep stack of pytest that takes milliseconds.
for device in (torch.cuda, torch.mtia, torch.xpu):
    device.traceback = types.SimpleNamespace(format_stack=list)

settings.register_profile(
    "revnet",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# For hours: `make fuzz`. Other programs each time, and a failure is tried again first.
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=100_000,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("revnet")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@given(st.none())
def registers_the_generator_of_hypothesis(nothing: None) -> None:
    pass


def pytest_collection_finish() -> None:
    # Hypothesis asks the collector who holds its generator, and sees no holder once frozen.
    registers_the_generator_of_hypothesis()
    # What has been imported stays: hundreds of collections in tests need not look at it again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds the generator and fills `torch.empty` with NaN (torch does so only with deterministic
    algorithms).
    """
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        # What other tests had compiled would count towards the limit of compilations of one
        # function.
        torch._dynamo.reset()
    # On CUDA the deterministic switch would also change which attention kernels may run.
    deterministic = "gpu" not in request.keywords
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Switches the cycle collector off: memory must go when the last reference goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def flags_of_cudnn_can_be_set() -> Iterator[None]:
    """Allow again what torch's own test tools, where a test imports them, forbid the process."""
    yield
    flags = torch.backends.disable_global_flags.__globals__
    flags["__allow_nonbracketed_mutation_flag"] = True
