"""A teacher is asked of what its student sees, in its own terms; one that cannot be is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexp import reports
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.run import build_run
from vitexp.teachers import Onlooker, Teacher, open_teacher
from vitexp.train import train

COMMON = [
    "data=fake", "data.num_train=24", "data.num_val=6", "data.num_classes=4", "train.batch_size=8", "tracking=none",
    "runtime.precision=fp32", "train.workers=0", "evaluators=none", "train.max_steps=2", "train.log_every=1",
]  # fmt: skip
STUDENT = ["model=deit_micro_distilled", "model.depth=1", "model.embed_dim=32", "augment=light"]


class Seeing(nn.Module):
    """Keeps what it was shown; its logits are sums of it."""

    num_classes = 3

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images.mean(dim=(2, 3))


def onlooker(**changed) -> Onlooker:
    given = {
        "model": Seeing(), "columns": range(3), "image_size": (8, 8), "mean": [0.5] * 3, "std": [0.25] * 3,
        "channels": 3, "interpolation": "bilinear", "resizer": "torch",
        "facts": {"name": "x", "weights_sha256": "00"},
    }  # fmt: skip
    return Onlooker(Teacher(**given | changed), mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 1.0])


def test_pictures_reach_the_teacher_in_its_own_normalisation_size_and_order_of_classes() -> None:
    raw = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = (raw - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.5, 1.0])[:, None, None]
    same = onlooker()
    torch.testing.assert_close(same(shown), ((raw - 0.5) / 0.25).mean(dim=(2, 3)))
    torch.testing.assert_close(onlooker(columns=[2, 0])(shown), same(shown)[:, [2, 0]])
    larger = onlooker(image_size=(16, 12))
    larger(shown)
    wanted = F.interpolate((raw - 0.5) / 0.25, (16, 12), mode="bilinear", antialias=True)
    torch.testing.assert_close(larger.model.seen, wanted, atol=1e-5, rtol=1e-5)


def test_with_the_students_own_normalisation_and_size_nothing_is_changed() -> None:
    like = onlooker(mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 1.0])
    shown = torch.randn(2, 3, 8, 8)
    like(shown)
    assert like.model.seen is shown


def test_grey_pictures_have_three_equal_channels_and_coloured_ones_are_refused_by_a_grey_teacher() -> None:
    teacher = Teacher(
        Seeing(), range(3), (8, 8), [0.5] * 3, [0.25] * 3, 3, "bilinear", "torch", {"name": "x", "weights_sha256": "0"}
    )
    grey = Onlooker(teacher, mean=[0.5], std=[0.5])
    raw = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(grey((raw - 0.5) / 0.5), ((raw - 0.5) / 0.25).mean(dim=(2, 3)).expand(2, 3))
    with pytest.raises(UserError, match="sees 1 channels, the pictures have 3"):
        onlooker(channels=1, mean=[0.5], std=[0.5])


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A run that can teach."""
    place = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reports, "draw_pictures", lambda run, folder: None)
        patched.setattr(reports.plots, "curves", lambda rows, path: None)
        train(compose_and_check([*COMMON, "model=vit_debug", f"output_dir={place}"]))
    return place


def settings(taught: object, *more: str) -> list[str]:
    return [*COMMON, *STUDENT, "method=distillation", f"method.teacher={taught}", *more]


def test_a_run_learns_from_another_and_evaluates_without_it(taught: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "draw_pictures", lambda run, folder: None)
    monkeypatch.setattr(reports.plots, "curves", lambda rows, path: None)
    summary = train(compose_and_check(settings(taught, f"output_dir={tmp_path / 'run'}")))
    assert summary["teacher"].startswith(str(taught))
    assert 0 <= summary["train/agreement"] <= 1
    away = compose_and_check(settings(tmp_path / "nowhere"))
    assert build_run(away, for_training=False).teacher is None
    with pytest.raises(UserError, match=r"method\.teacher=.*nowhere"):
        build_run(away)


def test_going_on_with_another_teacher_is_said(taught: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "draw_pictures", lambda run, folder: None)
    monkeypatch.setattr(reports.plots, "curves", lambda rows, path: None)
    teacher = tmp_path / "teacher"
    shutil.copytree(taught, teacher)
    given = settings(teacher, f"output_dir={tmp_path / 'run'}")
    train(compose_and_check([*given, "train.max_steps=1"]))
    train(compose_and_check([*COMMON, "model=vit_debug", "seed=1", "resume=never", f"output_dir={teacher}"]))
    train(compose_and_check([*given, "train.max_steps=2", "allow_changes=true"]))
    said = (tmp_path / "run" / "train.log").read_text()
    assert "the data has changed since this run's checkpoint (teacher: " in said


def test_the_weights_of_the_student_do_not_depend_on_the_teacher(taught: Path) -> None:
    plain = build_run(compose_and_check([*COMMON, *STUDENT])).backbone.state_dict()
    student = build_run(compose_and_check(settings(taught))).backbone.state_dict()
    assert all(torch.equal(plain[key], student[key]) for key in plain)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{bare}", "no run of vitexp exported; what says of which model they are makes a run"),
        ("timm:resnet81", "timm has no such model. Did you mean"),
        ("timm:resnet18", "timm's weights know 1,000 classes, the data has 4"),
        ("{run}/nothing", "nothing"),
    ],
)
def test_one_that_cannot_teach_is_named(taught: Path, tmp_path: Path, name: str, said: str) -> None:
    bare = tmp_path / "bare.pth"
    bare.write_bytes(b"x")
    with pytest.raises(UserError, match=r"^teacher=") as told:
        open_teacher(name.format(bare=bare, run=taught), ["class_0", "class_1", "class_2", "class_3"])
    assert said in str(told.value)


def test_a_teacher_of_other_classes_is_refused(taught: Path) -> None:
    with pytest.raises(UserError, match="was trained on other classes than the data has"):
        open_teacher(str(taught), ["cat", "dog"])


def test_a_method_that_needs_one_says_so_before_anything_is_built() -> None:
    with pytest.raises(UserError, match=r"method=distillation: needs method\.teacher="):
        compose_and_check([*COMMON, *STUDENT, "method=distillation"])
    with pytest.raises(UserError, match=r"method\.alpha=2: expected a number of at least 0 and at most 1"):
        compose_and_check(settings("x", "method.alpha=2"))
