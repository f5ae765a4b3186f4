"""The catalog: its entries are sound, and a user's mistake is named with its remedy."""

import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import BaseModel

from blocks.config.catalog import open_catalog
from core.catalog import schema
from core.catalog.registry import Catalog
from core.entry import Entry
from core.errors import UserError
from core.prepare.labels import harmonise_labels
from core.simulate import SimulationSettings
from tests.helpers.entries import MINE

PROJECT = Path(__file__).parents[2]
LOCAL_FILES = {"papalexi21_panel": "papalexi21.h5ad", "norman19_small": "norman19_small.h5ad"}

SIMULATED = [name for name in Catalog().names("dataset") if Catalog().dataset(name).source.kind == "simulated"]


@pytest.fixture(autouse=True)
def _no_entries_of_the_user(monkeypatch):
    monkeypatch.delenv("CALIPERT_CATALOG", raising=False)


@pytest.fixture
def write(tmp_path):
    def write(text, path="mine.yaml"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return file

    return write


@pytest.fixture
def users(tmp_path, monkeypatch, write):
    """Writes entries into a folder that CALIPERT_CATALOG names."""
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    return write


# The built-in entries


@pytest.mark.parametrize("name", open_catalog().names("dataset"))
def test_every_data_set_says_whose_it_is(name):
    spec = open_catalog().dataset(name)
    assert spec.name == name
    assert "not stated" not in (spec.licence, spec.citation)


def test_the_catalog_holds_the_fourteen_screens_of_the_study():
    combinations = {"norman19", "sunshine23", "wessels23"}
    singles = {
        *("adamson16", "frangieh21", "kaden25fibroblast", "kaden25rpe1", "nadig25hepg2", "nadig25jurkat"),
        *("replogle22k562", "replogle22k562gwps", "replogle22rpe1", "tian21crispra", "tian21crispri"),
    }
    specs = {name: open_catalog().dataset(name) for name in combinations | singles}
    assert {name for name, spec in specs.items() if spec.task == "combination"} == combinations
    assert all(spec.source.kind == "https" for spec in specs.values())
    assert len({spec.source.url for spec in specs.values() if isinstance(spec.source, schema.HttpsSource)}) == 14
    mirrors = {name: open_catalog().dataset(name).mirror for name in open_catalog().names("dataset")}
    for name, mirror in mirrors.items():
        if name in specs:
            key = f"cellsimbench-data/data/{name}/{name}_processed_complete.h5ad"
            assert isinstance(mirror, schema.S3Source)
            assert (mirror.kind, mirror.anonymous) == ("s3", True)
            assert mirror.url == f"s3://public-access-bucket-i9sdj34j/{key}"
        else:
            # `calipert reproduce` takes whatever has a mirror for a data set of the study.
            assert mirror is None


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("adamson16", {"SPI1_pDS255": "SPI1", "62(mod)_pBA581": "control", "HSPA5_pDS017": "HSPA5"}),
        ("frangieh21", {"B2M": "B2M", "control": "control"}),
        ("kaden25rpe1", {"KLF4": "KLF4", "non": "control"}),
        ("nadig25jurkat", {"MYC": "MYC", "non-targeting": "control"}),
        ("sunshine23", {"ACE2_TP53": "ACE2+TP53", "ACE2": "ACE2", "control": "control"}),
        ("wessels23", {"CD55_CD46": "CD46+CD55", "control": "control"}),
    ],
)
def test_published_labels_are_read(name, labels):
    spec = open_catalog().dataset(name)
    assert list(harmonise_labels(pd.Series(list(labels)), spec.labels, name)) == list(labels.values())


def test_the_genome_wide_screen_is_sampled():
    sample = open_catalog().dataset("replogle22k562gwps").sample
    assert sample is not None
    assert sample.conditions == 2500
    assert len(sample.priority) == len(set(sample.priority)) == 93
    assert {"NANOG", "CTCF", "E2F4"} < set(sample.priority)


@pytest.mark.parametrize("name", open_catalog().names("embedding"))
def test_every_embedding_says_whose_it_is(name):
    spec = open_catalog().embedding(name)
    assert spec.name == name
    assert "not stated" not in (spec.licence, spec.citation)


