"""The README's pictures of a sweep, taken of a real one: `python tools/screenshots.py <sweep folder> [docs/pictures]`.

    sweep_compare.png   MLflow's compare page of its runs
    sweep_curves.png    the page behind one of its metrics
    sweep_report.png    the upper part of report.html
    sweep_table.png     the table that a terminal shows

Needs playwright (extra `test`) and a Chromium of the system; its runs were tracked in a database that is a file.
The browser tests drive the same pages with what stands here.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from vitexp import tracking
from vitexp.commands import ui
from vitexp.sweeps.display import Row, standing, table
from vitexp.sweeps.jobs import Job
from vitexp.sweeps.ledger import Ledger, read_ledger
from vitexp.sweeps.report import find

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 120_000  # on a busy machine MLflow takes a minute for its first page
PICTURE_BYTES = 200_000
TALL = 2000  # pixels of a page, more than any picture here shows
SHARP = 1.5  # pixels of a picture for one of the page
REST_MS = 2000  # until a plot has come to rest
CLICKS, CLICK_MS = 6, 20_000  # until a click counts as lost
# The assistant's panel covers a third of every page until it is closed.
NO_ASSISTANT = """
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
"""
CHART = "svg.main-svg"
TABLE_COLUMNS = 112
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #1e1e1e }}
pre {{ display: inline-block; margin: 0; padding: 18px 22px; color: #d8d8d8;
       font: 15px/17px "DejaVu Sans Mono", monospace }}
</style><pre>{code}</pre>"""


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0]).resolve()
    output = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).parent.parent / "docs" / "pictures"
    with mlflow_server(store_of(folder)) as address, browser() as chromium:
        for path in take(chromium, address, folder, output):
            print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return 0


# ---- the browser, and what it looks at -------------------------------------------------------------------------------


def system_chromium() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """The system's Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    path = system_chromium()
    if path is None:
        raise SystemExit(f"no browser here: one of {', '.join(BROWSERS)} is wanted, such as Debian's package chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


def open_page(chromium: Any, *, width: int = 1400, height: int = 900, scale: float = 1.0) -> Any:
    page = chromium.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page.set_default_timeout(WAIT_MS)
    page.add_init_script(NO_ASSISTANT)
    return page


@contextlib.contextmanager
def mlflow_server(store: str) -> Iterator[str]:
    """The address of MLflow's pages on the store, on a free port; ends with all that it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as said, ui.server(store, "127.0.0.1", port, said) as process:
        ui.answers(address, process, [], said)
        yield address


# ---- a sweep in MLflow -----------------------------------------------------------------------------------------------


def ledger_of(folder: Path) -> Ledger:
    ledger = read_ledger(folder)
    if ledger is None:
        raise SystemExit(f"{folder} holds no sweep: sweep.json is missing")
    return ledger


def store_of(folder: Path) -> str:
    """Where the sweep's runs are tracked."""
    record = next(folder.glob(f"*/{tracking.RECORD_NAME}"), None)
    uri = None if record is None else json.loads(record.read_text(encoding="utf-8"))["uri"]
    if uri is None:
        raise SystemExit(f"{folder}: its runs are not in MLflow")
    return uri


def runs_of(address: str, folder: Path) -> list[dict[str, Any]]:
    """The sweep's finished runs as MLflow's own interface tells them, in the order of the ledger."""
    found = []
    for name, entry in ledger_of(folder).jobs.items():
        if entry.state == "finished":
            record = json.loads((folder / name / tracking.RECORD_NAME).read_text(encoding="utf-8"))
            run_id = record["stores"][record["uri"]]["run_id"]
            with urllib.request.urlopen(f"{address}/api/2.0/mlflow/runs/get?run_id={run_id}", timeout=60) as answer:
                found.append(json.load(answer)["run"])
    return found


def runs_link(address: str, runs: Sequence[Mapping[str, Any]], *, group: str) -> str:
    """The experiment's table beside its charts, of a group's runs alone."""
    asked = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    asked["searchFilter"] = f"tags.`vitexp.group` = '{group}'"
    return f"{address}/#/experiments/{runs[0]['info']['experiment_id']}/runs?{urllib.parse.urlencode(asked)}"


def compare_link(address: str, runs: Sequence[Mapping[str, Any]]) -> str:
    asked = {
        "runs": json.dumps([run["info"]["run_id"] for run in runs]),
        "experiments": json.dumps([runs[0]["info"]["experiment_id"]]),
        "workflowType": "machine_learning",
    }
    return f"{address}/#/compare-runs?{urllib.parse.urlencode(asked)}"


def param_of(key: str, run: Mapping[str, Any]) -> str:
    """The swept key as MLflow names it: a group's option is a param of `choices`."""
    return key if any(one["key"] == key for one in run["data"]["params"]) else f"choices.{key}"


def click(target: Any, until: Callable[[int], Any]) -> None:
    """Clicks until it shows: a click while MLflow moves its parts about can be lost. `until` waits so many ms."""
    from playwright.sync_api import TimeoutError as TimedOut

    for left in reversed(range(CLICKS)):
        target.click()
        try:
            until(CLICK_MS)
            return
        except TimedOut:
            if not left:
                raise


