"""`doctor` says what is wrong with a data set, leaves a page that needs nothing else, and an exit code for scripts."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.data.pictures import library, picture, write_folder
from vitexp.cli import _run
from vitexp.commands.doctor import main
from vitexp.config import compose_and_check
from vitexp.errors import UserError


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.named: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe"), tag
        self.named += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]


def test_healthy_pictures_are_no_finding_and_the_lines_to_paste_are_settings(tmp_path: Path, capsys):
    root = write_folder(tmp_path / "pictures", library(per_class=5))
    assert _run(["doctor", "data=folder", f"data.root={root}", f"output={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "SPOILS" not in said
    pasted = [word for line in re.findall(r"^  (\S.*?)  +#", said, re.M) for word in line.replace("'", "").split()]
    assert {word.partition("=")[0] for word in pasted} == {
        "data.mean", "data.std", "model.image_size", "model.patch_size",
    }  # fmt: skip
    compose_and_check(["model=vit_tiny", *pasted])


def test_a_flat_folder_with_broken_and_double_files_is_told_whole(tmp_path: Path, capsys):
    """Every unreadable picture is listed, not only the first; the page shows the double ones without a network."""
    files = {f"{n}.jpg": picture(n) for n in range(30)}
    files |= {f"copy{n}.jpg": picture(n) for n in range(30)}  # ten percent are held out: some pairs are torn
    files |= {"cut <b>.jpg": picture(99)[:200], "empty.png": b"", "text.gif": b"not here"}
    root = write_folder(tmp_path / "pictures", files)
    assert main(["data=folder", f"data.root={root}", f"output={tmp_path / 'out'}"], None) == 1
    said = capsys.readouterr().out
    assert "3 pictures of 63 cannot be read" in said
    with open(tmp_path / "out" / "findings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["picture"] for row in rows if row["check"] == "unreadable"} == {"cut <b>.jpg", "empty.png", "text.gif"}
    torn = [row for row in rows if row["check"] == "same in both splits"]
    assert torn
    for number in {row["group"] for row in torn}:
        pair = [row for row in torn if row["group"] == number]
        assert {row["split"] for row in pair} == {"train", "val"}
        assert len({row["picture"].removeprefix("copy") for row in pair}) == 1
    page = (tmp_path / "out" / "doctor.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.named) > 2 * len(torn) / 2
    assert all(name.startswith("data:image/") for name in links.named)
    assert "cut &lt;b&gt;.jpg" in page
    assert "<b>" not in page


def test_all_unreadable_is_told_too(tmp_path: Path, capsys):
    root = write_folder(tmp_path / "pictures", {f"{k}/{n}.png": b"" for k in "ab" for n in range(3)})
    assert main(["data=folder", f"data.root={root}", f"output={tmp_path / 'out'}"], None) == 1
    assert "6 pictures of 6 cannot be read" in capsys.readouterr().out


def test_the_report_has_a_place_of_its_own(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data=fake", "data.num_train=40", "data.num_val=10"], None) == 0
    assert [path.name for path in tmp_path.glob("outputs/doctor/fake-*/*")] != []
    assert re.search(r"outputs/doctor/fake-[0-9a-f]{12}/doctor\.html", capsys.readouterr().out)


@pytest.mark.parametrize("argument", ["output=", "data.rooot=x", "data=foldr"])
def test_bad_input_is_refused(argument: str):
    with pytest.raises(UserError):
        main(["data=digits", argument], None)
