"""The thread rule for linear algebra, and the signs of components."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from core.arrays import fix_signs

SHOW = """
def threads():
    return sorted({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
"""
# numpy first: the variables that core sets come too late for it.
OVERLAP = """
import threading
import numpy, scipy.linalg
from threadpoolctl import threadpool_info
from core.arrays import limit_blas_threads
inside, leave = threading.Event(), threading.Event()
def other():
    with limit_blas_threads():
        inside.set()
        leave.wait(10)
thread = threading.Thread(target=other)
before = threads()
thread.start()
inside.wait(10)
with limit_blas_threads():
    leave.set()
    thread.join(10)
    print(before, threads())
"""
AT_IMPORT = """
import core
import numpy, scipy.linalg
from threadpoolctl import threadpool_info
print(threads())
"""


def printed(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW + code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_one_thread_lasts_until_the_last_of_overlapping_contexts() -> None:
    assert printed(OVERLAP) == "[2] [1]"


def test_importing_core_first_leaves_one_thread_whatever_the_environment_says() -> None:
    assert printed(AT_IMPORT) == "[1]"


def test_fixed_signs_make_the_largest_entry_positive() -> None:
    components = np.array([[1.0, -3.0, 2.0], [0.5, 0.4, -0.1]])
    assert fix_signs(components).tolist() == [[-1.0, 3.0, -2.0], [0.5, 0.4, -0.1]]
    assert fix_signs(-components).tolist() == fix_signs(components).tolist()
