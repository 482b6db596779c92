"""Over several processes: the k-NN and the reconstruction of two with unequal shares, and of more than pictures."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vitexp.evaluators.features import gather_rows
from vitexp.evaluators.knn import Knn
from vitexp.evaluators.reconstruction import Reconstruction
from vitexp.models.mae import masked_autoencoder
from vitexp.types import Batch, Evaluation, Method

NAMES = "abcdefg"


class Autoencoding(Method):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.autoencoder = masked_autoencoder(
            image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_dim=8, decoder_depth=1,
            decoder_num_heads=2, norm_pix_loss=True,
        )  # fmt: skip
        self.backbone = self.autoencoder.encoder


def walk(counts: dict[str, int], rank: int = 0, world: int = 1):
    """In batches of 8, which the ranks take in turn, as the loader deals them out."""

    def batches(split: str) -> list[Batch]:
        generator = torch.Generator().manual_seed(counts[split])
        images = torch.randn(counts[split], 3, 8, 8, generator=generator)
        targets = torch.randint(0, 7, (counts[split],), generator=generator)
        parts = torch.arange(counts[split]).split(8)[rank::world]
        return [Batch(images[part], targets[part], part) for part in parts]

    return batches


def measured(counts: dict[str, int], accelerator: Accelerator, rank: int = 0, world: int = 1) -> list[Evaluation]:
    method = Autoencoding()
    return [e(method, walk(counts, rank, world), accelerator, NAMES) for e in (Knn(k=5), Reconstruction(pictures=4))]


CASES = ({"train": 61, "val": 39}, {"train": 7, "val": 6})  # in the second all pictures are the first rank's


def _rank(rank: int, port: int, answers: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = [measured(counts, accelerator, rank, 2) for counts in CASES]
    torch.save([[(e.metrics, e.arrays, e.count) for e in both] for both in found], f"{answers}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    one = [measured(counts, Accelerator(cpu=True)) for counts in CASES]
    for rank in (0, 1):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for counts, expected, found in zip(CASES, one, two, strict=True):
            for evaluation, (metrics, arrays, count) in zip(expected, found, strict=True):
                assert count == evaluation.count == counts["val"]
                assert metrics == pytest.approx(evaluation.metrics, rel=1e-5)
                assert set(arrays) == set(evaluation.arrays)
                for name, values in evaluation.arrays.items():
                    np.testing.assert_allclose(arrays[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_process_keeps_its_rows():
    rows = torch.randn(3, 2)
    assert gather_rows(rows, Accelerator(cpu=True)) is rows
