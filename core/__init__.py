"""The science: pure functions over arrays, tables and AnnData."""

import os

# The last bits of a matrix product or a decomposition change with BLAS's number of threads, and this number is the
# whole process's: only set before numpy loads its BLAS does it hold in every thread. Work is spread over blocks of
# rows instead (core.scoring.evaluation) and over processes (models). core.arrays.limit_blas_threads serves where numpy
# was first.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
