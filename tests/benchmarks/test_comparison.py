"""Where two results disagree, a benchmark says so and fails."""

from __future__ import annotations

import numpy as np
import pytest
import typer

from benchmarks import comparison


@pytest.mark.parametrize(
    ("ours", "theirs", "largest"),
    [
        ([1.0, np.nan, np.inf, 0.0], [1.0, np.nan, np.inf, 0.0], 0.0),
        ([1.0, 1.1], [1.0, 1.0], 0.1),
        ([1.0, np.nan], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [1.0, np.nan], np.inf),
        ([1.0, 1.0], [1.0, 0.0], np.inf),
        ([1.0, -np.inf], [1.0, np.inf], np.inf),
    ],
)
def test_disagreements_are_seen_and_fail(ours: list[float], theirs: list[float], largest: float) -> None:
    found = comparison.agreement("x", ours, theirs, 1e-6, "relative")
    assert found.largest == pytest.approx(largest)
    if largest == 0:
        comparison.show_agreement([found])
    else:
        with pytest.raises(typer.Exit) as stopped:
            comparison.show_agreement([found])
        assert stopped.value.exit_code == 1
