"""What a run says and leaves behind: train.log, metrics.jsonl and its mirror, summary.json, plots, weights."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitexp import checkpoint, journal, plots, tracking
from vitexp.attention_maps import attention_maps, has_attention_maps, position_similarity
from vitexp.config import CONFIG_NAME, RAW_NAME
from vitexp.costs import count_parameters
from vitexp.data.batch_transforms import normalise
from vitexp.data.loader import train_batches
from vitexp.data.sampler import Position
from vitexp.errors import UserError
from vitexp.evaluators.token_labels import labelled_pictures
from vitexp.export import description_of, export_model, export_part
from vitexp.horizon import Horizon
from vitexp.methods.token_labeling import TokenLabeling
from vitexp.progress import Display
from vitexp.run import Run
from vitexp.run_folder import write_atomic
from vitexp.seeding import derive_seed
from vitexp.state import State
from vitexp.types import Progress

log = logging.getLogger("vitexp")

OUTPUTS = Path("outputs")  # MLflow's default database lies here, so that all runs started from one place compare
BEST_WEIGHTS = "model_best.safetensors"
AVERAGED_WEIGHTS = "model_ema.safetensors"  # where train.ema_decay keeps an average: at its best, or the last one
RESTORED = "val/reconstruction_"  # arrays of vitexp.evaluators.reconstruction
PICTURES_EVERY_S = 60.0
INPUTS_SHOWN, ATTENDED = 24, 5  # pictures in inputs.png and in attention.png
MIXED = 0.1  # share of a class in a mixed picture from which on it is named: above what label smoothing gives
NEAR_ZERO = 0.02  # of the first loss
LARGE_WEIGHTS = 10**9  # bytes; such checkpoints take longer than a person waits without a word
VERSIONS = ("vitexp", "torch", "torchvision", "timm", "accelerate", "hydra-core", "mlflow", "numpy")


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """All that vitexp logs goes into the file with times and tracebacks, and from INFO on also to a person."""
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in (to_file, to_person):
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate
        for handler in (to_file, to_person):
            log.removeHandler(handler)
        to_file.close()


class _ToPerson(logging.Handler):
    """Lines on stderr; above the bar while there is one."""

    display: Display | None = None

    def emit(self, record: logging.LogRecord) -> None:
        text = ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        if self.display is not None:
            self.display.line(text)
        else:
            with contextlib.suppress(OSError, ValueError):  # nobody reads: no reason to stop a run
                print(text, file=sys.stderr, flush=True)


to_person = _ToPerson(logging.INFO)


class NoBooks:
    """What every rank but the first keeps: nothing."""

    def stepped(self, step: int) -> None: ...

    def trained(self, at: Progress, metrics: dict[str, float]) -> None: ...

    def evaluated(self, at: Progress, metrics: dict[str, float], arrays: dict[str, np.ndarray]) -> None: ...

    def pause(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def evaluating(self, done: int, of: int) -> None: ...

    def export(self, metrics: dict[str, float], *, filename: str) -> None: ...

    def save(self, state: State, *, keep: int, world: int) -> None: ...

    def finish(self, state: State) -> dict[str, Any]:
        return {}

    def close(self, status: str) -> None: ...


class Books(NoBooks):
    """The first rank's: rows into the journal, MLflow behind it, numbers on the display, files in the run folder."""

    def __init__(
        self, run: Run, folder: Path, horizon: Horizon, *, facts: dict[str, Any], state: State, resumed: bool
    ) -> None:
        self.run, self.folder, self.facts = run, folder, facts
        self._check_space(state)
        self.journal = journal.Journal(folder / tracking.JOURNAL_NAME)
        # Rows beyond the checkpoint come again; so does an evaluation that was interrupted right after it.
        redone = None if state.evaluated else state.step
        self.journal.truncate_after(state.step, also=lambda row: row["step"] == redone and "train/loss" not in row)
        rows = journal.read(self.journal.path) if self.journal.path.exists() else []
        self.last_metrics = next((_metrics(row) for row in reversed(rows) if "train/loss" not in row), {})
        self.shown: dict[str, Any] = {}
        self.drawn_at = time.monotonic()
        self.speed = Speedometer(facts["global_batch"], state.step)
        self.mirror = run.make_mirror(
            folder,
            root=OUTPUTS,
            run_name=folder.name if run.config.group is None else f"{run.config.group}/{folder.name}",
            params={**run.config.resolved, "derived": facts},
            tags=tracking.run_tags(
                folder, stage=run.config.stage.name, model=run.model_name, data=run.source.name, group=run.config.group
            ),
            dataset=tracking.DataFingerprint(
                name=run.source.name,
                digest=run.source.fingerprint(),
                source=run.data_location,
                profile=run.source.profile(),
            ),
        )
        self.mirror.artifacts([CONFIG_NAME, RAW_NAME])
        self._introduce(horizon, resumed_at=state.step if resumed else None)
        self.mirror.wait_imported()
        self.display = to_person.display = Display(total=horizon.num_updates, start=state.step)

    def _check_space(self, state: State) -> None:
        """Refuses at the start what could not be saved later: keep + 1 checkpoints of weights and momentum at least."""
        folder = self.folder / "checkpoints"
        keep = self.run.config.train.keep
        there = len(list(folder.glob("step_*")))
        copies = max(keep + 1 - there, 1) if keep else 1
        checkpoint.check_space(folder, 2 * checkpoint.state_bytes(state.method.state_dict()), copies=copies)

    def stepped(self, step: int) -> None:
        self.speed.step = step
        self.display.step(step)

    def trained(self, at: Progress, metrics: dict[str, float]) -> None:
        self._row(at, metrics | self.speed.row())

    def evaluated(self, at: Progress, metrics: dict[str, float], arrays: dict[str, np.ndarray]) -> None:
        self._row(at, metrics)
        self.last_metrics = metrics
        log.info("step %d  epoch %.2f  %s", at.step, at.epoch, _said(metrics))
        restored = {name: array for name, array in arrays.items() if name.startswith(RESTORED)}
        if restored:  # one file an evaluation, to see them become clearer
            plots.reconstructions(
                self.folder / "plots" / "reconstructions" / f"epoch_{at.epoch:06.1f}.png",
                pixel_mean=self.run.preprocessing["mean"],
                pixel_std=self.run.preprocessing["std"],
                **{name.removeprefix(RESTORED): array for name, array in restored.items()},
            )
        # A picture takes a quarter of a second: the last ones always, those on the way now and then.
        if at.step == self.facts["total_steps"] or time.monotonic() - self.drawn_at > PICTURES_EVERY_S:
            self.drawn_at = time.monotonic()
            plots.curves(journal.read(self.journal.path), self.folder / "plots" / "curves.png")
            if "val/confusion" in arrays:
                path = self.folder / "plots" / "confusion.png"
                plots.confusion_matrix(arrays["val/confusion"], self.run.source.classes, path)
            if "val/calibration" in arrays:
                plots.reliability(arrays["val/calibration"], self.folder / "plots" / "calibration.png")
            if at.step < self.facts["total_steps"]:  # the last ones are drawn at the end
                with _optional(self.folder / "plots"):
                    draw_token_labels(self.run, self.folder / "plots", epoch=at.epoch)

    def evaluating(self, done: int, of: int) -> None:
        self.display.busy(f"evaluating {done}/{of}")

    def _row(self, at: Progress, metrics: dict[str, float]) -> None:
        self.shown |= self.journal.append({"step": at.step, "epoch": at.epoch, **metrics})
        self.display.log(self.shown)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around an evaluation or a save, which are no slow steps."""
        with self.speed.pause(), self.display.pause():
            yield

    def export(self, metrics: dict[str, float], *, filename: str) -> None:
        run = self.run
        export_model(
            self.folder,
            run.backbone.state_dict(),
            architecture=run.architecture,
            classes=run.source.classes,
            preprocessing=run.preprocessing,
            metrics=metrics,
            stage=run.config.stage.name,
            filename=filename,
        )

    def save(self, state: State, *, keep: int, world: int) -> None:
        with self.pause():
            self.journal.flush(fsync=True)  # its rows up to this step must outlive what the checkpoint outlives
            if checkpoint.state_bytes(state.method.state_dict()) > LARGE_WEIGHTS:
                log.info("saving step %d: a large checkpoint, this takes a while", state.step)
            content = state.to_checkpoint() | {"classes": self.run.source.classes, "world_size": world}
            path = checkpoint.save(self.folder / "checkpoints", content, step=state.step, keep=keep)
            log.debug("saved %s", path)

    def finish(self, state: State) -> dict[str, Any]:
        """Leaves the weights, summary.json and curves, and hands everything to MLflow. Returns the summary."""
        self.export(self.last_metrics, filename="model.safetensors")
        if state.ema is not None and not (self.folder / AVERAGED_WEIGHTS).exists():  # nothing told a best one
            with state.ema.swapped_in():
                self.export({}, filename=AVERAGED_WEIGHTS)
        for name, part in self.run.method.parts.items():
            export_part(self.folder, name, part.state_dict())
        rows = journal.read(self.journal.path)
        if not self.last_metrics:  # never evaluated, so never drawn
            plots.curves(rows, self.folder / "plots" / "curves.png")
        trained = next((_metrics(row) for row in reversed(rows) if "train/loss" in row), {})
        source = self.run.source
        summary = {
            "step": state.step,
            "epoch": rows[-1]["epoch"] if rows else 0.0,
            **{name: value for name, value in (trained | self.last_metrics).items() if not name.startswith("perf/")},
            **state.best,
            "perf/images_per_s": round(self.speed.average(), 2),
            "perf/wall_s": round(self.speed.wall_s(), 2),
            **self.facts,
            "seed": self.run.config.seed,
            "name": self.run.config.name,
            "data": {"name": source.name, "fingerprint": source.fingerprint(), "classes": len(source.classes)},
            "versions": versions(),
            "git": tracking.git_state(Path.cwd()),
        }
        if self.run.config.train.overfit is not None:
            summary["learned_by_heart"] = learned_by_heart(rows)
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        with _optional(self.folder / "plots"):
            draw_pictures(self.run, self.folder / "plots")
            draw_token_labels(self.run, self.folder / "plots", epoch=rows[-1]["epoch"] if rows else 0.0)
        left = [CONFIG_NAME, RAW_NAME, "summary.json", "plots"]
        if self.run.config.train.log_weights:
            judged = {"best/val/top1": BEST_WEIGHTS, "best/val_ema/top1": AVERAGED_WEIGHTS}
            found = {file: state.best[score] for score, file in judged.items() if score in state.best}
            best = max(found, key=found.__getitem__, default="model.safetensors")
            left += [best, description_of(Path(best)).name]
        self.mirror.artifacts(left)
        self.display.close()
        farewell(self.folder, summary, self.mirror.ui_line)
        return summary

    def close(self, status: str) -> None:
        """The end, whatever it is: FINISHED, FAILED or KILLED."""
        self.display.close()
        to_person.display = None
        self.journal.flush(fsync=True)
        self.journal.close()
        if status == "KILLED":
            self.mirror.kill()
        else:
            self.mirror.close(status)

    def _introduce(self, horizon: Horizon, *, resumed_at: int | None) -> None:
        """The lines a person reads first: what will be trained on what, at which rate, and where it goes."""
        run, source, facts = self.run, self.run.source, self.facts
        kinds = f"{len(source.classes)} classes" if source.classes else "no labels"
        held_out = f"{len(source.val)} to validate" if source.val is not None else "none to validate"
        log.info("data        %s: %d pictures to train, %s, %s", source.name, len(source.train), held_out, kinds)
        for note in run.notes:
            log.info("            %s", note)
        log.info(
            "model       %s: %.2f M parameters, %.3g GFLOPs a picture",
            run.model_name,
            facts["parameters"] / 1e6,
            facts["gflops"],
        )
        log.info(
            "training    %d updates of %d pictures, %d an epoch; peak lr %.4g; %s on %s",
            horizon.num_updates,
            facts["global_batch"],
            horizon.updates_per_epoch,
            facts["lr"],
            facts["precision"],
            facts["device"],
        )
        log.info("run folder  %s", self.folder)
        if self.mirror.ui_line:
            log.info("compare     %s", self.mirror.ui_line)
        if resumed_at is not None:
            log.info("resumed     after step %d", resumed_at)
        log.debug("command: %s", " ".join(sys.argv))
        log.debug("%s, pid %d, seed %d", versions(), os.getpid(), run.config.seed)


@contextlib.contextmanager
def _optional(folder: Path) -> Iterator[None]:
    """Around pictures that need the data or the model once more: no reason to call a run failed."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        log.warning("not all of %s is drawn: %s", folder, error)


