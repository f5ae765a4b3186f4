"""Figures: they say what the tables say, at any size, and are the same bytes every time."""

from itertools import chain, pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from core.report.figures import style
from core.report.figures.conditions import draw_conditions
from core.report.figures.dynamic_range import draw_dynamic_range
from core.report.figures.edistance import draw_edistance, order_conditions
from core.report.figures.headroom import draw_headroom
from core.report.figures.per_condition import draw_per_condition
from core.report.tables import compute_wmse_ratios, list_ranked_metrics
from tests.helpers.report_tables import build

SIZES = {
    "one model, 12 conditions": {"models": 1, "conditions": 12, "baselines": ()},
    "20 models, 17 metrics": {"models": 20, "conditions": 200, "metrics": 17, "low_coverage": ("zeta",)},
}


def drawn(tables):
    """All figures of a set of tables, by name."""
    ratios = compute_wmse_ratios(tables["scores"], tables["leaderboard"], tables["quality"])
    return {
        "dynamic_range": draw_dynamic_range(tables["calibration"]),
        "headroom": draw_headroom(tables["leaderboard"]),
        "per_condition": draw_per_condition(ratios),
        "conditions": draw_conditions(tables["quality"]),
        "edistance": draw_edistance(next(iter(tables["edistance"].values()))),
    }


@pytest.fixture(scope="module", params=SIZES)
def laid_out(request):
    """Figures of one size after drawing, with a renderer that measures text: (name, figure, renderer)."""
    figures = []
    for name, figure in drawn(build(**SIZES[request.param])).items():
        with style.apply_look():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        figures.append((name, figure, canvas.get_renderer()))
    return figures


def tick_labels(axes):
    """Shown tick labels of the two axes of a panel: [(labels of x), (labels of y)]."""
    found = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True)
        inside = [tick.label1 for tick, place in ticks if low <= place <= high]
        found.append([label for label in inside if label.get_visible() and label.get_text()])
    return found


def test_no_text_is_cut_off_at_the_edge_of_a_figure(laid_out):
    for name, figure, renderer in laid_out:
        width, height = figure.bbox.size
        texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axes in filter(lambda axes: axes.get_visible(), figure.axes):
            texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes._left_title, *chain(*tick_labels(axes))]
        shown = [text for text in texts if text.get_text()]
        assert shown
        for text in shown:
            box = text.get_window_extent(renderer)
            assert box.x0 >= -1, (name, text)
            assert box.y0 >= -1, (name, text)
            assert box.x1 <= width + 1, (name, text)
            assert box.y1 <= height + 1, (name, text)


def test_labels_of_an_axis_do_not_overlap(laid_out):
    for name, figure, renderer in laid_out:
        for axes in filter(lambda axes: axes.get_visible(), figure.axes):
            across, up = ([label.get_window_extent(renderer) for label in labels] for labels in tick_labels(axes))
            for spans in (sorted((box.x0, box.x1) for box in across), sorted((box.y0, box.y1) for box in up)):
                assert all(a[1] <= b[0] + 1 for a, b in pairwise(spans)), (name, spans)


def test_same_tables_give_the_same_bytes_and_leave_no_trace():
    before = dict(mpl.rcParams)
    tables = {"models": 1, "conditions": 12, "covariates": ("a", "b")}
    first, again = (
        {
            name: (style.render_figure(figure, "svg"), style.render_figure(figure, "png"))
            for name, figure in drawn(build(**tables)).items()
        }
        for _ in range(2)
    )
    assert first == again
    assert dict(mpl.rcParams) == before
    for image, pixels in first.values():
        assert b"dc:date" not in image
        assert b"Matplotlib v" not in image
        assert b"Software" not in pixels


def test_rendering_does_not_depend_on_the_users_settings():
    tables = build(models=1, conditions=12)
    plain = style.render_figure(draw_dynamic_range(tables["calibration"]), "svg")
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "svg.fonttype": "path", "text.color": "red"}):
        assert style.render_figure(draw_dynamic_range(tables["calibration"]), "svg") == plain


def xs_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata())


