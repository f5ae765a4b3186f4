"""Figures of the report: each module makes one figure from tables."""
