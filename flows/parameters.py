"""Types of the parameters that flows share. Titles and descriptions are what the form of a run shows beside them.

The form of a deployment also offers the names of the catalog (deployments/forms.py). The types themselves take any
text, so that a flow that is called from Python or the command line takes the path of an entry of your own.
Descriptions are plain sentences: of Prefect's two user interfaces one renders Markdown and the other does not.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tasks import inputs

Dataset: TypeAlias = Annotated[
    str,
    Field(
        title="Data set",
        description="The data set of this deployment. Every other one has a deployment of its own.",
        examples=["demo", "norman19"],
    ),
]
Datasets: TypeAlias = Annotated[
    list[str],
    Field(
        title="Data sets",
        description="The data sets to work on, one after the other. None: all those of the study.",
        examples=[["norman19", "wessels23"]],
    ),
]
Models: TypeAlias = Annotated[
    list[str],
    Field(
        title="Models",
        description="The models to train. A group means all its models. The controls, the additive and the linear "
        "baseline need no training and are part of every benchmark.",
        examples=[["demo"], ["fmlp_reactome", "ridge_reactome"]],
    ),
]
BenchmarkedModels: TypeAlias = Annotated[
    list[str],
    Field(
        title="Models",
        description="The models to benchmark on each data set. A group means all its models. None: the metrics "
        "are calibrated, and no model is trained.",
        examples=[["demo"]],
    ),
]
Folds: TypeAlias = Annotated[
    Annotated[None, Field(title="as the catalog says")]
    | Annotated[int, Field(title="a number", ge=2)]
    | Annotated[Literal["leave-one-out"], Field(title="leave-one-out")],
    Field(
        title="Folds",
        description="Into how many parts the perturbations are divided. Each part is predicted by models that were "
        "trained without it.",
        examples=[None, 5, "leave-one-out"],
    ),
]
Seed: TypeAlias = Annotated[
    int,
    Field(
        title="Seed",
        description="Random seed of the models' training. The same seed gives the same results again.",
        ge=0,
        examples=[42],
    ),
]
Origin: TypeAlias = Annotated[
    inputs.Origin,
    Field(
        title="Origin of the data",
        description="raw: the file that the authors published. mirror: its preprocessed copy, with folds of its own. "
        "A file of yours comes before either.",
        examples=["raw"],
    ),
]
Sources: TypeAlias = Annotated[
    dict[str, str],
    Field(
        title="Files of yours",
        description="Paths of files to use instead of downloads, by the name of the data set or embedding, as the "
        "machine of the worker sees them.",
        examples=[{"norman19": "/data/norman19.h5ad"}],
    ),
]
Embedding: TypeAlias = Annotated[
    str,
    Field(
        title="Gene embedding",
        description="The embedding of this deployment, the same for all data sets.",
        examples=["reactome"],
    ),
]
