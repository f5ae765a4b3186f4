"""Deployments built from the catalog, and the local stack."""
