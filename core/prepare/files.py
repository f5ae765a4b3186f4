"""The names of the files that preparation writes.

Each stage has a module of names of its own, so that a new name in one recomputes nothing of the others.
"""

CELLS = "cells.h5ad"
FOLD_CELLS = "train.h5ad"  # of the splits train and val
FOLD_CONTROL = "control.h5ad"  # the control cells of the split train