def draw_token_labels(run: Run, folder: Path, *, epoch: float) -> None:
    """token_labels/epoch_*.png of a run that learns from label maps: what it is taught of some places, and says."""
    if run.train_data.maps is None or not isinstance(run.method, TokenLabeling):
        return
    pixels = {key: run.preprocessing[key] for key in ("mean", "std")}
    rows = labelled_pictures(run.method, run.train_data, run.source.train, mix=run.mix, seed=run.config.seed, **pixels)
    plots.token_labels(
        rows,
        run.source.classes,
        folder / "token_labels" / f"epoch_{epoch:06.1f}.png",
        pixel_mean=pixels["mean"],
        pixel_std=pixels["std"],
    )


def draw_pictures(run: Run, folder: Path) -> None:
    """What the model was shown and made of it: inputs.png, and of a ViT positions.png and attention.png.

    The inputs are the first of the run, augmented and mixed as training does, in pixels again."""
    mean, std = run.preprocessing["mean"], run.preprocessing["std"]
    device = next(run.backbone.parameters()).device
    shown = next(train_batches(run.train_data, batch_size=INPUTS_SHOWN, seed=run.config.seed, workers=0))
    if run.mix is not None:
        seed = derive_seed(run.config.seed, 0)
        shown = replace(shown, images=normalise(shown.images, mean, std))
        shown = run.mix(shown, num_classes=run.architecture["num_classes"], seed=seed)
        shown = replace(shown, images=_pixels(shown.images, mean, std))
    classes = run.source.classes
    titles = [_class_words(target, classes) for target in shown.targets] if classes else None
    plots.picture_grid(shown.images, titles, folder / "inputs.png")

    similarity = position_similarity(run.backbone)
    if similarity is not None:
        plots.position_similarity(similarity.numpy(), folder / "positions.png")
    if has_attention_maps(run.backbone):
        looked_at = run.val_data if run.val_data is not None else run.train_data
        spread = np.linspace(0, len(looked_at) - 1, min(len(looked_at), ATTENDED)).round().astype(np.int64)
        pictures, labels = looked_at.fetch(Position(seed=run.config.seed, epoch=0, index=spread))
        maps = attention_maps(run.backbone, normalise(torch.from_numpy(pictures).to(device), mean, std))
        titles = [classes[label] if classes and label >= 0 else "" for label in labels]
        plots.attention(pictures, maps.last.numpy(), maps.rollout.numpy(), titles, folder / "attention.png")


