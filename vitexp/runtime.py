"""The machine: device, precision, threads, process group, and the random state of a step."""

from __future__ import annotations

import ctypes
import os
import platform
import random

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from vitexp.errors import UserError
from vitexp.seeding import derive_seed

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def make_accelerator(*, precision: str, device: str, threads: int | None) -> Accelerator:
    """Accelerate for this process. Raises UserError for a device or precision that is not there."""
    device = _device(device)
    precision = _precision(precision, device)
    # Accelerate keeps one state a process; runs that follow each other in a notebook may want another precision.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if device == "cpu":
        world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = max(1, len(os.sched_getaffinity(0)) // world)
        torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS", share)))
        keep_freed_memory()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device == "cpu")


def keep_freed_memory() -> None:
    """Has the C library keep what tensors have freed for the tensors to come. Nothing where it is not glibc.

    Every update asks for the same blocks again. Handed back to the system, each would come anew page by page, cleared:
    75,000 pages an update of MAE's base model at batch 8, a twentieth of its time, and a fifth at batch 32."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _device(wanted: str) -> str:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cpu", *(["cuda"] if cuda else []), *(["mps"] if mps else [])]
    if wanted == "auto":
        return there[-1]
    if wanted not in there:
        raise UserError(f"runtime.device={wanted}: this machine has {', '.join(there)}")
    if wanted == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        raise UserError(f"runtime.processes: this machine has {torch.cuda.device_count()} GPUs, one for each process")
    return wanted


def _precision(wanted: str, device: str) -> str:
    fast_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else device == "cpu" and has_amx()
    if wanted == "auto":
        return "bf16" if fast_bf16 else "fp32"
    if wanted == "fp16" and device == "cpu":
        raise UserError("runtime.precision=fp16: needs a GPU; on a CPU use bf16 or fp32")
    if wanted == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("runtime.precision=bf16: this GPU has no bf16; use fp16 or fp32")
    return wanted


def has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (up to 7 times faster than fp32)."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def seed_everything(seed: int) -> None:
    """For what happens once, such as drawing initial weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  third-party augmentation draws from it
    torch.manual_seed(seed)


def seed_forward(seed: int, micro_batch: int, rank: int) -> None:
    """Dropout, drop path and mixing of one forward depend on its position alone, so a resumed run repeats them."""
    derived = derive_seed(seed, micro_batch, rank, 0xF0)
    random.seed(derived)
    np.random.seed(derived % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(derived)  # torch.manual_seed costs ten times as much
    if torch.cuda.is_available():
        torch.cuda.manual_seed(derived)
