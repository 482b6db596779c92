"""What a person sees of a sweep in a browser: MLflow's own pages of its runs, and files that need no network."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.data.pictures import library, write_folder
from tools.screenshots import (
    CHART,
    compare_link,
    follow_metric,
    ledger_of,
    mlflow_server,
    runs_link,
    runs_of,
    store_of,
    take,
)
from vitexp import pipeline_report
from vitexp.commands import compare, doctor

pytestmark = pytest.mark.slow

RUN = [
    "data=fake", "data.num_train=64", "data.num_val=16", "model=vit_debug", "train.workers=0",
    "train.epochs=3", "train.batch_size=16", "train.log_every=2",
]  # fmt: skip
RATES, SEEDS = ("0.001", "0.002"), ("0", "1")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """The folder of four finished runs."""
    place = tmp_path_factory.mktemp("place")
    store = place / "mlflow.db"
    store.write_bytes(mlflow_template.read_bytes())
    grid = [f"optim.lr={','.join(RATES)}", f"seed={','.join(SEEDS)}"]
    where = [f"tracking.uri=sqlite:///{store}", f"output_dir={place / 'rates'}"]
    done = subprocess.run(
        [sys.executable, "-m", "vitexp", "--multirun", *RUN, *grid, *where], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "rates"


@pytest.fixture(scope="module")
def mlflow(sweep: Path, chromium: Any) -> Iterator[str]:
    with mlflow_server(store_of(sweep)) as address:
        yield address


def wait_for_curves(page: Any, count: int) -> None:
    """Until a chart has so many lines of more than one point."""
    page.wait_for_function(
        """([chart, count]) => [...document.querySelectorAll(chart)].some(drawn =>
            [...drawn.querySelectorAll(".scatterlayer path.js-line")]
                .filter(line => (line.getAttribute("d") ?? "").includes("L")).length >= count)""",
        arg=[CHART, count],
    )


def row_of(page: Any, name: str) -> list[str]:
    """The cells of the compare page's row of a param."""
    row = page.get_by_role("row").filter(has=page.get_by_text(name, exact=True)).first
    return [text.strip() for text in row.locator("td, th").all_inner_texts()][1:]


def test_mlflow_lists_a_sweeps_runs_beside_their_curves(page: Any, mlflow: str, sweep: Path) -> None:
    page.goto(runs_link(mlflow, runs_of(mlflow, sweep), group=sweep.name))
    for name in ledger_of(sweep).jobs:
        page.get_by_role("link", name=f"{sweep.name}/{name}").wait_for()
    page.get_by_text("4 matching runs").wait_for()
    wait_for_curves(page, 4)
    assert {urlsplit(url).netloc for url in page.asked if url.startswith("http")} == {urlsplit(mlflow).netloc}


def test_mlflows_compare_page_shows_what_differs_and_leads_to_the_curves(page: Any, mlflow: str, sweep: Path) -> None:
    runs = runs_of(mlflow, sweep)
    page.goto(compare_link(mlflow, runs))
    page.get_by_text("Comparing 4 Runs from 1 Experiment").first.wait_for()
    page.wait_for_selector(CHART)
    assert sorted(row_of(page, "optim.lr")) == sorted(RATES * 2)
    assert sorted(row_of(page, "seed")) == sorted(SEEDS * 2)
    follow_metric(page, "val/top1")
    wait_for_curves(page, 4)


def report_of(sweep: Path, output: Path) -> Path:
    return sweep / "report.html"


def compare_of(sweep: Path, output: Path) -> Path:
    runs = [str(sweep / name) for name in list(ledger_of(sweep).jobs)[:2]]
    assert compare.main([*runs, f"output={output}", "device=cpu"], None) == 0
    return next(output.glob("*.html"))


def pipeline_of(sweep: Path, output: Path) -> Path:
    """A pipeline's page, of two runs of the sweep as its stages."""
    output.mkdir()
    names = list(ledger_of(sweep).jobs)[:2]
    parts = [pipeline_report.Part(name, sweep / name, None, None, None, None) for name in names]
    pipeline_report.write_report(output, name="two", parts=parts)
    return output / "report.html"


def doctor_of(sweep: Path, output: Path) -> Path:
    root = write_folder(output / "pictures", library(per_class=5))
    assert doctor.main(["data=folder", f"data.root={root}", f"output={output / 'found'}"], None) == 0
    return output / "found" / "doctor.html"


@pytest.mark.parametrize("made", [report_of, compare_of, pipeline_of, doctor_of])
def test_a_page_draws_its_pictures_with_no_network(made: Any, page: Any, sweep: Path, tmp_path: Path) -> None:
    path = made(sweep, tmp_path / "output")
    page.context.set_offline(True)
    page.goto(path.resolve().as_uri(), wait_until="load")
    widths = page.eval_on_selector_all("img", "pictures => pictures.map(one => one.naturalWidth)")
    drawings = page.eval_on_selector_all("svg", "all => all.map(one => one.getBoundingClientRect().width)")
    assert widths + drawings
    assert all(width > 0 for width in widths + drawings)
    assert {re.split(":", url)[0] for url in page.asked} <= {"file", "data"}, page.asked


def test_the_readmes_pictures_of_a_sweep_are_taken(chromium: Any, mlflow: str, sweep: Path, tmp_path: Path) -> None:
    taken = take(chromium, mlflow, sweep, tmp_path)
    assert {path.stem for path in taken} == {"sweep_compare", "sweep_curves", "sweep_report", "sweep_table"}
    for path in taken:
        picture = Image.open(path)
        assert picture.width > 600, path
        assert picture.height > 200, path
        assert path.stat().st_size < 200_000
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10, f"{path} is blank"
