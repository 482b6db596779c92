"""Checkpoints: all that a run needs to go on, saved whole or not at all, checked before it is believed.

    checkpoints/step_00000123/state.pt        torch zip of plain dicts, tensors, numbers and strings
    checkpoints/step_00000123/manifest.json   what the loader checks first: sizes, sha256, shapes, classes, versions

A folder with a plain name is complete: it was written under a hidden name, synced, and renamed as a whole. Hidden names
are work in progress: `.saving` (being written), `.replaced` (stepped aside for a new save of the same step), `.removed`
(being pruned). `step_N.damaged` is one that failed its checksums when a run resumed from the one before it.
Order is by step number, never by file time. One process writes (rank 0, holding the run's lock); any number may read.

Why not accelerate.save_state: a kill inside it left a broken folder that load_state then picked 11 times of 12.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vitexp
from vitexp.errors import UserError
from vitexp.run_folder import cannot, make_folder, sync_folder

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when an older vitexp could misread a newer checkpoint; keep _sealed as it is for ever
STATE_NAME, MANIFEST_NAME = "state.pt", "manifest.json"

# Config keys that cannot change what is learned, as prefixes of dotted keys. Everything under runtime can: another
# device, precision, compiler or number of threads rounds differently, and a resumed run promises equal bits.
HARMLESS_KEYS = (
    "output_dir",
    "resume",
    "allow_changes",
    "debug",
    "group",
    "tracking",
    "train.max_steps",
    "train.save_every",
    "train.keep",
    "train.log_every",
    "train.eval_every",
    "train.workers",
    "runtime.profile",
)


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was saved; the text names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found equal to what was saved."""

    path: Path
    step: int  # updates made
    manifest: dict[str, Any]


# ---------------------------------------------------------------- saving


