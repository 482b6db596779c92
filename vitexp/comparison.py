"""Several finished runs on the same validation pictures: what each answers, what tells their settings apart, and what
stands in the way of comparing them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import sparse
from torch import Tensor

from vitexp import journal
from vitexp.commands.predict import open_run
from vitexp.config import CONFIG_NAME, RAW_NAME, compose_and_check
from vitexp.data.batch_transforms import normalise
from vitexp.data.images import Images, Source, Subset, listed
from vitexp.data.label_store import class_difference
from vitexp.data.memory import cores
from vitexp.errors import UserError
from vitexp.locate import locate, names_data, own_settings
from vitexp.metrics import ClassificationMeter
from vitexp.run import open_source
from vitexp.statistics import Interval, McNemar, Spread, mcnemar, mean_std, paired_bootstrap
from vitexp.tracking import flatten
from vitexp.trained import TrainedRun

# Top-level settings that say where a run is kept and how it is watched: no difference between two runs.
BOOKKEEPING = ("output_dir", "resume", "allow_changes", "name", "group", "tracking", "sweep", "pipeline", "hydra")
DEFAULT_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One run, as its folder tells."""

    name: str  # short, and unlike those of the others
    weights: Path
    settings: dict[str, str]  # dotted keys, as composed; empty where only the weights were copied
    summary: dict[str, Any]
    curve: list[tuple[float, float]]  # (epoch, val/top1)
    classes: list[str]  # empty where it is no classifier
    preprocessing: dict[str, Any]
    recorded: dict[str, float]  # metrics of the evaluation that the weights come from

    @property
    def seed(self) -> str | None:
        return self.settings.get("seed")

    @property
    def fingerprint(self) -> str | None:
        """Of all pictures that it learned from and was measured on; None where it is not known."""
        return self.summary.get("data", {}).get("fingerprint")


@dataclass(frozen=True, eq=False)
class Answers:
    """What a classifier says of each of n pictures."""

    predicted: np.ndarray  # (n,) int64 number of the class
    probability: np.ndarray  # (n,) float64 of that class
    right: np.ndarray  # (n,) bool
    among_five: np.ndarray  # (n,) bool: the own class is among the five best
    loss: np.ndarray  # (n,) float64 cross entropy in nats; nan where a logit is not finite
    ece: float


@dataclass(frozen=True)
class Pictures:
    """What all are measured on."""

    images: Images
    labels: np.ndarray  # (n,) positions in classes
    classes: list[str]  # all that the runs know, those of the data first
    where: str


@dataclass(frozen=True)
class Pair:
    """The second of two less the first."""

    differences: dict[str, Interval]
    mcnemar: McNemar


@dataclass(frozen=True)
class Measured:
    """What was measured anew on the same pictures. Shares are fractions 0..1, the loss in nats."""

    pictures: Pictures
    answers: dict[int, Answers]  # by position of the entry
    metrics: dict[int, dict[str, Interval]]
    pairs: dict[tuple[int, int], Pair]


