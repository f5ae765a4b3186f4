"""The names of the files that scoring writes."""

PREDICTIONS = "predictions.h5ad"
REASONS = "unpredicted.json"  # beside it: the conditions that have no prediction, and why

SCORES = "scores.parquet"
UNPREDICTED = "unpredicted.parquet"  # the reasons of all folds of a model
MATCHED_CONTROLS = "matched_controls.parquet"
MISSING_GENES = "missing_genes.json"

CALIBRATION = "calibration.parquet"