def test_dynamic_range_shows_each_mean_interval_spread_and_n():
    calibration = build(conditions=60)["calibration"]
    figure = draw_dynamic_range(calibration)
    left = figure.axes[0]
    quoted = calibration[calibration["variant"] == "drf_interpolated"].set_index("metric")
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == list(quoted["drf"].sort_values(ascending=False, kind="stable").index)
    points = [line for line in left.lines if line.get_marker() in style.VERDICT_MARKERS.values()]
    bars = [line for line in left.lines if len(xs_of(line)) == 2 and line.get_linewidth() == 1.6]
    for row, name in enumerate(names):
        entry = quoted.loc[name]
        assert xs_of(points[row])[0] == entry["drf"]
        assert list(xs_of(bars[row])) == [entry["drf_low"], entry["drf_high"]]
        assert points[row].get_color() == style.VERDICT_COLOURS[entry["verdict"]]
        spread = left.patches[row]
        assert isinstance(spread, Rectangle)
        assert spread.get_width() == pytest.approx(2 * entry["drf_half_sd"])
    image = style.render_figure(figure, "svg").decode()
    assert image.count("n = 60") == len(names)
    assert "18 % NaN" in image


def test_a_metric_without_a_value_is_a_dash_and_no_point():
    tables = build(conditions=60, all_nan=("nir",))
    figure = draw_dynamic_range(tables["calibration"])
    left = figure.axes[0]
    assert left.get_yticklabels()[-1].get_text() == "nir"
    assert [text.get_text() for text in left.texts if text.get_position()[1] == len(left.get_yticks()) - 1] == ["–"]
    assert not [line for line in left.lines if line.get_marker() == "X"]


def test_calibration_of_a_single_half_split_has_no_spread():
    calibration = build(conditions=60)["calibration"].assign(drf_half_sd=np.nan, bds_half_sd=np.nan)
    assert b"wmse" in style.render_figure(draw_dynamic_range(calibration), "svg")


def test_headroom_has_a_panel_per_calibrated_metric_and_leaves_low_coverage_out():
    board = build(models=8, low_coverage=("gears",))["leaderboard"]
    figure = draw_headroom(board)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left").replace("\n", "") for axes in panels] == list_ranked_metrics(board)
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert "gears" not in names
    assert set(names) == {*board.loc[board["kind"].isin(["model", "baseline"]), "model"]} - {"gears"}


def test_headroom_far_out_is_drawn_at_the_edge_with_its_value():
    board = build(models=8)["leaderboard"]
    figure = draw_headroom(board)
    panel = next(axes for axes in figure.axes if axes.get_title(loc="left") == "weighted_r2_deltactrl")
    assert "−7.3" in [text.get_text() for text in panel.texts]
    assert panel.get_xlim()[0] > -1.2


def test_per_condition_counts_wins_by_stratum():
    ratios = pd.DataFrame(
        {
            "model": "m",
            "covariate": "all",
            "condition": list("abcde"),
            "stratum": ["0", "0", "1-9", ">=100", ">=100"],
            "ratio": [0.5, 2.0, 0.25, 1.5, 0.9],
        }
    )
    panel = draw_per_condition(ratios).axes[0]
    assert [text.get_text() for text in panel.texts] == ["better in\n1 of 2", "better in\n1 of 1", "better in\n1 of 2"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "1–9", "≥ 100"]
    points = np.concatenate([np.asarray(part.get_offsets())[:, 1] for part in panel.collections])
    assert sorted(points) == sorted(ratios["ratio"])


def test_names_with_dollar_signs_are_no_formulas():
    quality = build(conditions=6)["quality"].replace({"GENE001": "$A_1$ & <b>"})
    image = style.render_figure(draw_conditions(quality), "svg").decode()
    assert "$A_1$ &amp; &lt;b&gt;" in image


def test_more_than_100_conditions_are_not_named_except_control():
    few, many = (next(iter(build(models=1, conditions=n)["edistance"].values())) for n in (20, 120))
    assert len(draw_edistance(few).axes[0].get_yticklabels()) == len(few)
    assert [label.get_text() for label in draw_edistance(many).axes[0].get_yticklabels()] == ["control"]


def test_clusters_stand_together_and_unknown_distances_do_not_break_the_order():
    names = list("abcdef")
    group = np.array([0, 1, 0, 1, 0, 1])
    matrix = pd.DataFrame(np.where(group[:, None] == group, 0.1, 5.0), index=names, columns=names)
    together = order_conditions(matrix)
    assert {frozenset(together[:3]), frozenset(together[3:])} == {frozenset("ace"), frozenset("bdf")}
    matrix.loc["a", :] = np.nan
    matrix.loc[:, "a"] = np.nan
    assert sorted(order_conditions(matrix)) == names
    assert order_conditions(matrix)[0] == "a" or order_conditions(matrix)[-1] == "a"
    assert b"svg" in style.render_figure(draw_edistance(matrix), "svg")


def test_ticks_are_plain_numbers():
    assert [style.format_tick(x) for x in (0, 0.001, 0.5, 20, 1000, -7.3, 0.0625)] == [
        "0",
        "0.001",
        "0.5",
        "20",
        "1,000",
        "−7.3",
        "0.0625",
    ]
