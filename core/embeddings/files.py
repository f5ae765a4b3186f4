"""The name of the file that holds an embedding."""

EMBEDDING = "embedding.parquet"
