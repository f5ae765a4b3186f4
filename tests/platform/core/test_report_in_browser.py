"""The report as a browser shows it, without any network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from core.report.page import write_report
from tests.helpers.report_tables import build

BROWSERS = ("chromium", "google-chrome", "chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1200,3000",
)


def test_the_page_shows_text_tables_and_figures(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    write_report(tmp_path / "report.html", **build(seed=0))
    picture = tmp_path / "page.png"
    blind = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [browser, *FLAGS, blind, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    subprocess.run([*command, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    # A blank or broken page is white; text and figures darken every stretch of it.
    dark = (pixels.mean(axis=2) < 0.6).reshape(6, 500, 1200).mean(axis=(1, 2))
    assert (dark > 0.002).all(), dark
    # The figures are in colour.
    assert (np.ptp(pixels, axis=2) > 0.3).sum() > 2000
