"""The report: what it says follows from the tables; it stands alone, whatever is missing."""

import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from core.report import tables as views
from core.report import text as words
from core.report.headline import compose_headline
from core.report.page import write_report
from tests.helpers.report_tables import build


class Page(HTMLParser):
    """Text, tags and addresses of a page; fails on unbalanced tags."""

    EMPTY = frozenset({"meta", "img", "br", "wbr", "link"})

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.words.append(data)
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, *start):
        """The cells of the first row that starts with these texts."""
        cells = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return next(row for row in cells if row[: len(start)] == list(start))


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without figures, for tests of what stands around them."""
    monkeypatch.setattr("core.report.page._draw_figures", lambda *_: {})


def page(tmp_path, tables):
    write_report(tmp_path / "report.html", **tables)
    return Page(tmp_path / "report.html")


CASES = {
    "8 models, 17 metrics": {"models": 8, "metrics": 17, "conditions": 40, "low_coverage": ("gears",)},
    "6 conditions": {"models": 1, "conditions": 6, "baselines": ()},
    "2 covariates": {"models": 2, "conditions": 12, "covariates": ("K562", "RPE1")},
    "calibration only": {"models": 0, "baselines": (), "conditions": 35},
    "nothing calibrated": {"models": 2, "conditions": 12, "calibrated": "none"},
    "a metric without values": {"models": 1, "conditions": 15, "all_nan": ("nir", "wmse")},
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_renders_and_stands_alone(case, tmp_path):
    tables = build(**CASES[case])
    result = page(tmp_path, tables)
    assert "script" not in result.tags
    outside = [a for a in result.addresses if not a.startswith(("#", "data:image/svg+xml;base64,"))]
    assert not outside
    assert not re.search(r"url\(|@import|https?://", result.source)
    assert not re.search(r"\bnan\b", result.text)
    for address in (a for a in result.addresses if a.startswith("#")):
        assert f'id="{address[1:]}"' in result.source
    files = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert {name.rpartition(".")[0] + ".png" for name in files} <= set(files)
    assert len(files) == 2 * result.tags.count("img")
    for metric in tables["calibration"]["metric"].unique():
        assert metric in result.text.replace("_ ", "_")


@pytest.mark.usefixtures("no_figures")  # test_figures.py compares theirs
def test_same_tables_give_the_same_bytes(tmp_path):
    def digests(folder):
        write_report(folder / "report.html", **build(models=1, conditions=15, covariates=("a", "b")))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.usefixtures("no_figures")
def test_text_from_files_is_escaped(tmp_path):
    tables = build(models=1, conditions=12)
    tables["dataset"].title = "<script>alert(1)</script>"
    tables["provenance"]["note"] = "<img src=x>"
    tables["declared"] = ["a < b & c"]
    source = page(tmp_path, tables).source
    assert "<script>" not in source
    assert "<img src=x>" not in source
    assert "a &lt; b &amp; c" in source


@pytest.mark.usefixtures("no_figures")
def test_nan_is_a_dash_and_zero_is_a_zero(tmp_path):
    tables = build(models=1, conditions=40, baselines=())
    board = tables["leaderboard"]
    board.loc[(board["model"] == "fmlp_esm2") & (board["metric"] == "nir"), "mean"] = 0.0
    result = page(tmp_path, tables)
    metrics = views.order_metrics(board)
    assert result.row("dataset_mean", "100 %")[2 + metrics.index("pearson_deltapert")] == "–"
    assert result.row("fmlp_esm2", "100 %")[2 + metrics.index("nir")].split() == ["0.000", "1"]


@pytest.mark.usefixtures("no_figures")
def test_leaderboard_puts_calibrated_metrics_first_and_low_coverage_last(tmp_path):
    tables = build(models=6, conditions=30, low_coverage=("gears",))
    board = tables["leaderboard"]
    result = page(tmp_path, tables)
    metrics = views.order_metrics(board)
    calibrated = views.list_ranked_metrics(board)
    assert metrics[: len(calibrated)] == calibrated
    row = result.row("gears", "61 %")
    wide = views.pivot_metrics(board, "mean")
    assert float(row[2].replace("−", "-")) == pytest.approx(wide.loc["gears", metrics[0]], abs=1e-4)
    assert len(row[2].split()) == 1  # no rank
    first = board[(board["metric"] == metrics[0]) & (board["rank"] == 1)]["model"].item()
    assert result.row(first, "100 %")[2].endswith("1")
    assert "Coverage below 80 %" in result.text
    names = list(views.list_entries(board)["model"])
    assert names[-1] == "gears"
    ranks = views.list_entries(board).set_index("model")["mean_rank"].dropna()
    assert list(ranks) == sorted(ranks)


@pytest.mark.usefixtures("no_figures")
def test_tests_show_own_negative_control_and_baselines_and_fold_the_rest(tmp_path):
    tables = build(models=1, conditions=40)
    result = page(tmp_path, tables)
    main, _, rest = result.source.partition("<details>")
    assert "vs dataset mean" in main
    assert "vs linear" in main
    assert "vs technical duplicate" not in main
    assert "vs technical duplicate" in rest
    row = result.row("vs dataset mean", "wmse")
    entry = tables["comparison"].query("control == 'dataset_mean' and metric == 'wmse' and stratum == 'all'").iloc[0]
    assert row[2] == f"{entry['n']}"
    assert float(row[3].split("[")[0].replace("−", "-")) == pytest.approx(entry["mean_difference"], abs=1e-3)


@pytest.mark.usefixtures("no_figures")
def test_what_was_not_predicted_is_listed_with_its_reason(tmp_path):
    tables = build(models=2, conditions=12)
    tables["unpredicted"] = pd.DataFrame(
        {"model": "gears", "covariate": "K562", "condition": ["B", "A"], "reason": "no embedding"}
    )
    assert page(tmp_path, tables).row("gears", "no embedding") == ["gears", "no embedding", "2", "A, B"]
    tables["unpredicted"] = tables["unpredicted"].iloc[:0]
    assert "All models predicted all test conditions" in page(tmp_path, tables).text


# The sentences at the top


def calibration_table(**verdicts):
    return pd.DataFrame(
        {
            "metric": list(verdicts),
            "variant": "drf_interpolated",
            "negative": ["control_mean" if "pert" in metric else "dataset_mean" for metric in verdicts],
            "verdict": list(verdicts.values()),
        }
    )


def board_table(calibrated, ranks=None, **kinds):
    rows = [
        {
            "model": model,
            "kind": kind.replace("_", " "),
            "metric": metric,
            "calibrated": True,
            "in_panel": True,
            "coverage": 1.0,
        }
        for model, kind in kinds.items()
        for metric in calibrated
    ] or [
        {"model": m, "kind": k, "metric": "mse", "calibrated": False, "in_panel": True, "coverage": 1.0}
        for m, k in kinds.items()
    ]
    table = pd.DataFrame(rows)
    return table.assign(rank=[(ranks or {}).get((row.model, row.metric), np.nan) for row in table.itertuples()])


def comparison_table(*rows):
    """Rows (model, control, metric, low, high, t_holm)."""
    table = pd.DataFrame(rows, columns=["model", "control", "metric", "low", "high", "t_holm"])
    return table.assign(stratum="all", n=20, mean_difference=(table["low"] + table["high"]) / 2)


def test_headline_names_verdicts_winners_losers_and_first_ranks():
    calibration = calibration_table(mse="calibrated", r2_deltapert="calibrated", nir="miscalibrated", pds="none")
    board = board_table(
        ["mse", "r2_deltapert"],
        {("a", "mse"): 1, ("linear", "r2_deltapert"): 1},
        a="model", b="model", linear="baseline", dataset_mean="negative_control",
    )  # fmt: skip
    comparison = comparison_table(
        ("a", "dataset_mean", "mse", 0.1, 0.3, 0.01),
        ("a", "control_mean", "r2_deltapert", 0.2, 0.4, 0.2),
        ("a", "dataset_mean", "r2_deltapert", -5.0, -4.0, 1.0),
        ("a", "linear", "mse", -0.1, 0.2, 0.5),
        ("b", "dataset_mean", "mse", -0.3, -0.1, 1.0),
        ("b", "control_mean", "r2_deltapert", -0.1, 0.1, 0.4),
        ("b", "linear", "mse", -0.1, 0.2, 0.5),
    )
    assert compose_headline("demo", calibration, board, comparison) == [
        "2 of 4 metrics are calibrated on demo: mse and r2_deltapert. The others: 1 miscalibrated (nir) and "
        "1 without a verdict, with fewer than 10 usable conditions (pds).",
        "1 of 2 models beats the negative control of a metric (the dataset mean or the control mean), with the whole "
        "95 % interval of the difference above zero, on at least one calibrated metric: a on all 2.",
        "Worse than it, with the whole interval below zero: b on 1 of 2.",
        "No model beats the linear baseline on any calibrated metric.",
        "Ranked first: a by mse; linear by r2_deltapert.",
    ]
    outcomes = views.tabulate_outcomes(comparison, calibration)
    assert outcomes.loc["a"].to_dict() == {"mse": "better, Holm", "r2_deltapert": "better"}
    assert outcomes.loc["b"].to_dict() == {"mse": "worse", "r2_deltapert": "undecided"}
    few = comparison.assign(n=comparison["n"].mask(comparison["model"] == "a", 9))
    assert "a" not in views.tabulate_outcomes(few, calibration).index


def test_headline_says_when_no_model_wins():
    calibration = calibration_table(mse="calibrated")
    board = board_table(["mse"], a="model", dataset_mean="negative_control")
    comparison = comparison_table(("a", "dataset_mean", "mse", -0.1, 0.2, 0.4))
    assert compose_headline("demo", calibration, board, comparison) == [
        "The only metric is calibrated on demo: mse.",
        "No model beats the dataset mean, with the whole 95 % interval of the difference above zero, on any calibrated "
        "metric.",
    ]


def test_headline_says_when_nothing_is_calibrated_or_no_model_was_scored():
    calibration = calibration_table(mse="inconclusive", nir="inconclusive")
    board = board_table([], a="model")
    assert compose_headline("demo", calibration, board, comparison_table()) == [
        "None of the 2 metrics is calibrated on demo: 2 inconclusive (mse, nir).",
        "Without a calibrated metric no model is ranked or called better than a control.",
    ]
    board = board_table([], dataset_mean="negative_control")
    assert "No model was scored" in compose_headline("demo", calibration, board, comparison_table())[1]


# The tables beneath


def test_ratios_use_the_quoted_half_split_and_leave_undefined_conditions_out():
    scores = pd.DataFrame(
        [
            ("m", "x", "A", 42, "wmse", 1.0),
            ("m", "x", "A", 43, "wmse", 100.0),
            ("m", "x", "B", 42, "wmse", np.nan),
            ("m", "x", "C", 42, "wmse", 3.0),
            ("m", "x", "C", 42, "mse", 9.0),
            ("dataset_mean", "x", "A", 42, "wmse", 2.0),
            ("dataset_mean", "x", "B", 42, "wmse", 2.0),
            ("dataset_mean", "x", "C", 42, "wmse", 2.0),
        ],
        columns=["model", "covariate", "condition", "half_seed", "metric", "value"],
    )
    quality = pd.DataFrame({"covariate": "x", "condition": ["A", "B", "C"], "n_degs": [0, 5, 100]})
    board = board_table(["mse"], m="model", dataset_mean="negative_control")
    ratios = views.compute_wmse_ratios(scores, board, quality)
    assert ratios.to_dict("list") == {
        "model": ["m", "m"],
        "covariate": ["x", "x"],
        "condition": ["A", "C"],
        "n_degs": [0, 100],
        "stratum": ["0", ">=100"],
        "ratio": [0.5, 1.5],
    }
    both = views.find_extremes(ratios)
    assert list(both["won"][0]["condition"]) == ["A"]
    assert list(both["lost"][0]["condition"]) == ["C"]


def test_quality_summary_leaves_control_out():
    quality = pd.DataFrame(
        {
            "covariate": ["x", "x", "x"],
            "condition": ["A", "B", "control"],
            "n_cells": [10, 30, 1000],
            "n_degs": [0, 4, np.nan],
            "edistance_to_control": [1.0, 3.0, 0.0],
        }
    )
    row = views.summarise_quality(quality).iloc[0]
    assert (row["conditions"], row["cells"], row["mean_cells"], row["mean_degs"]) == (2, 40, 20, 2)
    assert row["cv_cells"] == pytest.approx(np.std([10, 30], ddof=1) / 20)
    assert row["without_degs"] == 0.5
    assert row["median_edistance"] == 2.0


def test_strata_stand_beside_the_whole():
    table = comparison_table(("a", "c", "mse", 0.1, 0.3, 0.1), ("a", "c", "mse", 1.0, 3.0, 0.1)).assign(n=[7, 3])
    table["stratum"] = ["all", "10-99"]
    row = views.pivot_strata(table).iloc[0]
    assert (row["mean_difference"], row["difference_10-99"], row["n_10-99"]) == (0.2, 2.0, 3)
    assert np.isnan(row["difference_0"])


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [(np.nan, 2, "–"), (-0.001, 2, "0.00"), (-1.5, 1, "−1.5"), (12345.6, 2, "12,346"), (0.0, 3, "0.000")],
)
def test_numbers(value, places, text):
    assert words.format_number(value, places) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (0.004, "< 1 %"), (0.996, "> 99 %"), (1.0, "100 %"), (0.18, "18 %")]
)
def test_shares_are_never_rounded_to_none_or_all(value, text):
    assert words.format_share(value) == text


def test_decimals_give_three_digits():
    columns = [[0.0123], [5.0], [0.5], [np.nan], []]
    assert [words.choose_decimals(pd.Series(values, dtype=float)) for values in columns] == [4, 2, 3, 2, 2]
