"""A report as one HTML file that needs nothing else: pictures are in it, there is no script and no link to a server."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { color: #64748b; margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th { color: #64748b; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.text { text-align: left; white-space: normal; max-width: 36rem; }
img { max-width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { color: #64748b; font-size: .85rem; }
pre { background: #f8fafc; border: 1px solid #e2e8f0; border-radius: 6px; padding: .75rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Table:
    """text_columns: of words, not of numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = ()

    def html(self) -> str:
        body = "\n".join(f"<tr>{self._cells('td', row)}</tr>" for row in self.rows)
        return f'<div class="scroll"><table><tr>{self._cells("th", self.header)}</tr>\n{body}</table></div>'

    def _cells(self, tag: str, row: Sequence[str]) -> str:
        kinds = [' class="text"' if index in self.text_columns else "" for index in range(len(row))]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str = ""

    def html(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode()
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        alt = html.escape(self.caption or self.path.stem, quote=True)
        return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>'


@dataclass(frozen=True)
class Pictures:
    """Beside each other where there is room. legend: what holds for all of them."""

    pictures: Sequence[Picture]
    legend: str = ""

    def html(self) -> str:
        legend = f'<p class="lead">{html.escape(self.legend)}</p>\n' if self.legend else ""
        return f'{legend}<div class="grid">{"".join(picture.html() for picture in self.pictures)}</div>'


@dataclass(frozen=True)
class Words:
    """Preformatted. folded: hidden until one clicks on this title."""

    text: str
    folded: str = ""

    def html(self) -> str:
        body = f"<pre>{html.escape(self.text)}</pre>"
        return f"<details><summary>{html.escape(self.folded)}</summary>{body}</details>" if self.folded else body


Part = Table | Picture | Pictures | Words


def write_page(path: Path, title: str, lead: str, sections: Sequence[tuple[str, Part]]) -> None:
    """sections: (heading, what stands below it)."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{part.html()}" for heading, part in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f'<body><h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</body></html>\n'
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.rename(path)
