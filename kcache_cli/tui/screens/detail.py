"""One layer in detail: what its heads captured, how many rows it took, how far it can be off."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.widgets import Static

from kcache_cli.tui.look import Look, look_of
from kcache_cli.tui.model.detail import Detail, detail
from kcache_cli.tui.model.heat import rebin, scaled
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.words import count, percent, size
from kcache_cli.tui.widgets.chart import rule
from kcache_cli.tui.widgets.paint import colour, shade

_LABEL = 22
_BAR = 30
_MAP = 64


class DetailScreen(ModalScreen[None]):
    """A layer; up and down go to its neighbours."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "close", "close"),
        Binding("up", "move(-1)", "layer up"),
        Binding("down", "move(1)", "layer down"),
    ]
    DEFAULT_CSS = """
    DetailScreen { align: center middle; background: $background 60%; }
    DetailScreen > VerticalScroll { width: 78; max-width: 100%; height: auto; max-height: 100%; border: round $accent;
        border-title-color: $accent; background: $surface; padding: 0 2; scrollbar-size-vertical: 1; }
    DetailScreen Static { width: 1fr; height: auto; }
    """

    moment: reactive[Moment | None] = reactive(None, always_update=True)
    """What is shown of it."""
    at_layer: reactive[int] = reactive(0)
    """Which layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.set_reactive(DetailScreen.at_layer, layer)

    def compose(self) -> ComposeResult:
        """A box with one text."""
        with VerticalScroll():
            yield Static(id="detail")

    def on_mount(self) -> None:
        """Fill it."""
        self._show()

    def watch_moment(self) -> None:
        """Fill it anew."""
        self._show()

    def watch_at_layer(self) -> None:
        """Fill it anew."""
        self._show()

    def action_move(self, by: int) -> None:
        """Another layer."""
        layers = 0 if self.moment is None or self.moment.frame is None else len(self.moment.frame.layers)
        self.at_layer = min(max(0, self.at_layer + by), max(0, layers - 1))

    def action_close(self) -> None:
        """Close it."""
        self.dismiss(None)

    def _show(self) -> None:
        found = None if self.moment is None else detail(self.moment, self.at_layer)
        if self.moment is None or found is None or not self.query("#detail"):
            return
        self.query_one(VerticalScroll).border_title = f"layer {self.at_layer}"
        self.query_one("#detail", Static).update(describe(found, self.moment, look_of(self.app)))


def describe(found: Detail, moment: Moment, look: Look) -> Text:
    """The whole text."""
    palette, row, stats = look.palette, found.row, found.layer.stats
    text = Text()

    def line(name: str, *parts: str | Text | tuple[str, str]) -> None:
        text.append(f"{name:<{_LABEL}}", palette.muted)
        text.append_text(Text.assemble(*parts))
        text.append("\n")

    kinds = {
        "tiered": "V in the host tier, rows come back",
        "resident": "V stays on the device",
        "stock": "a stock cache of its own",
    }
    modes = {"topn": "TopN", "dense": "dense: exact", "prefill": "reading the prompt: exact", "idle": "idle"}
    line("kind", (row.kind, "bold"), (f"  {kinds[row.kind]}", palette.muted))
    line("last step", (modes[row.mode], "bold"), _would(found, palette.warn))
    line("device, host", (size(row.device), "bold"), "   ", (size(row.host), "bold"))
    line(
        "rows per step",
        ("–" if row.rows is None else f"{count(row.rows)} on average", "bold"),
        _per_head(found, palette.muted),
    )
    line("picked again", *_share(row.reuse, palette.accent, look), (" as before", palette.muted))
    line("hot set", *_share(row.hits, palette.accent, look), (" of all rows", palette.muted))
    line("to the device", (size(stats.bytes_h2d), "bold"), ("   to the host ", palette.muted), size(stats.bytes_d2h))
    bound = "–" if row.bound is None else "0, exact" if row.bound == 0 else f"≤ {row.bound:.2f} × the largest |V|"
    line("error bound", (bound, "bold"))
    text.append("\n")
    _add_mass(text, found, look)
    _add_map(text, found, moment, look)
    return text


def _would(found: Detail, tone: str) -> Text:
    would = found.layer.mode == "dense" and found.histogram.any()
    return Text("   shown is what would be picked", tone) if would else Text()


def _per_head(found: Detail, tone: str) -> Text:
    if not found.picked:
        return Text()
    heads = ", ".join(str(rows) for rows in found.picked[:12])
    return Text(f"   last by KV head: {heads}{', …' if len(found.picked) > 12 else ''}", tone)


def _share(value: float | None, tone: str, look: Look) -> tuple[Text, tuple[str, str]]:
    if value is None:
        return Text("–"), ("", "")
    return rule(value, _BAR, tone, look), (f" {percent(value)}", "bold")


def _add_mass(text: Text, found: Detail, look: Look) -> None:
    """A bar for each query head, those of one KV head together."""
    palette = look.palette
    if not found.groups:
        text.append("nothing was picked in the last step\n", palette.muted)
        return
    text.append("attention captured by the picks, by query head\n", palette.muted)
    query = 0
    for number, group in enumerate(found.groups):
        for at, share in enumerate(group):
            head = f"KV head {number}" if at == 0 else ""
            text.append(f"{head:<13}{query:>4}     ", palette.muted)
            tone = palette.good if share >= 0.9 else palette.accent if share >= 0.75 else palette.warn
            text.append_text(rule(share, _BAR, tone, look))
            text.append(f" {percent(share)}\n", "bold")
            query += 1
    text.append("\n")


def _add_map(text: Text, found: Detail, moment: Moment, look: Look) -> None:
    """Where in the context the layer's picks are."""
    frame = moment.frame
    if frame is None or not found.histogram.any():
        return
    counts = rebin(found.histogram[None], frame.bucket_tokens, 0, frame.tokens, _MAP)
    values = scaled(counts, 0, frame.tokens, moment.past.heads)[0]
    text.append("where its picks are\n", look.palette.muted)
    ramp = look.palette.ramp
    for value in values:
        if look.halves:
            text.append(" ", f"on {colour(float(value), ramp)}")
        else:
            text.append(shade(float(value), look))
    text.append(f"\n0{frame.tokens:>{_MAP - 1},}", look.palette.muted)
