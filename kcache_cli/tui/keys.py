"""The dashboard's keys. Each has an id, by which the settings file gives it another key."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding


@dataclass(frozen=True, slots=True)
class Key:
    """A key, what it does, and its words: a short one for the footer, where it is shown there, and a long one."""

    id: str
    keys: str
    action: str
    short: str
    long: str
    footer: bool = False
    display: str | None = None


KEYS = (
    Key("quit", "q", "quit", "quit", "leave the dashboard; what it watches goes on", True),
    Key("help", "question_mark", "help", "help", "these keys and what the panels mean", True, "?"),
    Key("pause", "space", "pause", "pause", "stop here, and go on", True),
    Key("faster", "plus,equals_sign", "faster(1)", "faster", "look more often; replay faster", False, "+"),
    Key("slower", "minus", "faster(-1)", "slower", "look less often; replay slower", False, "-"),
    Key("memory", "1", "panel('memory')", "memory", "memory: what is in which tier"),
    Key("link", "2", "panel('link')", "link", "link: what crosses between the tiers"),
    Key("heat", "3", "panel('heat')", "heat map", "where attention looks"),
    Key("layers", "4", "panel('layers')", "layers", "layers: a table"),
    Key("speed", "5", "panel('speed')", "speed", "speed: tokens a second, latencies"),
    Key("text", "6", "panel('words')", "text", "text: what is said, or how far a batch is"),
    Key("maximise", "m", "maximise", "max", "give the chosen panel everything, and take it back", True),
    Key("mode", "v", "mode(1)", "view", "heat map: last step, history, one layer by KV head, age; V goes back", True),
    Key("mode_back", "V", "mode(-1)", "view back", "heat map: the mode before"),
    Key("sort", "s", "sort", "sort", "layers: sort by the next column; S sorts the other way round", True),
    Key("reverse", "S", "reverse", "reverse", "layers: sort the other way round"),
    Key("filter", "slash", "filter", "filter", "layers: show those that meet, say, attn<0.9 or tiered", True, "/"),
    Key(
        "back", "left", "step(-1)", "step back", "a frame back, while paused or replaying; else the cursor", False, "←"
    ),
    Key("forward", "right", "step(1)", "step", "a frame on, while paused or replaying; else the cursor", False, "→"),
    Key("first", "home", "seek(0)", "first", "the first frame that is kept"),
    Key("last", "end", "seek(1)", "last", "the last frame"),
    Key("next_turn", "t", "turn(1)", "turn", "the next turn of the conversation; T the one before"),
    Key("previous_turn", "T", "turn(-1)", "turn back", "the turn before"),
    Key("export", "e", "export", "export", "write a picture of the screen (SVG) into this folder", True),
    Key("probe", "p", "probe", "probe", "have layers that attend exactly say what they would pick"),
    Key("escape", "escape", "escape", "close", "close what is open; from the input back to the panels"),
    Key("talk", "i", "talk", "write", "write to the model (kcache chat --dashboard)"),
    Key("earlier", "pageup", "page(-1)", "read back", "text: back in the conversation; pgdn goes on"),
    Key("later", "pagedown", "page(1)", "read on", "text: on in the conversation"),
    Key("leave", "ctrl+d", "quit", "leave", "leave, from the input as well"),
    Key("stop", "ctrl+c", "stop", "stop", "stop the reply, or the job"),
)


def bindings() -> list[Binding]:
    """The keys as Textual takes them."""
    return [
        Binding(
            key.keys,
            key.action,
            key.short,
            show=key.footer,
            key_display=key.display,
            id=key.id,
            priority=key.id in ("stop", "leave"),
        )
        for key in KEYS
    ]