@dataclass(frozen=True)
class Comparison:
    """All there is to show."""

    entries: list[Entry]
    groups: list[list[int]]  # positions of the runs that differ in seed alone
    warnings: list[str]
    notes: list[str]
    measured: Measured | None  # None where there are not two classifiers

    def group_name(self, group: Sequence[int]) -> str:
        name = self.entries[group[0]].name
        return name if len(group) == 1 else f"{name} and {len(group) - 1} more"

    def differing_settings(self) -> list[tuple[str, list[str]]]:
        """(key, value of each group) of those settings that are not the same in all, choices first; — is for none."""
        settings = [self.entries[group[0]].settings for group in self.groups]
        keys = dict.fromkeys(key for flat in settings for key in flat if key != "seed")
        found = [(key, [flat.get(key, "—") for flat in settings]) for key in keys]
        found = [(key, values) for key, values in found if len(set(values)) > 1]
        seeds = [", ".join(self.entries[i].seed or "—" for i in group) for group in self.groups]
        if len(set(seeds)) > 1 or len(self.groups) == 1 < len(self.groups[0]):
            found.append(("seed", seeds))
        return sorted(found, key=lambda row: not row[0].startswith("choices."))

    def spreads(self) -> list[tuple[list[int], dict[str, Spread]]]:
        """Mean and spread of each metric in each group; where nothing was measured anew, of what training recorded."""
        found = []
        for group in self.groups:
            each = [self.figures(i) for i in group]
            names = [name for name in each[0] if all(name in figures for figures in each)]
            found.append((group, {name: mean_std([figures[name] for figures in each]) for name in names}))
        return found

    def figures(self, i: int) -> dict[str, float]:
        """Metrics of one run, measured anew or else recorded."""
        if self.measured is not None and i in self.measured.metrics:
            return {name: float(found.value) for name, found in self.measured.metrics[i].items()}
        return {name: value for name, value in self.entries[i].recorded.items() if value is not None}