def _pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 pictures from normalised ones; what erasing and such put beyond black and white is cut off."""
    means, stds = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return ((images * stds + means) * 255).round().clamp(0, 255).byte().cpu()


def _class_words(target: torch.Tensor, classes: list[str]) -> str:
    """The class of a number or of a row of shares; two where a picture is mixed of two, empty for none."""
    if target.ndim == 0:
        return classes[int(target)] if target >= 0 else ""
    best = target.topk(min(2, len(classes)))
    return " + ".join(
        classes[number]
        for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if share > MIXED
    )


class Speedometer:
    """Pictures a second of training, evaluations and saves left out."""

    def __init__(self, images_per_step: int, step: int) -> None:
        self.images_per_step = images_per_step
        self.step = self._first = self._logged = step
        self._began = self._logged_at = time.monotonic()
        self._paused = self._paused_before = 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def row(self) -> dict[str, float]:
        """Since the last row."""
        now = time.monotonic()
        seconds = now - self._logged_at - (self._paused - self._paused_before)
        images = (self.step - self._logged) * self.images_per_step
        self._logged, self._logged_at, self._paused_before = self.step, now, self._paused
        return {"perf/images_per_s": images / max(seconds, 1e-9)}

    def average(self) -> float:
        return (self.step - self._first) * self.images_per_step / max(self.wall_s() - self._paused, 1e-9)

    def wall_s(self) -> float:
        return time.monotonic() - self._began


def farewell(folder: Path, summary: dict[str, Any], ui_line: str) -> None:
    """The result, on standard output: what a script or a person looks for at the end."""
    told = {
        name: value
        for name, value in summary.items()
        if name == "val/loss" or (name.startswith("val") and name.endswith("top1"))
    }
    lines = [f"result      {_said(told)}"]
    lines = lines if lines[0].strip() != "result" else [f"result      {summary['step']} updates made"]
    if heart := summary.get("learned_by_heart"):
        told = f"the loss went from {heart['first_loss']:.4g} to {heart['last_loss']:.3g}"
        lines.append(f"by heart    {'yes' if heart['near_zero'] else 'no'}: {told}")
    lines += [f"run folder  {folder}", f"curves      {folder / 'plots' / 'curves.png'}"]
    if ui_line:
        lines.append(f"compare     {ui_line}")
    with contextlib.suppress(OSError, ValueError):
        print("\n".join(lines), flush=True)


def learned_by_heart(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the training loss came near zero, to NEAR_ZERO of where it began, and from what to what."""
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return {"near_zero": losses[-1] <= NEAR_ZERO * losses[0], "first_loss": losses[0], "last_loss": losses[-1]}


