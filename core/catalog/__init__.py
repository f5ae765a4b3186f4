"""The catalog: data sets, embeddings, models, groups and published files, one YAML file each (docs/catalog.md)."""

from core.catalog.registry import dataset, embedding, group, model, models, names, parts, pretrained, users_folder
from core.catalog.schema import DatasetSpec, EmbeddingSpec, GroupSpec, ModelSpec, PretrainedSpec, ResolvedModel

__all__ = [
    "DatasetSpec",
    "EmbeddingSpec",
    "GroupSpec",
    "ModelSpec",
    "PretrainedSpec",
    "ResolvedModel",
    "dataset",
    "embedding",
    "group",
    "model",
    "models",
    "names",
    "parts",
    "pretrained",
    "users_folder",
]