def compare(
    entries: list[Entry],
    overrides: Sequence[str] = (),
    *,
    config_dir: str | None = None,
    device: str | None = None,
    batch_size: int = 64,
    tell: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Comparison:
    """Compares runs on the validation split of the first classifier, or that of the data that `overrides` choose.

    tell hears a run's name, the pictures done, and how many there are in all. Raises UserError."""
    groups = seed_groups(entries)
    warnings, notes = differences_that_matter(entries, groups), []
    classifiers = [i for i, entry in enumerate(entries) if entry.classes]
    for entry in entries:
        if not entry.classes:
            notes.append(f"{entry.name} is no classifier: its metrics are those that training recorded")
    measured = None
    if len(classifiers) > 1:
        chosen = [entries[i] for i in classifiers]
        check_classes(chosen)
        pictures, said, warned = shared_pictures(chosen, overrides, config_dir)
        notes, warnings = [*notes, *said], [*warnings, *warned]
        answers: dict[int, Answers] = {}
        for position, i in enumerate(classifiers):
            name, done = entries[i].name, position * len(pictures.labels)
            told = _adding(tell, name, done, len(classifiers) * len(pictures.labels))
            run = open_run(str(entries[i].weights), device=device)
            answers[i] = ask(run, pictures, batch_size=batch_size, tell=told)
        measured = measure(answers, pictures)
        notes += _sure(measured, entries)
    return Comparison(entries, groups, warnings, notes, measured)


def _adding(tell: Callable[[str, int, int], None], name: str, before: int, total: int) -> Callable[[int], None]:
    return lambda done: tell(name, before + done, total)


# ---- the runs


def open_entries(runs: Sequence[str], *, uri: str | None, weights: str | None) -> list[Entry]:
    """What is known of folders, exported weights and mlflow:<id>. Raises UserError naming one that is not there."""
    found = []
    for run in runs:
        try:
            found.append(locate(run, uri=uri if run.startswith(("mlflow:", "runs:/")) else None, weights=weights))
        except UserError as error:  # it speaks of run=, as it is called elsewhere
            raise UserError(str(error).replace(f"run={run}", run)) from None
    files = [place.folder / (place.weights or DEFAULT_WEIGHTS) for place in found]
    if uri is not None and not any(run.startswith(("mlflow:", "runs:/")) for run in runs):
        raise UserError(f"uri={uri}: says where mlflow:<run id> is; all runs given are paths")
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise UserError(f"{runs[number]}: is given twice")
    raw = all((place.folder / RAW_NAME).exists() for place in found)
    names = short_names(files)
    return [_entry(name, file, RAW_NAME if raw else CONFIG_NAME) for name, file in zip(names, files, strict=True)]


def _entry(name: str, file: Path, config: str) -> Entry:
    folder = file.parent
    run = open_run(str(file), device="cpu")
    summary, rows = folder / "summary.json", folder / "metrics.jsonl"
    text = summary.read_text(encoding="utf-8") if summary.exists() else "{}"
    try:
        tree = json.loads(text)
        settings = yaml.safe_load((folder / config).read_text(encoding="utf-8")) if (folder / config).exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: what is beside the weights cannot be read: {str(error).splitlines()[0]}") from None
    curve = [row for row in journal.read(rows) if "val/top1" in row] if rows.exists() else []
    return Entry(
        name=name,
        weights=file,
        settings=settings_of(settings),
        summary=tree,
        curve=[(row["epoch"], row["val/top1"]) for row in curve],
        classes=run.classes if run.architecture.get("num_classes") else [],
        preprocessing=run.preprocessing,
        recorded={key: value for key, value in run.metrics.items() if value is not None},
    )


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys and their values as text, without bookkeeping."""
    if not config:
        return {}
    kept = {key: value for key, value in config.items() if key not in BOOKKEEPING}
    choices = kept.get("choices", {})
    kept["choices"] = {key: value for key, value in choices.items() if key.partition("/")[0] not in BOOKKEEPING}
    return flatten(kept)


def short_names(files: Sequence[Path]) -> list[str]:
    """The last parts of each path that tell it from the others; of weights not by the usual name that name, too."""
    parts = [(*f.parent.resolve().parts, *([] if f.name == DEFAULT_WEIGHTS else [f.stem])) for f in files]
    names = []
    for own in parts:
        count = 1 if files[parts.index(own)].name == DEFAULT_WEIGHTS else 2
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]))
    return names


def seed_groups(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of the runs that differ in seed alone, in the order given; a run like no other is a group of one."""
    alike: list[tuple] = []
    groups: list[list[int]] = []
    for i, entry in enumerate(entries):
        settings = sorted((key, value) for key, value in entry.settings.items() if key != "seed")
        own = (settings, entry.weights.name, entry.fingerprint, entry.preprocessing)
        for known, group in zip(alike, groups, strict=True):
            # The same seed twice is a repetition, which has no spread; of bare weights nothing is known.
            if settings and known == own and entry.seed not in [entries[other].seed for other in group]:
                group.append(i)
                break
        else:
            alike.append(own)
            groups.append([i])
    return groups


def differences_that_matter(entries: Sequence[Entry], groups: Sequence[Sequence[int]]) -> list[str]:
    """A sentence each for data, preprocessing and seeds that are not the same in all runs, or not known."""
    said = []
    prints = {entry.name: entry.fingerprint for entry in entries}
    if len(set(prints.values())) > 1 or None in prints.values():
        what = "differ" if len(set(prints.values()) - {None}) > 1 else "may differ"
        shown = _by_value({name: value or "not known" for name, value in prints.items()})
        said.append(f"data {what}, by the fingerprints of what each learned from and was measured on: {shown}")
    for key in dict.fromkeys(key for entry in entries for key in entry.preprocessing):
        values = {entry.name: json.dumps(entry.preprocessing.get(key)) for entry in entries}
        if len(set(values.values())) > 1:
            said.append(f"preprocessing differs in {key}: {_by_value(values)}")
    seeds = {", ".join(sorted(entries[i].seed or "not known" for i in group)) for group in groups}
    if len(seeds) > 1:
        said.append(f"seeds differ: {_by_value({entry.name: entry.seed or 'not known' for entry in entries})}")
    elif len(groups) == 1:
        said.append(f"seeds differ ({seeds.pop()}), and nothing else: what differs between these runs is chance")
    return said


def _by_value(values: Mapping[str, str]) -> str:
    """`3f3b (a, b); 77aa (c)`"""
    return "; ".join(
        f"{value} ({listed(name for name, own in values.items() if own == value)})"
        for value in dict.fromkeys(values.values())
    )


# ---- the pictures


def check_classes(entries: Sequence[Entry]) -> None:
    """Raises UserError naming the run that knows other classes than the first."""
    first = entries[0]
    for entry in entries[1:]:
        if set(entry.classes) != set(first.classes):
            told = class_difference(entry.classes, first.classes)
            raise UserError(
                f"{entry.name} knows other classes than {first.name} and cannot be compared with it: {told}"
            )


def shared_pictures(
    entries: Sequence[Entry], overrides: Sequence[str], config_dir: str | None
) -> tuple[Pictures, list[str], list[str]]:
    """The labelled pictures that all are to be measured on, notes and warnings. Raises UserError.

    Those are the validation split of the first run, less what others did not hold out; or what `overrides` choose."""
    first, warnings = entries[0], []
    source = _source_of(first, overrides, config_dir)
    if source.val is None:
        raise UserError(f"data={source.name}: has no validation split to compare on; choose another with data=…")
    images, notes = source.val, []
    if overrides:
        notes.append(
            f"the pictures were chosen by {' '.join(overrides)}: whether a run has learned from them is not told"
        )
    else:
        if first.fingerprint not in (None, source.fingerprint()):
            warnings.append(f"the pictures of {first.name} have changed since it learned from them")
        held_out = np.ones(len(images), bool)
        names = _identities(images, source.classes)
        for entry in entries[1:]:
            others, told = _held_out_by(entry, first, source, config_dir)
            warnings += told
            if others is None:
                continue
            both = np.array([name in others for name in names])
            if not both.any():
                raise UserError(
                    f"{entry.name} holds out other pictures than {first.name}: none has the same name, class and size\n"
                    "data=… chooses pictures that neither has learned from"
                )
            if not both.all():
                warnings.append(f"{entry.name} holds out {both.sum():,} of the {len(both):,} pictures of {first.name}")
            held_out &= both
        if not held_out.all():
            warnings.append(f"compared on the {held_out.sum():,} pictures that all hold out")
            images = Subset(images, np.flatnonzero(held_out))
    if len(images) < 2:
        raise UserError(
            f"{len(images)} pictures are left that all runs hold out: nothing to compare on; data=… chooses"
        )
    if (images.labels < 0).any():
        missing = images.names[int(np.flatnonzero(images.labels < 0)[0])]
        raise UserError(f"data={source.name}: a picture to compare on has no label: {missing}")
    unknown = [name for name in source.classes if name not in first.classes]
    if unknown:
        raise UserError(
            f"data={source.name}: has classes that the runs do not know: {listed(unknown)}\n"
            f"train.classes=[{','.join(first.classes[:12])}{',…' if len(first.classes) > 12 else ''}] takes only theirs"
        )
    classes = [*source.classes, *(name for name in first.classes if name not in source.classes)]
    where = f"{len(images):,} validation pictures of {source.name}"
    return Pictures(images, images.labels, classes, where), notes, warnings


def _source_of(first: Entry, overrides: Sequence[str], config_dir: str | None) -> Source:
    found = locate(str(first.weights))
    config = own_settings(found, list(overrides), config_dir)
    if config is None:
        if not names_data(overrides):
            raise UserError(
                f"{first.name}: no settings beside its weights; choose the pictures to compare on with data=…"
            )
        config = compose_and_check(list(overrides), config_dir)
    return open_source(config)


def _held_out_by(
    entry: Entry, first: Entry, source: Source, config_dir: str | None
) -> tuple[set[tuple[str, str, int]] | None, list[str]]:
    """The pictures that a run was measured on while training, None where they are the first one's or not known; and
    what is to be said of that."""
    data = [_data_settings(one) for one in (entry, first)]
    if data[0] and data[0] == data[1]:
        return None, []
    if first.fingerprint is not None and entry.fingerprint == first.fingerprint:
        return None, []
    unknown = f"{entry.name}: what it has learned from is not known here"
    try:
        config = own_settings(locate(str(entry.weights)), [], config_dir)
        if config is None:
            return None, [f"{unknown}, the pictures compared on may be among it"]
        if "channels" in config.data["source"] and source.val is not None:
            config.data["source"]["channels"] = source.val.read(0).shape[2]  # arrays have their size by it
        other = open_source(config)
    except UserError as error:
        raise UserError(
            f"{entry.name}: has other pictures than {first.name}, and which it holds out cannot be told: {error}\n"
            "data=… chooses pictures that neither has learned from"
        ) from None
    return set() if other.val is None else set(_identities(other.val, other.classes)), []


# Of the data's settings those that choose no pictures.
HOW_SHOWN = ("data.channels", "data.source.channels", "data.flip", "data.mean", "data.std", "data.cache", "data.name")


def _data_settings(entry: Entry) -> dict[str, str]:
    """What decides which pictures a run holds out, and which it has at all."""
    wanted = {key: value for key, value in entry.settings.items() if key.startswith(("data.", "train.classes"))}
    return {key: value for key, value in wanted.items() if key not in HOW_SHOWN and value != "null"}


def _identities(images: Images, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    rows = zip(images.names, images.labels.tolist(), images.sizes.tolist(), strict=True)
    return [(name, classes[k] if k >= 0 else "", size) for name, k, size in rows]


# ---- what they answer


def ask(run: TrainedRun, pictures: Pictures, *, batch_size: int, tell: Callable[[int], None]) -> Answers:
    """What the exported model says of each picture, prepared as its own run prepared them, in float32."""
    columns = torch.tensor([run.classes.index(name) for name in pictures.classes])
    meter = ClassificationMeter(len(pictures.classes), confusion=False)
    labels = torch.from_numpy(np.asarray(pictures.labels, np.int64))
    found: list[tuple[Tensor, ...]] = []
    done = 0
    for images in _read(run, pictures.images, batch_size):
        own = labels[done : done + len(images)]
        with torch.inference_mode():
            ready = normalise(images.to(run.device), run.preprocessing["mean"], run.preprocessing["std"])
            logits = run.model(ready).float().cpu()[:, columns]
        meter.add(logits, own)
        found.append(_judged(logits, own))
        done += len(images)
        tell(done)
    predicted, probability, ahead, loss = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    ece = meter.scores().ece
    assert ece is not None
    return Answers(predicted, probability.astype(np.float64), ahead < 1, ahead < 5, loss.astype(np.float64), ece)


def _judged(logits: Tensor, own: Tensor) -> tuple[Tensor, ...]:
    """Class and its probability, classes ranked before the own one, cross entropy: each (b,), as ClassificationMeter
    counts them: of equal logits the lower class ranks first, one that is not finite is wrong."""
    finite = torch.isfinite(logits).all(dim=1)
    score = logits.gather(1, own[:, None])
    lower = torch.arange(logits.shape[1]) < own[:, None]
    ahead = ((logits > score) | ((logits == score) & lower)).sum(dim=1)
    best = logits.softmax(dim=1).max(dim=1)
    loss = torch.nn.functional.cross_entropy(logits.double(), own, reduction="none")
    never = torch.where(finite, ahead, logits.shape[1] + 5)
    return logits.argmax(dim=1), best.values, never, torch.where(finite, loss, torch.nan)


def _read(run: TrainedRun, images: Images, batch_size: int) -> Iterator[Tensor]:
    """uint8 (b, c, h, w) in order; threads read the next batch while one is computed. Raises BadImage."""
    names = images.names

    def prepared(i: int) -> Tensor:
        return run.prepare(images.read(i), names[i])

    pool = ThreadPoolExecutor(max_workers=cores())
    try:
        ahead = [pool.submit(prepared, i) for i in range(min(batch_size, len(images)))]
        for begin in range(batch_size, len(images) + batch_size, batch_size):
            batch, end = ahead, min(begin + batch_size, len(images))
            ahead = [pool.submit(prepared, i) for i in range(begin, end)]
            yield torch.stack([one.result() for one in batch])
    finally:
        pool.shutdown(cancel_futures=True)


def measure(answers: Mapping[int, Answers], pictures: Pictures) -> Measured:
    """Metrics of each with intervals, and for each pair intervals of the differences and McNemar's test.

    ECE has no interval: pictures that are drawn twice make every resample look less calibrated than the original."""
    order, present = list(answers), np.unique(pictures.labels)
    names = ["top1", *(["top5"] if len(pictures.classes) > 5 else []), "loss", "mean_class_accuracy"]
    classes = sparse.csr_array(np.asarray(pictures.labels)[:, None] == present).astype(np.float64)
    found = paired_bootstrap([_columns(answers[i], classes, names) for i in order], _statistic(len(names) - 1))
    metrics = {}
    for i, one in zip(order, found.each, strict=True):
        metrics[i] = _named(names, one) | {"ece": Interval(answers[i].ece, np.nan, np.nan)}
    pairs = {}
    for (a, b), between in found.differences.items():
        first, second = answers[order[a]], answers[order[b]]
        test = mcnemar(first.right, second.right)
        ece = Interval(second.ece - first.ece, np.nan, np.nan)
        pairs[order[a], order[b]] = Pair(_named(names, between) | {"ece": ece}, test)
    return Measured(pictures, dict(answers), metrics, pairs)


def _columns(own: Answers, classes: sparse.csr_array, names: Sequence[str]) -> sparse.csr_array:
    """(n, m): right, among five, loss; and of each class whether the picture is of it and right, and is of it."""
    plain = {"top1": own.right, "top5": own.among_five, "loss": own.loss}
    first = np.stack([plain[name] for name in names if name in plain], axis=1).astype(np.float64)
    right = classes.multiply(own.right[:, None].astype(np.float64))
    return sparse.csr_array(sparse.hstack([sparse.csr_array(first), right, classes], format="csr"))


def _statistic(plain: int) -> Callable[[np.ndarray], np.ndarray]:
    def metrics(means: np.ndarray) -> np.ndarray:
        right, there = np.split(means[:, plain:], 2, axis=1)
        share = np.where(there > 0, right / np.where(there > 0, there, 1), 0)  # a class may be missing from a resample
        return np.column_stack([means[:, :plain], share.sum(axis=1) / (there > 0).sum(axis=1)])

    return metrics


def _named(names: Sequence[str], found: Interval) -> dict[str, Interval]:
    return {
        name: Interval(*(float(part[k]) for part in (found.value, found.low, found.high)))
        for k, name in enumerate(names)
    }


def _sure(measured: Measured, entries: Sequence[Entry]) -> list[str]:
    """What an interval without width does not say, and how many tests were made."""
    said, n = [], len(measured.pictures.labels)
    perfect = [entries[i].name for i, own in measured.answers.items() if own.right.all()]
    if perfect:
        least = 100 * 0.025 ** (1 / n)
        said.append(
            f"{listed(perfect)}: no error in {n:,} pictures, and resampling makes none; the exact binomial limit of "
            f"top1 is {least:.2f} %"
        )
    if len(measured.pairs) > 1:
        count = len(measured.pairs)
        said.append(
            f"{count} pairs were tested, and each p is of its own test: by Bonferroni p < {0.05 / count:.2g} stands "
            "for 0.05 in all"
        )
    return said


def refuse_inside(output: Path, entries: Sequence[Entry]) -> None:
    """Raises UserError where `output` lies in the folder of a run, which is to stay as it is."""
    place = Path(os.path.realpath(output))
    for entry in entries:
        if Path(os.path.realpath(entry.weights.parent)) in (place, *place.parents):
            raise UserError(f"output={output}: lies in the folder of {entry.name}, which is left as it is")
