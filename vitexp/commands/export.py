"""`python -m vitexp export run=<run> format=safetensors|timm|torch_export|onnx|hf|mlflow`: weights for others.

Writes a folder (`output`; by default export/<format> in the run's) with the model, and README.md, a model card. It is
opened again and compared with the run before it appears, whole or not at all. A folder that is there already is
replaced with overwrite=true, if it is an export.

`run` is what it is in every command: a run folder, weights it exported, or mlflow:<run id> with `uri=`; `weights` names
one of its files. Instead, `average=<k>` takes the mean of the run's last k checkpoints and `ema=true` the moving
average in the last one. `register=<name>` with format=mlflow also logs the export in the run's MLflow, as a new version
of the registered model of this name. Needs `pip install 'vitexp[export]'` for onnx."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitexp import tracking
from vitexp.errors import UserError, nearest
from vitexp.locate import Located, locate, store_of_training, truth, words_given

if TYPE_CHECKING:
    from vitexp.trained import TrainedRun

KEYS = ("run", "format", "output", "weights", "average", "ema", "overwrite", "uri", "register")
FORMAT_NAMES = ("safetensors", "timm", "torch_export", "onnx", "hf", "mlflow")
USAGE = f"python -m vitexp export run=<run folder> format={'|'.join(FORMAT_NAMES)} output=<folder>"
CARD = "README.md"
TOLERANCE = 1e-3  # of the largest logit: far above float32's rounding in another order, far below another computation


def main(arguments: list[str], config_dir: str | None) -> int:
    given = words_given(arguments, KEYS, command="export")
    for key in ("run", "format"):
        if not given.get(key):
            raise UserError(f"export: {key}= is missing\nusage: {USAGE}")
    name = given["format"]
    if name not in FORMAT_NAMES:
        raise UserError(
            f"format={name}: no such format.{nearest(name, FORMAT_NAMES)} There are {', '.join(FORMAT_NAMES)}"
        )
    registered = given.get("register") or None
    if registered is not None:
        if name != "mlflow":
            raise UserError(f"register={registered}: MLflow registers format=mlflow, not format={name}")
        tracking.check_model_name(registered, key="register")
    overwrite, ema, count = _flag(given, "overwrite"), _flag(given, "ema"), _count(given, "average")
    averaged = [key for key, asked in (("average", count is not None), ("ema", ema)) if asked]
    if len(averaged) + ("weights" in given) > 1:
        both = " and ".join([*averaged, *(["weights"] if "weights" in given else [])])
        raise UserError(f"export: {both} each say which weights are meant: give one of them")
    found = locate(given["run"], uri=given.get("uri") or None, weights=given.get("weights") or None)
    output = Path(given.get("output") or found.folder / "export" / name).expanduser()

    from vitexp.signals import StopRequest

    with StopRequest():  # a signal ends it as an error does: what is half-written is removed
        checked = export(
            found, name, output, average=count, ema=ema, overwrite=overwrite, config_dir=config_dir,
            command=" ".join(["python -m vitexp export", *map(shlex.quote, arguments)]),
        )  # fmt: skip
    print(f"{name} in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(checked)
    if registered is not None:
        from vitexp.reports import OUTPUTS

        run_id, uri = tracking.run_id_of(given["run"]), given.get("uri") or store_of_training()
        print(tracking.register(output, registered, run_dir=found.folder, run_id=run_id, root=OUTPUTS, uri=uri))
    return 0


def export(
    found: Located,
    name: str,
    output: Path,
    *,
    average: int | None = None,
    ema: bool = False,
    overwrite: bool = False,
    config_dir: str | None = None,
    command: str = "",
) -> str:
    """Leaves the export in `output` and returns a sentence on how it compares with the run. Raises UserError."""
    from vitexp.export_formats import FORMATS, is_installed
    from vitexp.model_card import command_of, model_card, read_records
    from vitexp.run_folder import cannot, make_folder, write_atomic

    form = FORMATS[name]
    missing = [package for package in form.needs if not is_installed(package)]
    if missing:
        raise UserError(f"format={name} needs {' and '.join(missing)}: pip install 'vitexp[export]'")
    _check_output(output, overwrite=overwrite)
    run, weights = _opened(found, average=average, ema=ema)
    records = read_records(found.folder)

    make_folder(output.parent)
    beside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        make_folder(beside)
        _tell(f"writing {name}")
        form.write(run, beside)
        checked = "Not compared with the run here: " + " and ".join(form.reads_with) + " is not installed."
        if all(is_installed(package) for package in form.reads_with):
            _tell("opening it again, to compare it with the run")
            checked = _compare(run, form.reopen(beside), name)
        card = model_card(
            run,
            records,
            weights=weights,
            training=command_of(records, config_dir),
            export=command,
            library={"timm": "timm", "hf": "transformers", "onnx": "onnx"}.get(name, "vitexp"),
            usage=form.usage.format(folder=output),
            checked=checked,
        )
        write_atomic(beside / CARD, card)
        _put_in_place(beside, output)
    except OSError as error:
        raise cannot("write", output, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return checked


def _opened(found: Located, *, average: int | None, ema: bool) -> tuple[TrainedRun, str]:
    """The model with the weights asked for, and which they are, in words."""
    from vitexp import averaging
    from vitexp.trained import load_run

    file = found.weights or "model.safetensors"
    checkpoints = found.folder / "checkpoints"
    if average is None and not ema:
        return load_run(found.folder, weights=file), f"`{file}` of the run"
    if found.weights is None and (found.folder / "model_best.safetensors").exists():
        file = "model_best.safetensors"  # of a run that has not ended: it has the same architecture
    run = load_run(found.folder, weights=file)
    _tell("reading checkpoints")
    averaged = (
        averaging.moving_average(checkpoints) if average is None else averaging.mean_of_last(checkpoints, average)
    )
    run.model.load_state_dict(averaging.backbone_weights(averaged.state, run.model.state_dict()))
    steps = ", ".join(map(str, averaged.steps))
    if average is None:
        # The last evaluation of a run measured the average as it was then, which is that of its last checkpoint.
        measured = {name: value for name, value in run.metrics.items() if name.startswith("val_ema/")}
        at_the_end = file == "model.safetensors" and averaged.steps[0] == _last_step(found.folder)
        return replace(run, metrics=measured if at_the_end else {}), f"moving average after step {steps}"
    return replace(run, metrics={}), f"mean of the run's checkpoints of steps {steps}"


def _last_step(folder: Path) -> int | None:
    from vitexp.model_card import read_records

    return read_records(folder).summary.get("step")


def _compare(run: TrainedRun, reopened: object, name: str) -> str:
    from vitexp.export_formats import largest_difference

    difference, largest = largest_difference(run, reopened)  # type: ignore[arg-type]
    if not difference <= TOLERANCE * max(largest, 1e-3):
        raise UserError(
            f"format={name}: what was written does not compute what the run does (logits differ by {difference:.3g}, "
            f"the largest is {largest:.3g}); nothing was kept"
        )
    return f"Opened again it gives the run's logits: largest difference {difference:.2g}, largest logit {largest:.3g}."


# ---- the folder ------------------------------------------------------------------------------------------------------


def _check_output(output: Path, *, overwrite: bool) -> None:
    """UserError for what is there already, unless it may be replaced: an export, and nothing besides."""
    from vitexp.export_formats import FORMATS

    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise UserError(f"output={output}: is there already and no folder")
    there = {path.name for path in output.iterdir()}
    foreign = sorted(there - {CARD}.union(*(form.files for form in FORMATS.values())))
    if foreign or (there and CARD not in there):
        what = f"holds {foreign[0]}" if foreign else "holds no README.md"
        raise UserError(f"output={output}: is no export to be replaced, it {what}; give another folder")
    if there and not overwrite:
        raise UserError(f"output={output}: holds an export already; overwrite=true replaces it")


def _put_in_place(beside: Path, output: Path) -> None:
    """The folder under its name, the one before it gone; at any moment one of them is whole."""
    from vitexp.run_folder import sync_folder

    sync_folder(beside)
    if output.exists():
        replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced.tmp")
        os.rename(output, replaced)
        os.rename(beside, output)
        shutil.rmtree(replaced)
    else:
        os.rename(beside, output)
    sync_folder(output.parent)


# ---- the command line ------------------------------------------------------------------------------------------------


def _tell(what: str) -> None:
    """What goes on, for steps that take a while and say nothing themselves."""
    print(f"{what} …", file=sys.stderr, flush=True)


def _flag(given: dict[str, str], key: str) -> bool:
    return bool(truth(f"export: {key}", given.get(key)))


def _count(given: dict[str, str], key: str) -> int | None:
    value = given.get(key)
    if value is not None and (not value.isdecimal() or int(value) < 1):
        raise UserError(f"export: {key}={value}: expected a whole number of at least 1")
    return None if value is None else int(value)