def already_done(folder: Path) -> dict[str, Any]:
    """The summary of a run that has nothing left to do."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    log.info(
        "already finished: %s updates; give a larger train.max_steps or another output_dir to go on", summary["step"]
    )
    farewell(folder, summary, "")
    return summary


def facts_of(
    run: Run, horizon: Horizon, *, lr: float, global_batch: int, precision: str, device: str, processes: int
) -> dict[str, Any]:
    """What was resolved for this run: sizes, learning rate, lengths. Keys of summary.json and MLflow params."""
    return {
        "parameters": count_parameters(run.backbone),
        "gflops": round(run.gflops(), 4),
        "lr": lr,
        "global_batch": global_batch,
        "total_steps": horizon.num_updates,
        "precision": {"no": "fp32"}.get(precision, precision),
        "device": device,
        "processes": processes,
        "threads": torch.get_num_threads(),
        **({} if run.token_labels is None else {"token_labels": run.token_labels.fingerprint()}),
        **({} if run.teacher is None else {"teacher": f"{run.teacher.name} {run.teacher.weights_sha256[:12]}"}),
    }


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "/" in name and name != journal.TIME_KEY}


def _said(metrics: dict[str, float]) -> str:
    percent = ("top", "accuracy")
    words = {n: f"{100 * v:.2f} %" if any(p in n for p in percent) else f"{v:.4g}" for n, v in metrics.items()}
    return "  ".join(f"{name} {word}" for name, word in words.items())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
