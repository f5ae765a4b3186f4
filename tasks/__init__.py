"""Prefect tasks: thin, retryable steps around core and blocks."""
