"""The names of the files that preparation writes. (One module of names per stage: a new name recomputes no other.)"""

CELLS = "cells.h5ad"
FOLD_CELLS = "train.h5ad"  # of the splits train and val
FOLD_CONTROL = "control.h5ad"  # the control cells of the split train