def save(folder: Path, state: Mapping[str, Any], *, step: int, keep: int | None) -> Path:
    """`folder/step_<step>` with the state, in place as a whole; then older ones beyond `keep` go (0 or None: none go).

    `state` holds dicts, lists, tuples, tensors on any device, numbers, strings, bools and None (TypeError otherwise).
    It must have "model" (name -> tensor), "classes" (names, or None) and "world_size", which the manifest repeats for
    check_compatible. A step saved before is replaced, and stays readable until the new one is in place. UserError when
    the disk is full or fails; the earlier checkpoints are then untouched and nothing half-written is left."""
    plain = _plain(state, "state")
    assert {"model", "classes", "world_size"} <= plain.keys(), plain.keys()
    make_folder(folder, what="save checkpoints in")
    final, beside = folder / f"step_{step:08d}", folder / f".step_{step:08d}.saving"
    need = state_bytes(plain)
    try:
        _remove(beside)
        if _free(folder) < need:
            raise _not_saved(folder, step, need, None)
        beside.mkdir()
        size, digest = _write_state(beside / STATE_NAME, plain)
        manifest = {
            "format": FORMAT,
            "step": step,
            "files": {STATE_NAME: {"bytes": size, "sha256": digest}},
            "vitexp": vitexp.__version__,
            "torch": str(torch.__version__),
            "world_size": plain["world_size"],
            "classes": plain["classes"],
            "model": _shapes(plain["model"]),
        }
        with open(beside / MANIFEST_NAME, "wb") as file:
            file.write(_sealed(manifest))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(beside)
        _put_in_place(beside, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(beside)
        if isinstance(error, OSError):
            raise _not_saved(folder, step, need, error) from error
        raise
    try:
        _prune(folder, newest=step, keep=keep)
    except OSError as error:  # the new one is safe: no reason to stop a run
        log.warning("%s", cannot("remove older checkpoints in", folder, error))
    return final


def state_bytes(state: Any) -> int:
    """Bytes that `state` takes on disk, a little more and never less: each storage once, and room for the rest."""
    storages: dict[tuple[torch.device, int], int] = {}
    entries = 0
    todo = [state]
    while todo:
        value = todo.pop()
        entries += 1
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[value.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
        elif isinstance(value, str):
            entries += len(value) // 64
    return sum(storages.values()) + 512 * entries + 2**16


def check_space(folder: Path, need: int, *, copies: int = 1) -> None:
    """UserError, worded like a failed save, unless `copies` more checkpoints of `need` bytes fit where `folder` is.

    At the start of a run: copies = keep + 1 less those already there, since an old one goes after the new one is in."""
    make_folder(folder, what="save checkpoints in")
    free = _free(folder)
    if free < copies * need:
        raise UserError(
            f"not enough room for checkpoints in {folder}: needs {_size(copies * need)} ({copies} of {_size(need)}), "
            f"{_size(free)} free; free some, or lower train.keep"
        )


def _plain(value: Any, where: str) -> Any:
    """The value in types that torch.load accepts with weights_only. Tensors stay where they are and are not copied.

    Found out here and not at the resume: torch.save would write anything that pickles."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        if type(tensor) is not Tensor:
            tensor = tensor.as_subclass(Tensor)
        # torch.save writes a view's whole storage: a slice of a large buffer would take the buffer along.
        return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is {type(key).__name__}, a checkpoint has str and int keys")
        return {key: _plain(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner_values = [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
        return inner_values if isinstance(value, list) else tuple(inner_values)
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    for kind in (int, float, str):  # enums and the like
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{where} is {type(value).__name__}: a checkpoint holds dicts, lists, tensors, numbers and strings")


class _HashingFile:
    """What torch.save writes to: bytes go to file and digest in one pass (reading them back costs 0.7 s a GB)."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.size, self.digest = descriptor, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        written = 0
        try:
            while written < len(view):  # one call writes at most 2 GiB
                written += os.write(self.descriptor, view[written:])
        except OSError as error:
            self.error = error
            raise
        self.size += written
        return written

    def flush(self) -> None:
        """Asked for by torch.save; nothing is held back here."""


def _write_state(path: Path, state: dict[str, Any]) -> tuple[int, str]:
    """Size and sha256 of the file, written and synced. OSError with the true reason when the disk refuses."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    file = _HashingFile(descriptor)
    # The zip's own CRC32 would cost 0.6 s a GB, half of what the rest takes, and sha256 finds more. torch.load does not
    # read it; unzip and zipfile will complain about such a file.
    with_crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except Exception:
            if file.error is not None:  # torch says "unexpected pos 576 vs 534" for a full disk
                raise file.error from None
            raise
        os.fsync(descriptor)
    finally:
        torch.serialization.set_crc32_options(with_crc32)
        os.close(descriptor)
    return file.size, file.digest.hexdigest()


def _put_in_place(beside: Path, final: Path) -> None:
    """`beside` becomes `final`. At any moment `final` is whole, or the `.replaced` one is, which `latest` reads too."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        _remove(replaced)
        os.rename(final, replaced)
    try:
        os.rename(beside, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)
    _remove(replaced)


def _prune(folder: Path, *, newest: int, keep: int | None) -> None:
    """Leaves the newest `keep` up to the step just saved; what looks damaged is not counted.

    Newer ones are not this run's past and are left alone: resume_point has set them aside, so none are expected."""
    if not keep:
        return
    for step, path in _damaged(folder):
        if step <= newest:
            _remove(path)
    kept = 0
    for step, path in _complete(folder):
        if step > newest:
            continue
        if kept < keep and (step == newest or _looks_whole(path)):
            kept += 1
        else:
            _remove(path)


def _looks_whole(path: Path) -> bool:
    try:
        _check(path, read_files=False)
    except UserError:
        return False
    return True


def _remove(path: Path) -> None:
    """Removes a folder, never leaving half of it under a name that counts."""
    if not path.exists():
        return
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.removed")
        _remove(hidden)
        os.rename(path, hidden)
        path = hidden
    shutil.rmtree(path)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _not_saved(folder: Path, step: int, need: int, error: OSError | None) -> UserError:
    reason = f"{error.strerror or error}; " if error is not None else ""
    others = [s for s, _ in _complete(folder) if s != step]
    earlier = f"the previous checkpoint (step {others[0]}) is kept" if others else "there is no earlier checkpoint"
    try:
        room = f"needs {_size(need)}, {_size(_free(folder))} free"
    except OSError:
        room = f"needs {_size(need)}"
    return UserError(f"cannot save step {step} to {folder}: {reason}{room}; {earlier}")


# ---------------------------------------------------------------- finding and loading


def resume_point(folder: Path) -> Checkpoint | None:
    """`latest` for the run that holds the lock and will write here: also tidies up after killed and damaged saves.

    Damaged ones newer than the one found are renamed to `step_N.damaged`, so that they neither count as kept ones nor
    are warned about again; the next save past their step removes them."""
    found = None
    try:
        remove_leftovers(folder)
        found = latest(folder)
        if found is not None:
            for step, path in _complete(folder):
                if step > found.step:
                    aside = path.with_name(f"{path.name}.damaged")
                    _remove(aside)
                    os.rename(path, aside)
    except OSError as error:
        raise cannot("tidy up", folder, error) from error
    return found


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is what was saved, or None where none was ever completed. Reads only.

    Damaged ones on the way are named in warnings. UserError when there are only damaged ones, or when the newest was
    made by a newer vitexp: starting again from 0 is for the user to decide."""
    reasons: list[str] = []
    for step, path in _readable(folder):
        try:
            checkpoint = _check(path, read_files=True)
            if checkpoint.step != step:
                raise DamagedCheckpoint(f"{path}: holds step {checkpoint.step}, so it was renamed by hand")
        except DamagedCheckpoint as damage:
            reasons.append(str(damage))
            continue
        for reason in reasons:
            log.warning("damaged checkpoint: %s; using step %d", reason, checkpoint.step)
        return checkpoint
    reasons += [f"{path}: set aside as damaged" for _, path in _damaged(folder)]
    if reasons:
        raise UserError(
            f"no usable checkpoint in {folder}, all {len(reasons)} are damaged\n{reasons[0]}\n"
            "resume=never starts again from step 0 and keeps these files in previous/"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of that folder, checked. UserError naming the file where it is missing or damaged."""
    if not os.path.isdir(path):
        raise UserError(f"{path}: there is no checkpoint there; its name is like checkpoints/step_00000123")
    return _check(path, read_files=True)


def load(checkpoint: Checkpoint, *, mmap: bool = False) -> dict[str, Any]:
    """The saved state with all tensors on the CPU. Only tensors and plain values are ever built from the file.

    `mmap` reads pages as they are used, for taking the weights alone out of a large checkpoint. Not for resuming: the
    optimizer would keep its moments in the mapped file, whose disk space then stays taken after it is pruned."""
    file = checkpoint.path / STATE_NAME
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, for files that are refused next
            # weights_only is passed outright: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD turns the default off.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # pickle, zip, key, type, end-of-file errors: whatever a foreign file provokes
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it asks for {asked[1]}" if asked else (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        )
        raise UserError(
            f"{file}: not a vitexp checkpoint, or unsafe content in it ({why}); nothing of it was run"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: not a vitexp checkpoint, it holds a {type(state).__name__}")
    return state


def remove_leftovers(folder: Path) -> None:
    """Removes what killed saves and prunes left, and puts a replaced checkpoint back where its successor never came."""
    for path in sorted(folder.glob(".step_*")) if folder.is_dir() else []:
        match = re.fullmatch(r"\.(step_\d+(?:\.damaged)?)\.(saving|replaced|removed)", path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])
            sync_folder(folder)
        else:
            _remove(path)


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """(step, path) of the folders whose whole name matches, the highest step first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot("read checkpoints in", folder, error) from error
    matches = [(match, name) for name in names if (match := re.fullmatch(pattern, name))]
    return sorted(((int(match[1]), folder / name) for match, name in matches), reverse=True)


def _complete(folder: Path) -> list[tuple[int, Path]]:
    return _numbered(folder, r"step_(\d+)")


def _damaged(folder: Path) -> list[tuple[int, Path]]:
    return _numbered(folder, r"step_(\d+)\.damaged")


def _readable(folder: Path) -> Iterator[tuple[int, Path]]:
    """Complete ones, and of a step being replaced also the one that stepped aside, after its successor."""
    yield from sorted(
        _complete(folder) + _numbered(folder, r"\.step_(\d+)\.replaced"),
        key=lambda found: (-found[0], found[1].name.startswith(".")),
    )


def _check(path: Path, *, read_files: bool) -> Checkpoint:
    """The checkpoint if its manifest and the files' sizes, and with `read_files` their sha256, are as saved.

    DamagedCheckpoint naming the file, or UserError for another format version."""
    manifest = _read_manifest(path / MANIFEST_NAME)
    for name, saved in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != saved["bytes"]:
                raise DamagedCheckpoint(f"{file}: {size} bytes, {saved['bytes']} were saved")
            if read_files:
                with open(file, "rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != saved["sha256"]:
                        raise DamagedCheckpoint(f"{file}: its content is not what was saved (sha256 differs)")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{file}: missing") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{file}: cannot be read ({error.strerror or error})") from error
    return Checkpoint(path=path, step=manifest["step"], manifest=manifest)


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest file's only possible bytes for this content, with a checksum of its own: any flipped bit shows."""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    return json.dumps(
        {**manifest, "seal": hashlib.sha256(text.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(
            f"{file}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"
        ) from None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise DamagedCheckpoint(f"{file}: not a manifest") from None
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"{file}: not a manifest")
    manifest.pop("seal", None)
    sealed = _sealed(manifest) == content
    version = manifest.get("format")
    wrong_version = f"checkpoint format {version!r}, vitexp {vitexp.__version__} reads format {FORMAT}"
    if not sealed:
        hint = f"; it says {wrong_version}" if version != FORMAT else ""
        raise DamagedCheckpoint(f"{file}: its content is not what was saved{hint}")
    if version != FORMAT:
        raise UserError(f"{file}: {wrong_version} (written by vitexp {manifest.get('vitexp')})")
    files = manifest.get("files")
    if not isinstance(files, dict) or files.keys() != {STATE_NAME} or not isinstance(manifest.get("step"), int):
        raise DamagedCheckpoint(f"{file}: not a vitexp manifest")  # sealed, but not by save
    return manifest


# ---------------------------------------------------------------- does it fit this run


def check_compatible(
    checkpoint: Checkpoint, model_state: Mapping[str, Tensor], *, classes: Sequence[str] | None, world_size: int
) -> None:
    """UserError unless the checkpoint is of this model, these classes (None: of no classes) and this many processes.

    Reads the manifest alone. Other torch or vitexp versions are fine but may round differently: a warning."""
    saved, head = checkpoint.manifest, f"cannot resume from {checkpoint.path}: "
    here, there = _shapes(model_state), saved["model"]
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    class_change = _class_change(saved["classes"], classes)
    if differing or class_change:
        lines = [head + (class_change or f"it is of another model, {len(differing)} of its weights differ")]
        if differing:
            first = ", ".join(f"{k} {_shape(there.get(k))} -> {_shape(here.get(k))}" for k in differing[:3])
            lines.append(f"checkpoint -> config, first of {len(differing)}: {first}")
        raise UserError(
            "\n".join([*lines, "give another output_dir, or resume=never (init_from takes over the weights that fit)"])
        )
    if saved["world_size"] != world_size:
        raise UserError(
            f"{head}it was saved by {saved['world_size']} processes, this run has {world_size}\n"
            f"the data order and the sums would differ: give runtime.processes={saved['world_size']}, or resume=never"
        )
    for name, now in (("vitexp", vitexp.__version__), ("torch", str(torch.__version__))):
        if saved[name] != now:
            log.warning(
                "checkpoint was saved with %s %s, this is %s: results may differ slightly", name, saved[name], now
            )


def _class_change(saved: list[str] | None, now: Sequence[str] | None) -> str | None:
    saved, now = list(saved or ()), list(now or ())
    if len(saved) != len(now):
        return f"checkpoint has {len(saved)} classes, config {len(now)}"
    for number, (old, new) in enumerate(zip(saved, now, strict=True)):
        if old != new:
            return f"class {number} is {old!r} in the checkpoint, {new!r} in the data"
    return None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else "(" + ", ".join(map(str, shape)) + ")"


def changed_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `optim.lr: 0.001 -> 0.01`, by key, for what differs and could change the result (not HARMLESS_KEYS).

    `old`: the resolved config that the run was started with, as plain dicts; `new`: the one given now."""
    before, after = _flatten(old), _flatten(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        harmless = any(key == prefix or key.startswith(prefix + ".") for prefix in HARMLESS_KEYS)
        if not harmless and (key not in before or key not in after or before[key] != after[key]):
            lines.append(f"{key}: {_show(before, key)} -> {_show(after, key)}")
    return lines


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, with lists as single values. An empty dict stays: its being there can matter."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "absent"
    text = json.dumps(flat[key], ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
