import os

# Tensors here are tiny: a second thread would only wait at barriers, in this process and in those
# that it starts. Libraries read this when they are loaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch
from hypothesis import settings
from support.kernel_library import folder, kernel, operators  # noqa: F401 (fixtures)

# No deadline: the machine may be busy. In CI the same examples every time, and a failing one can be
# replayed from what is printed.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Tests of the CPU kernel build their own; others must not depend on what this user has built.
os.environ["KVPOLICY_NATIVE"] = "0"

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out what is slow, what needs the CPU kernel to be compiled, and of a test with "
        "many parameters all but the first and the last",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    alike = {}
    for item in items:
        if not (item.get_closest_marker("slow") or "folder" in item.fixturenames):
            alike.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for each in alike.values() for item in (each[0], each[-1])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
