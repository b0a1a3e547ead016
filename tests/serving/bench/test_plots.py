"""Plots of made-up figures, where matplotlib is installed, and what is said where it is not."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from serving.bench import plots as bench_plots
from serving.bench import report as bench_report
from serving.bench.log import Kill, Log, Memory, Output, Plan, SessionLog
from serving.line import Event


def run(**plan):
    outputs = [Output(1000.0 + 100 * number, 500.0 + number) for number in [*range(11), *range(25, 290)]]
    events = [Event(2100.0, "recovering", ""), Event(3000.0, "recovered", {"restart": 600.0, "weights": 90.0})]
    kills = [Kill("denoise", 1, 2000.0, frozenset())] if "kill" in plan else []
    memory = [Memory(5.0 * number, 1000.0 + number, 400.0) for number in range(7)]
    log = Log(Plan(2, 30.0, 25.0, **plan), 4, 0.0, 30_000.0, [SessionLog(outputs, events)] * 2, kills, memory=memory)
    return bench_report.figures(log)


def test_each_plot_is_drawn_from_the_runs_that_have_its_data(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [run(), run(overload=3.0), run(kill="denoise", num_kills=1)]
    written = bench_plots.write_plots({"runs": runs}, tmp_path / "plots")
    assert [path.name for path in written] == ["delay.png", "memory.png", "fps.png", "kills.png"]
    for path in written:
        assert np.asarray(Image.open(path).convert("L")).std() > 10
    assert [path.name for path in bench_plots.write_plots({"runs": [run()]}, tmp_path)][-1] == "fps.png"
    assert bench_plots.write_plots({"runs": []}, tmp_path) == []


def test_parts_of_an_interruption_and_the_rest_make_up_its_mean():
    entries = run(kill="denoise", num_kills=1)["recoveries"]
    parts = bench_plots.mean_parts_s({"denoise": entries})
    assert (parts["detect"], parts["restart"], parts["weights"]) == ([0.1], [0.6], [0.09])
    assert sum(heights[0] for heights in parts.values()) == pytest.approx(1.5)


def test_without_matplotlib_the_extra_that_installs_it_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from serving.bench import __main__ as bench\n"
        "sys.exit(bench.main(['--plots', 'plots', '--url', 'ws://127.0.0.1:9/v1/stream']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "personalive-ray[bench]" in done.stderr
