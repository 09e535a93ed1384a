"""The link panel: traffic between the tiers over time, and what it comes to per token."""

from __future__ import annotations

from rich.text import Text

from kcache_cli.tui.model.link import LinkView, link_view, rates
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.words import count, percent, rate, size
from kcache_cli.tui.widgets.chart import area, bar
from kcache_cli.tui.widgets.panel import Panel, columns


class LinkPanel(Panel):
    """Up is to the device, down to the host."""

    NUMBER = 2
    TITLE = "link"

    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """See :class:`~kcache_cli.tui.widgets.panel.Panel`."""
        view = link_view(moment)
        palette, signs = self.look.palette, self.look.signs
        up = Text.assemble((f"{signs.up} H2D ", palette.h2d), (rate(view.h2d_s), "bold"))
        down = Text.assemble((f"{signs.down} D2H ", palette.d2h), (rate(view.d2h_s), "bold"))
        token = self._per_token(view)
        hot, share = self._hot(view), self._share(view, moment.info.host_only)
        if height < 6:
            rates = Text.assemble(up, "  ", down)
            if rates.cell_len + token.cell_len >= width:  # what a token costs says more than the link's share
                share = token
            graph = self._graph(moment, width, max(0, height - 2), False)
            return [columns(rates, token, width), *graph, columns(hot, share, width)][:height]
        lines = [columns(Text.assemble(up, "   ", down), token, width)]
        lines += self._graph(moment, width, height - 3, True)
        return [*lines, columns(hot, share, width), self._totals(view, width)]

    def _per_token(self, view: LinkView) -> Text:
        if view.per_token is None:
            return Text()
        return Text.assemble((f"{view.per_token / 1e6:.2f}", "bold"), (" MB/token", self.look.palette.muted))

    def _graph(self, moment: Moment, width: int, height: int, both: bool) -> list[Text]:
        if height < 1:
            return []
        palette, look = self.look.palette, self.look
        up, down = rates(moment.past, 2 * width)
        below = max(1, height // 4) if both and height > 2 else 0
        most = max(1.0, float(up.max(initial=0)))
        lines = area(up, width, height - below, most, (palette.h2d,), look)
        deepest = max(1.0, float(down.max(initial=0)))
        if below:
            fall = area(down, width, below, deepest, (palette.d2h,), look)
            lines += [_flipped(line) for line in reversed(fall)] if not look.ascii else fall
        if most > 1 and height > 1:
            lines[0] = _over(lines[0], Text(f"{rate(most)} ", palette.muted))
        if below and deepest > 1:
            lines[-1] = _over(lines[-1], Text(f"{rate(deepest)} ", palette.muted))
        return lines

    def _hot(self, view: LinkView) -> Text:
        palette = self.look.palette
        text = Text.assemble(("hot set ", palette.muted))
        if view.hit_rate is None:
            return text.append("–", palette.muted)
        text.append_text(bar(view.hit_rate, 10, palette.accent, palette.free, self.look))
        return text.append(f" {percent(view.hit_rate)}", "bold")

    def _share(self, view: LinkView, host_only: bool) -> Text:
        palette = self.look.palette
        if view.share is None or view.measured_s is None:
            return Text("no link here" if host_only else "link not measured: kcache doctor", palette.muted)
        return Text.assemble(
            bar(view.share, 10, palette.h2d, palette.free, self.look),
            (f" {percent(view.share)}", "bold"),
            (f" of {view.measured_s / 1e9:.1f} GB/s", palette.muted),
        )

    def _totals(self, view: LinkView, width: int) -> Text:
        palette, signs = self.look.palette, self.look.signs
        left = Text.assemble(
            ("with prompts ", palette.muted),
            (f"{signs.up} ", palette.h2d),
            size(view.total_h2d),
            (f"  {signs.down} ", palette.d2h),
            size(view.total_d2h),
        )
        right = Text.assemble((count(view.rows), "bold"), (" rows", palette.muted))
        if view.rows_per_step is not None:
            right.append(f", {count(view.rows_per_step)}/step", palette.muted)
        return columns(left, right, width)


def _flipped(line: Text) -> Text:
    """Braille upside down."""
    turned = "".join(_turned(sign) for sign in line.plain)
    return Text(turned, line.style)


def _turned(sign: str) -> str:
    dots = ord(sign) - 0x2800
    if not 0 <= dots < 256:
        return sign
    pairs = ((0x01, 0x40), (0x02, 0x04), (0x08, 0x80), (0x10, 0x20))
    result = 0
    for one, other in pairs:
        result |= (other if dots & one else 0) | (one if dots & other else 0)
    return chr(0x2800 + result)


def _over(line: Text, label: Text) -> Text:
    """The label in place of the beginning of a line."""
    rest = line.plain[label.cell_len :]
    return Text.assemble(label, (rest, line.style))