def settings_of(name: str) -> dict[str, Any]:
    source = open_catalog().dataset(name).source
    assert isinstance(source, schema.SimulatedSource)
    return source.settings


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_settings_are_the_simulators(name):
    settings = settings_of(name)
    assert SimulationSettings(**settings).model_dump(include=set(settings), mode="json") == settings


def test_demo_is_what_the_simulator_makes_by_default():
    assert settings_of("demo") == {}


@pytest.mark.parametrize("name", open_catalog().names("group"))
def test_every_group_holds_known_models(name):
    assert open_catalog().models([name])


def test_a_template_gives_one_model_per_embedding():
    ridges = [name for name in open_catalog().names("model") if open_catalog().model(name).template == "ridge"]
    tables = [name for name in open_catalog().names("embedding") if open_catalog().embedding(name).form == "table"]
    assert ridges == [f"ridge_{embedding}" for embedding in tables]
    assert {"reactome", "coexpression"} <= set(tables)
    ridge = open_catalog().model("ridge_reactome")
    assert ridge.embedding == open_catalog().embedding("reactome")
    assert ridge.hyperparameters == {"alphas": [0.1, 1, 10]}
    assert ridge.container == "ridge"


def test_a_model_without_embedding_stands_for_itself():
    linear = open_catalog().model("linear")
    assert (linear.template, linear.embedding, linear.container) == ("linear", None, None)


def test_groups_are_expanded_in_order_and_models_named_once():
    names = [model.name for model in open_catalog().models(["linear", "demo", "ridge_coexpression", "simple"])]
    assert names[:3] == ["linear", "fmlp_coexpression", "ridge_coexpression"]
    assert len(names) == len(set(names))
    assert {"additive", "knn_reactome", "ridge_reactome"} <= set(names)


def test_base_has_four_models_and_one_with_four_embeddings():
    models = open_catalog().models(["base"])
    assert [model.template for model in models] == ["gears", "scgpt", "sclambda", "presage", *["fmlp"] * 4]
    embeddings = [model.embedding.name for model in models if model.template == "fmlp" and model.embedding]
    assert embeddings == ["esm2", "geneformer", "scgpt", "genept"]


def test_what_is_done_to_an_entry_does_not_reach_the_next_reader():
    alphas = open_catalog().model("ridge_reactome").hyperparameters["alphas"]
    assert isinstance(alphas, list)
    alphas.append(100)
    open_catalog().models(["demo"])[0].hyperparameters["epochs"] = 1
    settings_of("demo_covariates").clear()
    assert open_catalog().model("ridge_reactome").hyperparameters == {"alphas": [0.1, 1, 10]}
    assert open_catalog().models(["demo"])[0].hyperparameters["epochs"] == 100
    assert settings_of("demo_covariates")


def test_an_entry_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        open_catalog().dataset("demo").seed = 1


def test_combinations_have_two_folds_and_singles_five():
    assert open_catalog().dataset("norman19").folds == 2
    assert open_catalog().dataset("papalexi21").folds == 5


def test_reading_the_catalog_needs_no_heavy_import():
    code = "import sys, core.catalog.registry as c; c.Catalog().models(['demo']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "core.catalog.registry" in loaded
    assert not {"scanpy", "anndata", "pandas", "scipy", "numpy"} & set(loaded)


@pytest.mark.shared
@pytest.mark.parametrize("name", LOCAL_FILES)
def test_local_entries_fit_their_files(shared, name):
    spec = open_catalog().dataset(name)
    file = ad.read_h5ad(shared / "data" / LOCAL_FILES[name])
    conditions = set(harmonise_labels(file.obs[spec.labels.column], spec.labels, name)) - {"control"}
    assert spec.expected is not None
    assert (file.n_obs, file.n_vars, len(conditions)) == (
        spec.expected.cells,
        spec.expected.genes,
        spec.expected.conditions,
    )
    # What the comments of the entries say: the default floor would drop every cell.
    genes = np.diff(file.X.indptr)
    assert np.median(genes) == {"papalexi21_panel": 66, "norman19_small": 15}[name]
    assert genes.max() < type(spec).model_fields["min_genes_per_cell"].default
    if spec.library_size is not None:
        assert (file.obs[spec.library_size] > np.asarray(file.X.sum(axis=1)).ravel()).all()


