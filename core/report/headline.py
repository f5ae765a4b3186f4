"""The result of a benchmark in a few sentences."""

from __future__ import annotations

import pandas as pd

from core.report.tables import list_ranked_metrics, tabulate_outcomes, tabulate_verdicts
from core.report.text import format_count, join_names, spell_name
from core.scoring.calibration import FEWEST_CONDITIONS

# Verdicts but "calibrated", in the order of the sentence, with what it says of them.
_OTHERS = {
    "inconclusive": "inconclusive",
    "miscalibrated": "miscalibrated",
    "none": f"without a verdict, with fewer than {FEWEST_CONDITIONS} usable conditions",
}


def compose_headline(
    name: str, calibration: pd.DataFrame, leaderboard: pd.DataFrame, comparison: pd.DataFrame
) -> list[str]:
    """Say which metrics are calibrated on a data set, and which models beat the controls.

    A model beats a control by a metric where the whole 95 % interval of the mean difference lies above zero
    (`core.report.tables.tabulate_outcomes`).

    Parameters
    ----------
    name
        Of the data set.
    calibration
        Of all metrics.
    leaderboard
        Of models and controls.
    comparison
        Of models with controls.

    Returns
    -------
    list of str
        One sentence each.
    """
    sentences = [_sentence_on_metrics(name, calibration)]
    kinds = leaderboard.drop_duplicates("model").set_index("model")["kind"]
    if not (kinds == "model").any():
        return [*sentences, "No model was scored: this is a calibration of the metrics alone."]
    if not list_ranked_metrics(leaderboard):
        return [*sentences, "Without a calibrated metric no model is ranked or called better than a control."]
    own = tabulate_outcomes(comparison, calibration)
    negatives = tabulate_verdicts(calibration).set_index("metric")["negative"].loc[own.columns].unique()
    names = " or ".join(f"the {spell_name(control)}" for control in negatives)
    opponent = names if len(negatives) == 1 else f"the negative control of a metric ({names})"
    sentences += _sentences_on_winners(own, f"{opponent}, with the whole 95 % interval of the difference above zero,")
    losers = own.eq("worse").sum(axis=1)
    if losers.any():
        sentences.append(f"Worse than it, with the whole interval below zero: {_list_counts(losers, own.shape[1])}.")
    for baseline in kinds.index[kinds == "baseline"]:
        outcomes = tabulate_outcomes(comparison, calibration, baseline)
        sentences += _sentences_on_winners(outcomes, f"the {spell_name(baseline)} baseline")
    return sentences + _sentences_on_first_ranks(leaderboard)


def _sentence_on_metrics(name: str, calibration: pd.DataFrame) -> str:
    table = tabulate_verdicts(calibration)
    groups = {str(verdict): list(part["metric"]) for verdict, part in table.groupby("verdict")}
    total, good = format_count(len(table), "metric"), groups.pop("calibrated", [])
    if not groups:
        subject = "The only metric is" if len(good) == 1 else f"All {total} are"
        return f"{subject} calibrated on {name}: {join_names(good)}."
    present = [(words, groups[verdict]) for verdict, words in _OTHERS.items() if verdict in groups]
    others = join_names([f"{len(metrics)} {words} ({', '.join(metrics)})" for words, metrics in present])
    if not good:
        return f"None of the {total} is calibrated on {name}: {others}."
    verb = "is" if len(good) == 1 else "are"
    return f"{len(good)} of {total} {verb} calibrated on {name}: {join_names(good)}. The others: {others}."


def _sentences_on_winners(outcomes: pd.DataFrame, opponent: str) -> list[str]:
    """One sentence on the models (rows of the outcomes) that beat an opponent; none where nothing was compared."""
    if outcomes.empty:
        return []
    wins = outcomes.isin(["better", "better, Holm"]).sum(axis=1)
    if not wins.any():
        return [f"No model beats {opponent} on any calibrated metric."]
    n, total = int((wins > 0).sum()), len(outcomes)
    which = f"{n} of {total}" if n < total else "Both" if n == 2 else f"All {n}"
    subject = "The model beats" if total == 1 else f"{which} models {'beats' if n == 1 else 'beat'}"
    return [f"{subject} {opponent} on at least one calibrated metric: {_list_counts(wins, outcomes.shape[1])}."]


def _list_counts(counts: pd.Series[int], of: int) -> str:
    """Write `a on all 3 metrics, b on 2 and c on 1`, most first; models with 0 are left out."""
    ordered = counts[counts > 0].sort_values(ascending=False, kind="stable")
    texts = [f"{model} on {f'all {of}' if n == of and of > 1 else n}" for model, n in ordered.items()]
    return join_names([f"{texts[0]}{f' of {of}' if ordered.iloc[0] < of else ''}", *texts[1:]])


def _sentences_on_first_ranks(leaderboard: pd.DataFrame) -> list[str]:
    first = leaderboard[leaderboard["rank"] == 1]
    if first.empty:
        return []
    metrics = first.groupby("model", sort=False)["metric"].agg(list)
    metrics = metrics.sort_values(key=lambda lists: -lists.map(len), kind="stable")
    total = len(list_ranked_metrics(leaderboard))
    texts = [
        f"{model} by {f'all {total} calibrated metrics' if len(names) == total > 1 else join_names(names)}"
        for model, names in metrics.items()
    ]
    return [f"Ranked first: {'; '.join(texts)}."]
