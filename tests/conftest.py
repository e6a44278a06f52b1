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
