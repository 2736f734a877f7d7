"""Plots without their pixels.  Drawing its report is three quarters of what a run of two steps takes."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
from matplotlib.figure import Figure
from PIL import Image

from prfl.evaluation import plots


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """Curves, of which a report has dozens, are not built; other figures are built and not drawn."""
    patch.setattr(plots, "png", blank)
    patch.setattr(plots, "curve", lambda records, name: blank())


def blank(figure: Figure | None = None, text: Mapping[str, str] | None = None) -> bytes:
    """In the place of ``plots.png``: the figure is built, and a picture of one pixel stands for it."""
    buffer = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()
