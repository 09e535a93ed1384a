"""PNG of a picture, with the font that comes with matplotlib, so that it looks the same on a bare machine."""

from __future__ import annotations

from pathlib import Path


def to_png(svg: str) -> bytes:
    """Draw an SVG of :mod:`kcache_cli.pictures.draw`."""
    import resvg_py

    data: bytes = bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg,
            font_files=[str(path) for path in _fonts()],
            monospace_family="DejaVu Sans Mono",
            sans_serif_family="DejaVu Sans",
        )
    )
    return data


def _fonts() -> list[Path]:
    import matplotlib

    return sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuSans*.ttf"))
