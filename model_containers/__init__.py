"""Models behind the contract: one folder per model."""