def follow_metric(page: Any, metric: str) -> None:
    """From the compare page to the page of one metric, by its link."""
    link = page.get_by_role("link", name=metric, exact=True)
    click(link, until=lambda ms: page.wait_for_url("**/#/metric?**", timeout=ms))


def choose(page: Any, place: int, wanted: Sequence[str]) -> None:
    """Leaves in the compare page's list (0: params, 1: metrics) of what the plot shows these alone."""
    chosen = page.locator(".du-bois-light-select").nth(place)
    for name in chosen.locator("[class$=selection-item]").all_inner_texts():
        if name not in wanted:
            item = chosen.locator("[class$=selection-item]").filter(has=page.get_by_text(name, exact=True))
            item.locator("[class$=selection-item-remove]").click()
    left = chosen.locator("[class$=selection-item]").all_inner_texts()
    for name in wanted:
        if name not in left:
            options = page.locator("[class*=select-dropdown]:visible")
            click(chosen, until=lambda ms, options=options: options.wait_for(timeout=ms))
            _scrolled_to(options, name).click()
            page.keyboard.press("Escape")


def _scrolled_to(options: Any, name: str) -> Any:
    """The option of an open list, which draws only those in sight."""
    option = options.locator(f"[class*=select-item-option][title='{name}']")
    options.hover()
    for _ in range(100):
        if option.count():
            return option
        options.page.mouse.wheel(0, 150)
        options.page.wait_for_timeout(100)
    raise AssertionError(f"MLflow's list has no {name}")


# ---- the pictures ----------------------------------------------------------------------------------------------------


def take(chromium: Any, address: str, folder: Path, output: Path) -> list[Path]:
    """Draws all of them into `output` and returns their paths."""
    ledger, runs = ledger_of(folder), runs_of(address, folder)
    metric = find(ledger, metric=ledger.metric, maximize=ledger.maximize).metric
    if metric is None:
        raise SystemExit(f"{folder}: no run has finished with a metric to judge it by")
    output.mkdir(parents=True, exist_ok=True)
    pages = open_page(chromium, height=TALL, scale=SHARP)
    pages.goto(compare_link(address, runs))
    return [
        take_compare(pages, ledger, runs, metric, output / "sweep_compare.png"),
        take_curves(pages, metric, output / "sweep_curves.png"),
        take_report(open_page(chromium, width=1100, scale=SHARP), folder, output / "sweep_report.png"),
        take_table(open_page(chromium, width=1600, scale=SHARP), ledger, output / "sweep_table.png"),
    ]


def take_compare(page: Any, ledger: Ledger, runs: Sequence[Mapping[str, Any]], metric: str, path: Path) -> Path:
    """The parallel coordinates of what was swept, and the params that differ."""
    page.wait_for_selector(CHART)
    page.get_by_role("button", name="Toggle sidebar").click()
    choose(page, 0, [param_of(key, runs[0]) for key in ledger.swept])
    choose(page, 1, [metric])
    page.get_by_text("Run details", exact=True).click()  # folded away: names and times
    page.get_by_role("switch", name="Parameters - Show diff only").click()
    page.wait_for_timeout(REST_MS)
    end = page.get_by_text("Metrics", exact=True).bounding_box()["y"]
    return save(upper_part(page, end - 16), path)


def take_curves(page: Any, metric: str, path: Path) -> Path:
    """The page that the compare page's own link leads to."""
    follow_metric(page, metric)
    page.wait_for_selector(CHART)
    page.wait_for_timeout(REST_MS)
    end = page.get_by_role("heading", name=metric).last.bounding_box()["y"]
    return save(upper_part(page, end - 16), path)


def take_report(page: Any, folder: Path, path: Path) -> Path:
    """As far as the end of its first picture."""
    page.goto((folder / "report.html").as_uri())
    picture = page.locator("figure").first.bounding_box()
    return save(upper_part(page, picture["y"] + picture["height"] + 16), path)


def upper_part(page: Any, height: float) -> bytes:
    clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": min(height, TALL)}
    return page.screenshot(clip=clip, full_page=True)


def take_table(page: Any, ledger: Ledger, path: Path) -> Path:
    page.set_content(TERMINAL.format(code=terminal_html(ledger)))
    return save(page.locator("pre").screenshot(), path)


def terminal_html(ledger: Ledger) -> str:
    """The live table as it stood at the sweep's end."""
    rows = []
    for name, entry in ledger.jobs.items():
        values = {text.partition("=")[0]: text.partition("=")[2] for text in entry.overrides}
        job = Job(name, tuple(entry.overrides), {key: values[key] for key in ledger.swept if key in values})
        rows.append(Row(job, entry, standing(ledger.folder / name, metric=ledger.metric)))
    console = Console(record=True, file=io.StringIO(), force_terminal=True, width=TABLE_COLUMNS)
    console.print(table(rows, title=f"sweep {ledger.folder.name}"))
    return console.export_html(theme=DIMMED_MONOKAI, inline_styles=True, code_format="{code}")


def save(screenshot: bytes, path: Path) -> Path:
    """A PNG with as many colours as its size allows."""
    picture = Image.open(io.BytesIO(screenshot)).convert("RGB")
    for colours in (256, 128, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < PICTURE_BYTES:
            return path
    raise SystemExit(f"{path}: larger than {PICTURE_BYTES} bytes with 32 colours")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
