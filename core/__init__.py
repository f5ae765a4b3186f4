"""The science: pure functions over arrays, tables and AnnData."""
