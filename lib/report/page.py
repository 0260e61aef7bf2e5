"""The self-contained page of results: tables, pictures and settings in one HTML file that fetches nothing. No torch.

page, pictures, notices = write_report(["results/compare.json"], "results/report")
"""

import base64
import html
from pathlib import Path
from typing import NamedTuple

from lib.files import write_file
from lib.report.pictures import Picture, curves, save, save_figure
from lib.report.results import by_model, notices, read_results
from lib.report.sections import model_sections, perplexity_panels, result_rows


class Section(NamedTuple):
    """A part of the page: a heading and its parts, which are Pictures and strings of HTML."""

    title: str
    parts: list


def write_report(paths, folder):
    """Write the pictures and index.html of result files to `folder`; return (page, pictures, notices).

    Raises ValueError, one line, for a file that is no result, or for files that contradict each other.
    """
    results = read_all(paths)
    models = by_model(results)
    lines, folder = notices(results, models), Path(folder).expanduser()
    sections, files = [], []
    for k, (model, mine) in enumerate(models.items(), 1):
        model = model or "model not named"
        for title, parts in model_sections(mine):
            title = f"{model}: {title}" if len(models) > 1 else title
            sections.append(Section(title, list(parts.values())))
            for name, part in parts.items():
                if isinstance(part, Picture):
                    prefix = f"{k}_" if len(models) > 1 else ""
                    files.append(folder / f"{prefix}{name}.png")
                    save(part, files[-1])
    page, names = folder / "index.html", [name for name in models if name]
    write_page(page, "BlockPruner: " + (", ".join(names) or "results"), sections, lines)
    return page, files, lines


def write_quality(paths, path):
    """Write perplexity against the parameters removed, of one model's result files, as a .svg, .pdf or .png file.

    Raises ValueError, one line, where the files are of several models or hold no perplexity of a pruned one.
    """
    results = read_all(paths)
    models = by_model(results)
    if len(models) > 1:
        raise ValueError(f"results of {len(models)} models: one picture shows one model; give the files of one")
    panels, methods = perplexity_panels(*result_rows(results))
    if not panels:
        raise ValueError("no perplexity of a pruned model in these files; give results of eval.py or a compare.json")
    save_figure(curves(panels, methods), path)


def read_all(paths):
    """Return the Results of all files, each file once."""
    once = {Path(path).expanduser().resolve(): path for path in paths}
    return [result for path in once.values() for result in read_results(path)]


def write_page(path, title, sections, notices=()):
    """Write one HTML file that needs nothing else: pictures are inlined, there is no script and no request.

    notices: lines that a reader must not miss, above everything.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f'<p class="notice" role="alert">{html.escape(line)}</p>' for line in notices]
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [_picture(part) if isinstance(part, Picture) else part for part in section.parts]
        body.append("</section>")
    write_file(path, PAGE.format(title=html.escape(title), body="\n".join(body)).encode())


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: auto;
  padding: 1rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.5rem; }}
.notice {{ border-left: 6px solid #D55E00; background: #fdf0e6; padding: .6rem .9rem; font-weight: bold; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th:first-child {{ text-align: left; }} thead th {{ border-bottom: 2px solid #555; }}
td.text, .settings td, .settings th {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
figure {{ margin: 1.5rem 0; }} figcaption {{ font-size: .9rem; color: #444; max-width: 50rem; }}
figure img {{ display: block; height: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _picture(picture):
    width, height = (round(inches * 96) for inches in picture.size)
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><div class="scroll" tabindex="0"><img width="{width}" height="{height}" '
        f'alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