@pytest.mark.shared
def test_guide_labels_of_papalexi21_become_their_targets(shared):
    cells = ad.read_h5ad(shared / "data" / "papalexi21.h5ad").obs
    perturbed = cells[cells["perturbation"] != "control"]
    conditions = harmonise_labels(perturbed["guide"], open_catalog().dataset("papalexi21").labels, "papalexi21")
    assert (conditions == perturbed["perturbation"].astype(str)).all()


# Names that are not there


@pytest.mark.parametrize(
    ("lookup", "name", "near"),
    [
        (open_catalog().dataset, "papalexi", "papalexi21"),
        (open_catalog().dataset, "../demo", "demo"),
        (open_catalog().embedding, "reactom", "reactome"),
        (open_catalog().model, "ridge", "ridge_esm2"),
        (lambda name: open_catalog().models(["demo", name]), "fmlp_reactom", "fmlp_reactome"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(lookup, name, near):
    with pytest.raises(UserError) as error:
        lookup(name)
    assert name in error.value.found
    assert error.value.remedy.startswith("did you mean")
    assert near in error.value.remedy.split("known:")[0]


def test_an_unknown_name_like_no_other_lists_all():
    with pytest.raises(UserError) as error:
        open_catalog().dataset("zzz")
    assert error.value.remedy == f"known: {', '.join(open_catalog().names('dataset'))}"


# A data set of the user's own


def test_a_users_entry_gets_the_defaults(write):
    spec = open_catalog().dataset(write(MINE))
    assert spec.name == "mine"
    assert (spec.folds, spec.min_genes_per_cell, spec.max_control_cells, spec.seed) == (5, 200, 8192, 42)
    assert open_catalog().dataset(str(write(MINE, "again.yml"))) == spec


def test_the_example_of_the_guide_is_a_valid_entry():
    spec = open_catalog().dataset(PROJECT / "docs" / "your-data.yaml")
    assert spec.labels.control == ("non-targeting", "safe-harbour")


@pytest.mark.parametrize(
    ("change", "field", "found", "remedy"),
    [
        ({"name": "../mine"}, "name", "'../mine'", "^[a-z0-9][a-z0-9_]*$"),
        ({"name": "a" * 65}, "name", "aaa", "at most 64"),
        ({"title": ""}, "title", "''", "at least 1"),
        ({"task": "pairs"}, "task", "'pairs'", "'single' or 'combination'"),
        ({"source": {"kind": "ftp"}}, "source", "ftp", "'https', 's3', 'local', 'simulated'"),
        ({"source": {"hint": "x"}}, "source", "hint", "kind"),
        ({"source": {"kind": "https", "url": "http://a.b/c"}}, "source.url", "http://a.b/c", "^https://"),
        ({"source": {"kind": "https", "url": "https:///c"}}, "source.url", "https:///c", "an address has a host"),
        (
            {"source": {"kind": "https", "url": "https://a.b/c", "sha256": "12"}},
            "source.sha256",
            "'12'",
            "pattern",
        ),
        ({"source": {"kind": "local"}}, "source.hint", "nothing", "add it"),
        ({"source": {"kind": "simulated", "settings": {"loading": "1e-3"}}}, "source.settings", "1e-3", "1.0e-3"),
        ({"labels": {"colum": "guide"}}, "labels.column", "nothing", "add it; 1 more"),
        ({"labels": {"column": "guide", "seperator": "_"}}, "labels.seperator", "unknown field", "'separator'"),
        ({"labels": {"column": "guide", "control": "NT"}}, "labels.control", "'NT'", "tuple"),
        ({"labels": {"column": "guide", "control": [False]}}, "labels.control[0]", "False", "string"),
        ({"labels": {"column": "guide", "control_contains": ""}}, "labels.control_contains", "''", "at least 1"),
        ({"filters": [{"column": "n", "op": ">", "value": 1}]}, "filters[0].op", "'>'", "'>='"),
        ({"filters": [{"column": "n", "op": "in", "value": 1}]}, "filters[0]", "'in'", "list of values"),
        ({"filters": [{"column": "n", "op": "==", "value": [1]}]}, "filters[0]", "'=='", "single value"),
        ({"filters": [{"column": "n", "op": ">=", "value": "5"}]}, "filters[0]", "'5'", "takes a number"),
        ({"covariate": "a|b"}, "covariate", "a|b", "pattern"),
        ({"seed": True}, "seed", "True", "valid integer"),
        ({"seed": -1}, "seed", "-1", "greater than or equal to 0"),
        ({"target_sum": "1e4"}, "target_sum", "1e4", "valid number"),
        ({"folds": 1}, "folds", "1", "greater than or equal to 2"),
        ({"folds": "all"}, "folds", "'all'", "valid integer"),
        ({"task": "combination", "folds": 5}, "entry", "mine", "always 2"),
        ({"half_seeds": 0}, "half_seeds", "0", "greater than or equal to 1"),
        ({"expected": {"cells": 10}}, "expected.genes", "nothing", "add it"),
        ({"nonsense": 1}, "nonsense", "unknown field", "take it out"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_remedy(write, change, field, found, remedy):
    path = write({**MINE, **change})
    with pytest.raises(UserError) as error:
        open_catalog().dataset(path)
    assert error.value.where == str(path)
    assert error.value.field == field
    assert found in error.value.found
    assert remedy in error.value.remedy
    assert "docs/catalog.md" in error.value.remedy


@pytest.mark.parametrize("field", ["name", "title", "task", "source", "labels"])
def test_a_missing_field_is_named(write, field):
    with pytest.raises(UserError) as error:
        open_catalog().dataset(write({key: value for key, value in MINE.items() if key != field}))
    assert (error.value.field, error.value.found) == (field, "nothing")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "NoneType, not a mapping"),
        (b"- a\n- b\n", "list, not a mapping"),
        (b"name: [", "not readable as YAML"),
        (b"name: 2026-13-45\n", "not readable as YAML"),
        (b"name: \xff\xfe\n", "not readable as YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path, content, found):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_catalog().dataset(path)
    assert (error.value.where, error.value.field) == (str(path), "format")
    assert error.value.found.startswith(found)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file") as error:
        open_catalog().dataset(tmp_path / "mine.yaml")
    assert error.value.where.endswith("mine.yaml")


def test_a_users_data_set_cannot_take_a_name_of_the_catalog(write):
    with pytest.raises(UserError, match="a data set of the catalog"):
        open_catalog().dataset(write({**MINE, "name": "norman19"}))
    assert open_catalog().dataset(PROJECT / "core" / "catalog" / "datasets" / "demo.yaml") == open_catalog().dataset(
        "demo"
    )


# The user's folder of entries


def test_a_users_folder_adds_entries(users):
    users(MINE, "datasets/mine.yaml")
    users({"name": "atlas", "title": "atlas", "kind": "gmt", "dimensions": 8,
           "source": {"kind": "local", "hint": "atlas.gmt"}}, "embeddings/atlas.yml")  # fmt: skip
    users({"name": "mean", "title": "mean", "container": "mean"}, "models/mean.yaml")
    users({"name": "ours", "title": "ours", "models": ["mean", "ridge_atlas"]}, "groups/ours.yaml")
    assert open_catalog().dataset("mine").title == "my screen"
    assert {"mean", "fmlp_atlas", "knn_atlas", "ridge_atlas"} <= set(open_catalog().names("model"))
    assert [model.name for model in open_catalog().models(["ours"])] == ["mean", "ridge_atlas"]
    assert {"mine", "norman19"} <= set(open_catalog().names("dataset"))


def test_without_the_variable_the_users_entries_are_gone(users, monkeypatch):
    users(MINE, "datasets/mine.yaml")
    assert "mine" in open_catalog().names("dataset")
    monkeypatch.delenv("CALIPERT_CATALOG")
    assert "mine" not in open_catalog().names("dataset")


@pytest.mark.parametrize(
    ("kind", "name"), [("dataset", "demo"), ("embedding", "reactome"), ("model", "linear"), ("group", "simple")]
)
def test_a_users_entry_cannot_shadow_one_of_the_catalog(users, kind, name):
    users({"name": name, "title": "mine"}, f"{kind}s/{name}.yaml")
    with pytest.raises(UserError, match="the catalog already has"):
        open_catalog().names(kind)


@pytest.mark.parametrize("name", ["demo", "ridge_reactome"])
def test_a_model_cannot_have_the_name_of_a_group_or_of_another_model(users, name):
    users({"name": name, "title": "mine"}, f"models/{name}.yaml")
    with pytest.raises(UserError, match="is also"):
        open_catalog().names("model")


def test_a_model_cannot_have_the_name_of_a_control(users):
    users({"name": "dataset_mean", "title": "mine"}, "models/dataset_mean.yaml")
    with pytest.raises(UserError, match="name of a control"):
        open_catalog().models(["linear"])


def test_file_and_entry_have_one_name(users):
    users(MINE, "datasets/other.yaml")
    with pytest.raises(UserError, match=r"write `name: other`, or rename the file to mine\.yaml"):
        open_catalog().dataset("other")


def test_a_group_with_an_unknown_model_is_named(users):
    path = users({"name": "ours", "title": "ours", "models": ["linear", "ridge_reactom"]}, "groups/ours.yaml")
    with pytest.raises(UserError, match="ridge_reactome") as error:
        open_catalog().models(["ours"])
    assert error.value.where == str(path)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"kind": "gmt"}, "needs `source`"),
        ({"kind": "gmt", "per_fold": True, "source": {"kind": "local", "hint": "x"}}, "has no `per_fold`"),
        ({"kind": "coexpression"}, "needs `per_fold`"),
        ({"kind": "coexpression", "per_fold": True, "source": {"kind": "local", "hint": "x"}}, "no `source`"),
        ({"kind": "graph"}, "needs `source`"),
        ({"kind": "gmt", "dimensions": None, "source": {"kind": "local", "hint": "x"}}, "needs `dimensions`"),
        ({"kind": "graph", "parts": ["reactome"], "source": {"kind": "local", "hint": "x"}}, "has no `parts`"),
        ({"kind": "several", "parts": ["reactome", "coexpression"]}, "has no `dimensions`"),
        ({"kind": "several", "dimensions": None, "parts": ["reactome"]}, "two or more `parts`"),
        ({"kind": "several", "dimensions": None, "parts": ["reactome", "reactome"]}, "each once"),
    ],
)
def test_an_embedding_fits_its_kind(users, change, remedy):
    users({"name": "mine", "title": "mine", "dimensions": 4, **change}, "embeddings/mine.yaml")
    with pytest.raises(UserError) as error:
        open_catalog().embedding("mine")
    assert remedy in error.value.remedy


@pytest.mark.parametrize(
    ("change", "found", "remedy"),
    [
        ({"parts": ["reactome", "coexpresion"]}, "coexpresion", "did you mean coexpression"),
        ({"parts": ["reactome", "go"]}, "no single table", "one table each"),
        ({"parts": ["reactome", "coexpression"]}, "false", "true: it is made for each fold"),
        ({"parts": ["reactome", "atlas"], "per_fold": True}, "true", "false: it is made for all folds"),
    ],
)
def test_parts_of_several_are_tables_of_the_catalog(users, change, found, remedy):
    atlas = {"kind": "gmt", "dimensions": 4, "source": {"kind": "local", "hint": "atlas.gmt"}}
    users({"name": "atlas", "title": "atlas", **atlas}, "embeddings/atlas.yaml")
    users({"name": "mine", "title": "mine", "kind": "several", **change}, "embeddings/mine.yaml")
    with pytest.raises(UserError) as error:
        open_catalog().embedding("mine")
    assert found in error.value.found
    assert remedy in error.value.remedy


TABLES = {"coexpression", "esm2", "esm2_3b", "geneformer", "genept", "reactome", "scgpt"}


@pytest.mark.parametrize(
    ("takes", "given"),
    [(True, TABLES), ("tables", TABLES | {"knowledge"}), ("graph", {"go"})],
)
def test_a_template_is_joined_with_what_it_takes(users, takes, given):
    users({"name": "mine", "title": "mine", "container": "mine", "embedding": takes}, "models/mine.yaml")
    mine = [open_catalog().model(name) for name in open_catalog().names("model") if name.startswith("mine")]
    embeddings = [model.embedding for model in mine if model.embedding]
    assert len(embeddings) == len(mine)
    assert {embedding.name for embedding in embeddings} == given
    assert all(embedding == open_catalog().embedding(embedding.name) for embedding in embeddings)


def test_a_file_is_named_for_one_entry_alone(users):
    """`--source mine=` would be the sets of the one or the folder of the other."""
    address = {"kind": "https", "url": "https://example.org/mine"}
    users({"name": "mine", "title": "mine", "kind": "gmt", "dimensions": 2, "source": address}, "embeddings/mine.yaml")
    assert open_catalog().embedding("mine").name == "mine"
    users({"name": "mine", "title": "mine", "files": {"a": address}}, "pretrained/mine.yaml")
    with pytest.raises(UserError, match=r"'mine', which published files have too .*pretrained/mine.yaml"):
        open_catalog().embedding("mine")


def test_parts_are_what_an_embedding_is_made_of():
    knowledge = open_catalog().embedding("knowledge")
    assert open_catalog().parts(knowledge) == [
        open_catalog().embedding("reactome"),
        open_catalog().embedding("coexpression"),
    ]
    assert open_catalog().parts(open_catalog().embedding("go")) == [open_catalog().embedding("go")]


def test_the_variable_must_name_a_folder_of_entries(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="sub-folders datasets, embeddings, models, groups, pretrained"):
        open_catalog().names("dataset")


# The guide


def test_the_guide_explains_every_field_and_no_other():
    guide = (PROJECT / "docs" / "catalog.md").read_text()
    first_cells = [cell.strip() for line in guide.splitlines() if line.startswith("|") for cell in line.split("|")[1:3]]
    explained = {match.group(1) for cell in first_cells if (match := re.fullmatch(r"`(\w+)`", cell))}
    entries: set[type[BaseModel]] = {schema.DatasetSpec, *Entry.__subclasses__()}
    entries -= {schema.ResolvedModel}
    assert explained == {field for entry in entries for field in entry.model_fields} | {
        "https",
        "s3",
        "local",
        "simulated",
    }


def test_the_guide_gives_the_defaults():
    guide = (PROJECT / "docs" / "catalog.md").read_text()
    for name, field in schema.DatasetSpec.model_fields.items():
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            row = next(line for line in guide.splitlines() if line.startswith(f"| `{name}` |"))
            assert row.rstrip(" |").endswith(f"| {field.default}")


def test_names_that_a_model_may_not_have_are_those_of_the_controls() -> None:
    from core.catalog import schema
    from core.reference import controls

    assert {control.name for control in controls.CONTROLS if control.role != "baseline"} == schema.NO_MODELS


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "https", "url": "https://me:s3cr3t@example.org/x.h5ad"},
        {"kind": "s3", "url": "s3://bucket/x.h5ad", "endpoint": "http://me:s3cr3t@127.0.0.1:9000"},
        {"kind": "https", "url": "http://me:s3cr3t@example.org/x.h5ad"},
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(write, source) -> None:
    with pytest.raises(UserError) as caught:
        open_catalog().dataset(write(MINE | {"source": source}))
    told = "".join(traceback.format_exception(caught.value))
    assert "s3cr3t" not in told
    assert "source" in told


def test_an_at_sign_in_the_path_of_an_address_is_no_password(write) -> None:
    source = {"kind": "https", "url": "https://example.org/x@2.h5ad"}
    found = open_catalog().dataset(write(MINE | {"source": source})).source
    assert isinstance(found, schema.HttpsSource)
    assert found.url == source["url"]
