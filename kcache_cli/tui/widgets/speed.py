"""The speed panel: tokens a second, time to the first, and latencies between them."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.speed import speed_view
from kcache_cli.tui.model.words import figure, seconds
from kcache_cli.tui.widgets.chart import area
from kcache_cli.tui.widgets.panel import Panel, columns


class SpeedPanel(Panel):
    """Figures and a sparkline of the inter-token latency."""

    NUMBER = 5
    TITLE = "speed of decoding"

    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """See :class:`~kcache_cli.tui.widgets.panel.Panel`."""
        palette = self.look.palette
        view = speed_view(moment)
        fast = Text.assemble(("–" if view.tok_s is None else figure(view.tok_s), f"bold {palette.accent}"))
        fast.append(" tok/s", palette.muted)
        first = Text.assemble(("TTFT ", palette.muted), seconds(view.ttft_s))
        lines = [columns(fast, first, width)]
        itl = Text.assemble(("ITL ", palette.muted), _ms(view.itl_ms))
        spread = Text() if view.middle is None else Text.assemble(("p95 ", palette.muted), _ms(view.slow))
        rest = height - 2
        if rest > 0:
            samples = np.zeros(2 * width)
            latest = view.itls[-2 * width :]
            if latest:
                samples[-len(latest) :] = latest
            lines += area(samples, width, rest, max([*latest, 1e-9]), (palette.good,), self.look)
        return [*lines, columns(itl, spread, width)][:height]


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{figure(value)} ms" if value < 999.5 else f"{value / 1e3:.1f} s"
