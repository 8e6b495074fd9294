"""The report: tables, figures, verdicts and executed notebooks of a suite as web pages that need no network.

    <suite folder>/report/index.html        everything on one page, figures within it
                          notebooks/*.html  the executed notebooks

Formulas are MathML, which browsers show by themselves; there are no scripts.
"""

import base64
import datetime
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from latex2mathml import exceptions
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from PIL import Image
from pygments.formatters import HtmlFormatter

from ..runs.store import RunRecord
from ..runs.suite import Suite
from ..utils.files import atomic_write_text, require_writable
from ..utils.progress import clock
from . import charts, claims, signs, study_claims, tables
from . import verdicts as verdict_rule
from .charts import NOTE_KEY, RUNS_KEY

FOREST = "claims"  # name of the picture of all claims, at the head of the report

# The exceptions of latex2mathml have no common base class.
_NO_FORMULA = (IndexError, *(e for e in vars(exceptions).values() if isinstance(e, type) and issubclass(e, Exception)))
# Display formulas first: their dollars come in pairs. Code spans and blocks are left alone.
_ROLE = re.compile(r":\w+:`~?([^`]+)`")  # of Sphinx, in docstrings
_MATHS = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Args:
        name: of the file, without suffix.
        address: the picture as a ``data:`` URL.
        width: in pixels.
        runs: names of the runs behind it.
        note: the notebook's remark on its origin.
    """

    name: str
    address: str
    width: int
    runs: list[str]
    note: str = ""

    @property
    def title(self) -> str:
        """``Notebook 02: mean squared error`` for ``02_mean_squared_error``."""
        number, _, rest = self.name.partition("_")
        return f"Notebook {number}: {rest.replace('_', ' ')}" if number.isdigit() and rest else self.name

    @classmethod
    def read(cls, path: Path) -> "Picture":
        """Read a PNG that :func:`faqd_lib.reporting.charts.save` wrote."""
        with Image.open(path) as image:
            runs, note, width = image.info.get(RUNS_KEY, ""), image.info.get(NOTE_KEY, ""), image.width
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return cls(path.stem, f"data:image/png;base64,{data}", width, runs.split(), note)

    def origin(self, records: Mapping[str, RunRecord]) -> str:
        """Number, seeds and dates of its runs, and how many of them no longer exist.

        ``records``: the finished runs, by name.
        """
        there = [records[run] for run in self.runs if run in records]
        parts = [self.note, tables.origin(there) if there else ""]
        if gone := len(self.runs) - len(there):
            parts.append(f"{gone} of its runs no longer exist: execute its notebook again.")
        return " ".join(filter(None, parts))


def write_report(suite: Suite, shown: Sequence[tables.Table] | None = None) -> Path:
    """Write the report of everything in the suite's folder; returns the path of ``index.html``.

    The claims stand first: as a picture, saved in ``figures/``, and as cards.

    Args:
        suite: of a series or a study.
        shown: tables beside the claims. None: T1 to T5 and the failure signs.

    Raises:
        ResultsError: a record or the file of the paper's values is damaged; see :mod:`faqd_lib.reporting.tables`.
    """
    folder = require_writable(suite.folder / "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals["style"] = Markup(environment.loader.get_source(environment, "style.css")[0])
    environment.filters["html"] = _html
    environment.globals["code_style"] = Markup(HtmlFormatter(style="friendly").get_style_defs(".highlight"))
    pages = _notebook_pages(suite.folder / "notebooks", folder / "notebooks", environment.get_template("notebook.html"))
    records = suite.store.records()
    verdicts = claims.table(suite)
    beside = [*tables.all_tables(suite), signs.table(suite)] if shown is None else shown
    forest = _forest(suite, verdicts, records)
    pictures = [Picture.read(path) for path in sorted((suite.folder / "figures").glob("*.png"))]
    text = environment.get_template("report.html").render(
        suite=suite,
        seeds=_seeds(suite),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        finished=tables.span(record.finished[:10] for record in records),
        claims=verdicts,
        cards=_cards(verdicts),
        forest=forest,
        rule=_ROLE.sub(r"\1", (claims if suite.profile.study is None else verdict_rule).__doc__.partition("\n\n")[2]),
        tables=beside,
        pictures=[picture for picture in pictures if picture.name != FOREST],
        environments=_environments(records),
        seconds=clock(sum(record.cost["training_seconds"] for record in records)),
        runs=len(records),
        by_name={record.run_id: record for record in records},
        notebooks=[(page.stem.replace("_", " "), f"notebooks/{page.name}") for page in pages],
    )
    return atomic_write_text(folder / "index.html", text)


def _notebook_pages(executed: Path, folder: Path, template: jinja2.Template) -> list[Path]:
    """Write a page of each notebook in ``executed`` to ``folder``. One that is cut short is named and left out."""
    pages = []
    for copy in sorted(executed.glob("*.ipynb")):
        try:
            body = notebook_html(copy)
        except nbformat.reader.NotJSONError:
            print(f"the report leaves out {copy}: it is cut short; --only {copy.name[:2]} executes its notebook again")
            continue
        page = template.render(title=copy.stem.replace("_", " "), body=body)
        pages.append(atomic_write_text(folder / f"{copy.stem}.html", page))
    return pages


def _seeds(suite: Suite) -> str:
    count, planned = suite.profile.seeds, ""
    if suite.profile.study is not None:
        count, planned = len(suite.profile.study.seeds), "planned "
    return f"{count} {planned}seed{'s' * (count != 1)}"


def _forest(suite: Suite, verdicts: tables.Table, records: Sequence[RunRecord]) -> Picture | None:
    """The claims as intervals, drawn from their table; None where no claim in percentage points has an interval."""
    frame = study_claims.forest_frame(verdicts)
    if frame.empty:
        return None
    behind = [record for record in records if record.run_id in verdicts.runs]
    png, _ = charts.save(charts.forest(frame, suite.metric), require_writable(suite.folder / "figures"), FOREST, behind)
    return Picture.read(png)


def _cards(verdicts: tables.Table) -> list[dict[str, str]]:
    """Each claim as texts: ``claim``, ``verdict``, ``measured`` (empty without a number), ``compared``, ``seeds``."""
    made = []
    for row in verdicts.frame.to_dict("records"):
        compared = row.get("contrast", row.get("compared"))
        number, interval = row["difference"], row.get("95 % interval", "")
        unit = "" if compared.endswith(study_claims.LOGARITHM) else " points"
        measured = f"{number}{unit}" + (f" ({interval})" if interval else "") if number[:1] in ("+", "-") else ""
        made.append(
            {
                "claim": row["claim"], "verdict": row["verdict"], "measured": measured, "compared": compared,
                "seeds": row["n (seeds)"],
            }
        )  # fmt: skip
    return made


def _environments(records: Sequence[RunRecord]) -> list[dict[str, object]]:
    """Machine and software of the runs: each setting once, with all its values."""
    frame = pd.DataFrame([record.environment for record in records])
    return [{"what": name, "values": ", ".join(sorted({*map(str, values.dropna())}))} for name, values in frame.items()]


def _html(frame: pd.DataFrame) -> Markup:
    return Markup(frame.to_html(index=False, border=0, escape=True, na_rep=""))


def mathml(latex: str, display: bool) -> str:
    """A formula as MathML. A formula that cannot be converted becomes a code span."""
    try:
        return convert(latex.strip(), display="block" if display else "inline")
    except _NO_FORMULA:
        return f"<code>{html.escape(latex)}</code>"


def notebook_html(path: Path) -> Markup:
    """An executed notebook's cells and outputs as HTML."""
    notebook = nbformat.read(path, as_version=4)
    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        if match["code"]:
            return match["code"]
        formulas.append(mathml(match["display"] or match["inline"], display=bool(match["display"])))
        return f"FORMULA{len(formulas) - 1}E"  # contains no Markdown; replaced by the formula below

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _MATHS.sub(keep, cell.source)
    exporter = HTMLExporter(template_name="basic", embed_images=True, exclude_output_prompt=True)
    exporter.exclude_anchor_links = True
    body, _ = exporter.from_notebook_node(notebook)
    return Markup(re.sub(r"FORMULA(\d+)E", lambda match: formulas[int(match[1])], body))
