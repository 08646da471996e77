"""The numbers behind a chart as CSV, in a link that carries them along."""

import csv
import io
import re
from urllib.parse import quote

from mlx_grpo.report.charts import Chart


def table(chart: Chart) -> str:
    """CSV with a row for each place on the axis and a column for each line, all points of it."""
    lines = [(line.name, dict(line.points)) for line in chart.lines if line.points]
    places = sorted({x for _, points in lines for x in points})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([chart.axis, *(name for name, _ in lines)])
    rows.writerows([x, *(points.get(x, "") for _, points in lines)] for x in places)
    return text.getvalue()


def link(chart: Chart) -> str:
    """The CSV as an address, for the page is one file."""
    return f"data:text/csv;charset=utf-8,{quote(table(chart))}"


def file_name(chart: Chart) -> str:
    """What the CSV is called where it is saved."""
    return re.sub(r"\W+", "-", chart.title.lower()).strip("-") + ".csv"
