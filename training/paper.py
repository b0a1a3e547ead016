"""The paper's own ablations, and how ours compare with them: differences, directions, tables. Pure functions, called by
`training.ablations`.

The paper measures real faces with other instruments, so that only directions can be compared, and only where our
difference stands out from its error over trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.evaluate import means

PAPER_COLUMNS = ("ID-SIM", "AED", "APD", "FVD", "tLP")
PAPER: dict[str, tuple[float, ...]] = {
    "full": (0.698, 0.703, 0.030, 520.6, 12.83),
    "without-sliding": (0.549, 0.785, 0.040, 678.8, 10.05),
    "without-keyframes": (0.728, 0.710, 0.031, 535.6, 13.27),
    "without-interpolated-start": (0.680, 0.703, 0.031, 511.5, 13.06),
    "chunk-causal": (0.689, 0.709, 0.032, 537.0, 12.83),
    "half-chunk": (0.660, 0.713, 0.031, 520.2, 12.14),
    "threshold-15": (0.6924, 0.7043, 0.0309, 510.9, 12.69),
    "threshold-16": (0.6940, 0.7039, 0.0306, 516.6, 12.78),
    "threshold-18": (0.7015, 0.7047, 0.0306, 522.9, 12.93),
    "threshold-20": (0.7159, 0.7099, 0.0303, 529.2, 13.18),
}
"""Tables 2 and 3."""
PAPER_THRESHOLD_FULL = (0.6983, 0.7028, 0.0305, 520.6, 12.83)
"""`full` as table 3 has it, with more digits than table 2."""
CLAIMS = {"without-distillation": {"perceptual": 1}, "without-gan": {"sharpness": -1}}
"""What figure 6 shows without figures: which of ours grows (1) or falls (-1)."""
COMPARED = {"identity": "ID-SIM", "aed": "AED", "apd": "APD", "tlp": "tLP"}
"""Our figures and the paper's that mean the same. FVD is not measured."""
COLUMNS = {
    "psnr_db": "dB", "psnr_face_db": "dB face", "psnr_start_db": "dB start", "perceptual": "percept.",
    "sharpness": "sharp", "flicker": "flicker", "num_keyframes": "keyframes",
    "identity": "ID", "aed": "AED", "apd": "APD°", "tlp": "tLP",
}  # fmt: skip
NUM_ERRORS = 2
"""Standard errors below which a difference says nothing."""


def direction(ours: float, error: float, theirs: float) -> str:
    """Whether a difference from `full` goes the paper's way; `error` is its standard error over trials."""
    if theirs == 0:
        return "none in the paper"
    if not abs(ours) > NUM_ERRORS * error:
        return "unclear"
    return "same" if ours * theirs > 0 else "differs"


def compared(name: str, found: Sequence[dict[str, float]], full: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One variant's means, and for each figure that the paper has too how and how surely it differs from `full`."""
    differences = {}
    for figure, theirs in paper_differences(name).items():
        each = np.array([own[figure] - other[figure] for own, other in zip(found, full, strict=True)])
        ours = float(each.mean())
        error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.inf
        differences[figure] = {
            "ours": ours,
            "error": error if math.isfinite(error) else None,
            "paper": theirs,
            "direction": direction(ours, error, theirs),
        }
    return {"means": means(found), "paper": PAPER.get(name), "differences": differences}


def paper_differences(name: str) -> dict[str, float]:
    """By how much the paper's figures differ from those of its `full`, by our names; only a sign for figure 6."""
    if name == "full":
        return {}
    if name in CLAIMS:
        return dict(CLAIMS[name])
    full = PAPER_THRESHOLD_FULL if name.startswith("threshold") else PAPER["full"]
    pairs = zip(PAPER_COLUMNS, PAPER[name], full, strict=True)
    differences = {column: round(own - other, 6) for column, own, other in pairs}
    return {ours: differences[theirs] for ours, theirs in COMPARED.items()}


def budget_line(report: Mapping[str, Any]) -> str:
    """What all variants have in common, in a sentence."""
    changes = "".join(f", {name}={value}" for name, value in report["set"].items())
    return (
        f"Recipe {report['recipe']}{changes}, seed {report['seed']}: distill {report['num_distill_steps']} steps, "
        f"stream {report['num_stream_steps']} steps ({report['num_stream_updates']} updates, in all variants as many); "
        f"{report['identities']} held-out identities, {report['seconds']:g} s each."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """Two tables for people: what was measured, and how it differs from `full` here and in the paper."""
    paper = [f"paper {name}" for name in PAPER_COLUMNS]
    lines = [budget_line(report), "", *_head(["variant", *COLUMNS.values(), *paper])]
    for name, row in report["variants"].items():
        known = [f"{value:g}" for value in row["paper"]] if row["paper"] else ["–"] * len(PAPER_COLUMNS)
        lines.append(_row([name, *(_shown(row["means"][key]) for key in COLUMNS), *known]))
    lines += ["", *_head(["variant", "what differs", "figure", "ours – full", "± error", "paper – full", "direction"])]
    for name, row in report["variants"].items():
        for figure, d in row["differences"].items():
            theirs = ("+" if d["paper"] > 0 else "–") if name in CLAIMS else f"{d['paper']:+g}"
            error = "–" if d["error"] is None else _shown(d["error"])
            title = COLUMNS[figure]
            lines.append(_row([name, row["difference"], title, f"{d['ours']:+.4f}", error, theirs, d["direction"]]))
    return "\n".join(lines)


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), _row(["---"] * len(titles))]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 2 else f"{value:.4f}"
