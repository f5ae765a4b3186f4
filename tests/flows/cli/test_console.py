"""What the terminal shows: complete, fitted to its width, marked without colour too."""

import io

import numpy as np
import pytest
from rich.console import Console

from core.errors import UserError
from flows.cli.console import make_error_panel, make_outcome_table, make_result_table, make_verdict_table
from flows.reproduce import Outcome
from tests.helpers.report_tables import build


def printed(renderable, width=100, color=False):
    console = Console(
        width=width, color_system="truecolor" if color else None, force_terminal=color, record=True, file=io.StringIO()
    )
    console.print(renderable)
    return console.export_text(styles=color)


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("models", [2, 20])
def test_every_model_and_metric_fits_in_the_width(models, width):
    board = build(models=models, metrics=17)["leaderboard"]
    text = printed(make_result_table(board, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for name in board["model"].unique():
        assert name in text
    # A mark for each of the 17 metrics and one in the legend.
    assert text.count("●") + text.count("○") == 17 + 2


def test_the_13_metrics_fit_in_one_table_of_100_columns():
    board = build(models=5)["leaderboard"]
    board["mean"] = board["mean"].clip(-0.5, 0.9)
    board.loc[board["rank"] == 1, "mean"] = board.loc[board["rank"] == 1, "mean"].abs()
    text = printed(make_result_table(board, 100))
    assert sum(line.startswith("dataset_mean") for line in text.splitlines()) == 1


def test_only_calibrated_metrics_have_a_best_model_and_others_are_dim():
    board = build(models=3)["leaderboard"]
    plain = printed(make_result_table(board, 200), 200)
    body = [line for line in plain.splitlines() if line.startswith(tuple(board["model"].unique()))]
    assert sum(line.count("*") for line in body) == int((board["rank"] == 1).sum())
    nothing = build(models=3, calibrated="none")["leaderboard"]
    assert "*" not in printed(make_result_table(nothing, 100))
    assert "\x1b[2m" in printed(make_result_table(nothing, 100), color=True)


def test_values_are_the_means_and_small_errors_are_in_thousandths():
    board = build(models=1, baselines=())["leaderboard"]
    text = printed(make_result_table(board, 200), 200)
    line = next(line for line in text.splitlines() if line.startswith("technical_duplicate"))
    mse = board.query("model == 'technical_duplicate' and metric == 'mse'")["mean"].item()
    assert float(line.split()[1]) == pytest.approx(mse * 1000, abs=1e-3)
    assert "10⁻³" in text


def test_nan_is_a_dash():
    board = build(models=1, baselines=(), all_nan=("nir",))["leaderboard"]
    lines = printed(make_result_table(board, 200), 200).splitlines()
    line = next(line for line in lines if line.startswith("fmlp_esm2"))
    assert line.split()[-1] == "–"
    assert "nan" not in "".join(lines)


def test_models_of_low_coverage_come_last_with_their_coverage():
    board = build(models=8, low_coverage=("gears",))["leaderboard"]
    names = [line for line in printed(make_result_table(board, 200), 200).splitlines() if line[:1].isalpha()]
    place = next(i for i, line in enumerate(names) if line.startswith("gears (61 %)"))
    assert place > next(i for i, line in enumerate(names) if line.startswith("sparse_mean"))


def test_why_nothing_has_a_star_is_said():
    """First of one is no rank."""
    alone = build(models=2, low_coverage=("gears",))["leaderboard"].assign(rank=np.nan)
    said = "no *: fewer than two models have values for 80% of the conditions"
    assert said in " ".join(printed(make_result_table(alone, 200), 200).split())
    assert said not in " ".join(printed(make_result_table(build(models=2)["leaderboard"], 200), 200).split())


def test_controls_alone():
    board = build(models=0, baselines=(), conditions=40)["leaderboard"]
    text = printed(make_result_table(board, 100))
    assert "technical_duplicate" in text
    assert "*" not in "".join(line for line in text.splitlines() if not line.startswith("●"))


@pytest.mark.parametrize("width", [80, 100])
def test_verdicts_fit_and_say_all(width):
    calibration = build(models=1, all_nan=("nir",))["calibration"]
    text = printed(make_verdict_table(calibration, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    quoted = calibration[calibration["variant"] == "drf_interpolated"].set_index("metric")
    for metric, row in quoted.iterrows():
        line = next(line for line in text.splitlines() if line.split()[:1] == [metric])
        assert (row["verdict"] if row["verdict"] != "none" else "no verdict") in line
        if np.isnan(row["drf"]):
            assert "–" in line
        else:
            assert f"{row['drf']:.2f}".replace("-", "−") in line
            assert f"{row['drf_low']:.2f} to".replace("-", "−") in line
    assert "nan" not in text


def test_a_number_that_does_not_fit_is_marked_as_cut():
    calibration = build(models=1)["calibration"]
    whole, narrow = (printed(make_verdict_table(calibration, 80), width) for width in (200, 55))
    numbers = set(whole.split())
    cut = [word for word in narrow.split() if word[0] in "−0123456789" and word not in numbers]
    assert cut, "nothing was cut"
    assert all(word.endswith("…") for word in cut), cut


def test_an_error_names_all_four_parts_and_markup_is_text():
    error = UserError("data/[bold]x.yaml", "labels.column", "no [red]such column", "name the column")
    text = printed(make_error_panel(error), 80)
    for part in ("data/[bold]x.yaml", "labels.column", "no [red]such column", "name the column"):
        assert part in text


def test_a_long_error_stays_on_one_screen():
    error = UserError("f.h5ad", "genes", ", ".join(f"GENE{i}" for i in range(5000)), "use other genes")
    text = printed(make_error_panel(error), 80)
    assert len(text.splitlines()) <= 24
    assert "use other genes" in text


@pytest.mark.parametrize("width", [80, 160])
def test_an_outcome_has_the_numbers_of_what_was_done_and_the_whole_reason_of_what_was_not(width):
    reason = (
        "https://zenodo.org/records/7041849/files/FrangiehIzar2021_RNA.h5ad, address: HTTP 404 (check [the] address)"
    )
    done = Outcome("replogle22k562gwps", "done", "", 1_234_567, 2_500, 8_300, 11)
    text = printed(make_outcome_table([done, Outcome("frangieh21", "could not be fetched", reason)]), width)
    assert max(map(len, text.splitlines())) <= width
    lines = [line.split() for line in text.splitlines()]
    assert ["replogle22k562gwps", "1,234,567", "2,500", "8,300", "11", "done"] in lines
    assert "".join(reason.split()) in "".join(text.split())
