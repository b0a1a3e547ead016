"""The paper's figures, and what is said of ours beside them."""

from __future__ import annotations

import pytest

from training.paper import COLUMNS, PAPER, PAPER_COLUMNS, compared, direction, paper_differences
from training.recipes import smoke
from training.variants import variants

FIGURES = dict.fromkeys(COLUMNS, 0.5)


def test_every_variant_has_its_place_in_the_paper():
    for name in variants(smoke()):
        assert name in PAPER or name in ("without-distillation", "without-gan")
        assert bool(paper_differences(name)) == (name != "full")
    assert all(len(row) == len(PAPER_COLUMNS) for row in PAPER.values())


def test_the_papers_differences_are_those_of_its_own_tables():
    assert paper_differences("without-sliding") == {"identity": -0.149, "aed": 0.082, "apd": 0.01, "tlp": -2.78}
    assert paper_differences("threshold-15")["identity"] == pytest.approx(-0.0059)
    assert paper_differences("without-gan") == {"sharpness": -1}


@pytest.mark.parametrize(
    ("ours", "error", "theirs", "said"),
    [
        (0.5, 0.1, 0.2, "same"),
        (-0.5, 0.1, 0.2, "differs"),
        (0.5, 0.3, 0.2, "unclear"),
        (0.0, 0.0, 0.2, "unclear"),
        (0.5, float("inf"), 0.2, "unclear"),
        (0.5, 0.1, 0.0, "none in the paper"),
    ],
)
def test_only_differences_beyond_their_error_have_a_direction(ours: float, error: float, theirs: float, said: str):
    assert direction(ours, error, theirs) == said


def test_differences_are_taken_trial_by_trial():
    full = [FIGURES | {"tlp": value} for value in (10.0, 20.0, 30.0)]
    found = [FIGURES | {"tlp": value} for value in (7.0, 17.5, 27.0)]
    row = compared("half-chunk", found, full)["differences"]["tlp"]
    assert row["ours"] == pytest.approx(-2.8333, abs=1e-3) and row["error"] == pytest.approx(0.1667, abs=1e-3)
    assert row["direction"] == "same"
