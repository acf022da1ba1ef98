"""report.html: what a run made, measured and cost, in one self-contained page (no script, no outside resource)."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from distill.evaluate.table import cells
from distill.logs import read_metrics

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--page:#fff;--panel:#f7f8fa;--accent:#2563eb}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ee;--soft:#98a2b3;--line:#344054;--page:#12151c;--panel:#1b202b;--accent:#7aa2ff}}
body{font:15px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:980px;margin:40px auto;padding:0 20px}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:36px 0 10px}p.sub{color:var(--soft);margin:4px 0 0}
table{border-collapse:collapse;width:100%}th,td{padding:7px 12px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;font-weight:600}th{color:var(--soft);font-weight:500}.scroll{overflow-x:auto}
img{max-width:100%;border:1px solid var(--line);border-radius:6px;background:#fff}pre{background:var(--panel);padding:14px;border-radius:6px;overflow-x:auto}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:14px}
figure{margin:0;background:var(--panel);border-radius:6px;padding:10px 12px}
figcaption{font-size:13px;color:var(--soft);display:flex;justify-content:space-between}svg{width:100%;height:110px;display:block}
polyline{fill:none;stroke:var(--accent);stroke-width:1.6;vector-effect:non-scaling-stroke}polyline.raw{opacity:.25;stroke-width:1}
"""


def write_report(folder: Path, title: str, rows: Sequence[dict[str, Any]], pictures: Sequence[tuple[str, Image.Image]], recipe: str, load: str) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        rows: the results; pictures: (caption, picture); recipe: the resolved YAML; load: code that loads the student.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p class=sub>{html.escape(folder.name)}</p>"]
    if rows:
        parts.append("<h2>Results</h2>" + _table(rows))
    parts += [f"<h2>{html.escape(caption)}</h2>{_picture(picture)}" for caption, picture in pictures]
    curves = _curves(read_metrics(folder / "metrics.jsonl"))
    if curves:
        parts.append(f"<h2>Training</h2><div class=curves>{curves}</div>")
    parts.append(f"<h2>Load the student</h2><pre>{html.escape(load)}</pre>")
    parts.append(f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles, body = cells(rows)
    head = "".join(f"<th>{html.escape(t)}</th>" for t in titles)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body)
    return f"<div class=scroll><table><tr>{head}</tr>{lines}</table></div>"


def _picture(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "step"]
    figures = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
        if len(points) > 1:
            figures.append(_curve(name, points))
    return "".join(figures)


def _curve(name: str, points: list[tuple[float, float]]) -> str:
    """One curve, raw in the background and averaged over a 20th of the run in front."""
    window = max(1, len(points) // 20)
    smooth, total = [], 0.0
    for i, (step, value) in enumerate(points):
        total += value - (points[i - window][1] if i >= window else 0.0)
        smooth.append((step, total / min(i + 1, window)))
    low, high = min(v for _, v in points), max(v for _, v in points)
    first, last = points[0][0], points[-1][0]

    def path(series: list[tuple[float, float]]) -> str:
        return " ".join(f"{(s - first) / (last - first or 1) * 300:.1f},{100 - (v - low) / (high - low or 1) * 92:.1f}" for s, v in series)

    return (
        f"<figure><figcaption><span>{html.escape(name)}</span><span>{smooth[-1][1]:.4g}</span></figcaption>"
        f"<svg viewBox='0 0 300 104' preserveAspectRatio=none><polyline class=raw points='{path(points)}'/><polyline points='{path(smooth)}'/></svg></figure>"
    )
