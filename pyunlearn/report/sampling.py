"""The part of a run's report on sampling: who was drawn how often, by MRD, and who was forgotten when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup

from .figures import COLOURS, STYLE, new_figure, to_panels

GREY = "#94a3b8"


def sampling_figure(unlearning: Mapping[str, Any]) -> Markup | None:
    """Updates of every sample over its MRD before unlearning (in order of updates without it), and how many samples
    are forgotten over the steps. None without a sampler."""
    samples = unlearning["samples"]
    if not samples:
        return None
    with matplotlib.rc_context(STYLE):
        figure = new_figure(1, 1 if unlearning["limits"] is None else 2)
        drawn = figure.axes[0]
        if "mrd_before" in samples[0]:
            for gone, colour, label in ((False, GREY, "drawn to the end"), (True, COLOURS["forget"], "forgotten")):
                some = [sample for sample in samples if (sample["forgotten_at"] is not None) == gone]
                points = [[sample[key] for sample in some] for key in ("mrd_before", "updates")]
                drawn.plot(*points, "o", color=colour, markersize=4, label=f"{label}: {len(some)}")
            drawn.legend(frameon=False, fontsize=8)
            drawn.set(xlabel="MRD before unlearning", ylabel="updates")
        else:
            ordered = sorted(sample["updates"] for sample in samples)
            drawn.step(range(1, len(ordered) + 1), ordered, where="mid", color=COLOURS["forget"])
            drawn.set(xlabel="samples", ylabel="updates")
        drawn.set_title("updates of each sample")
        if unlearning["limits"] is not None:
            steps = sorted(sample["forgotten_at"] for sample in samples if sample["forgotten_at"] is not None)
            axes = figure.axes[1]
            axes.step([0, *steps], range(len(steps) + 1), where="post", color=COLOURS["forget"])
            axes.set(xlabel="optimiser step", ylabel="samples", ylim=(0, len(samples)))
            axes.set_title(f"forgotten, of {len(samples)}")
        return to_panels(figure, "sampling of forget samples", samples)
