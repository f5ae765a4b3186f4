"""Infrastructure that tasks use: artifact store, model engines, tracking, local services."""
