"""How well a masked autoencoder fills in what it does not see, some of its pictures, and how many directions the
features of its encoder use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vitexp.errors import UserError
from vitexp.evaluators.classification import evaluation_mode
from vitexp.evaluators.features import feature_extractor, gather_rows
from vitexp.models.checks import whole
from vitexp.models.mae import patch_statistics
from vitexp.seeding import uniforms
from vitexp.types import Batch, Evaluation, Method

# Whatever the run's seed: figures and pictures of two runs then differ by their weights alone.
SEED, MASK, CHOICE = 0, 0, 1


class Reconstruction:
    """Evaluator of a method with an `autoencoder`. Each picture has the same mask in every evaluation of every run, for
    it depends on the picture's position in the split alone.

    `pictures` of them, spread at random over the split and always the same ones, are returned to be drawn."""

    needs_labels: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    reads_train: ClassVar[bool] = False

    def __init__(self, *, pictures: int = 8) -> None:
        self.pictures = whole("evaluators.reconstruction.pictures", pictures, at_least=0)

    @torch.no_grad()
    def __call__(
        self,
        method: Method,
        batches: Callable[[str], Iterable[Batch]],
        accelerator: Accelerator,
        classes: Sequence[str],
    ) -> Evaluation:
        """Metrics loss, the training loss over all masked patches of the split, and effective_rank, of the means of the
        patch tokens that the encoder gives for the split's whole, unmasked pictures.

        Arrays reconstruction_<name> of the pictures to draw, n in the order of the split, in normalised pixels:
        originals and predictions (n, c, h, w), masks (n, gh, gw) with 1 where a patch was hidden, losses (n, gh, gw) of
        every patch in the units of the training loss, and for a model with norm_pix_loss, whose predictions are in
        units of each patch, means and stds (n, gh, gw) of the true patches. Raises UserError for another method and
        for an empty split."""
        autoencoder: Any = getattr(method, "autoencoder", None)
        if autoencoder is None:
            raise UserError("evaluators.reconstruction: only a masked autoencoder reconstructs; it needs method=mae")
        sums = torch.zeros(3, dtype=torch.float64)  # pictures, masked patches, their losses
        moments = torch.empty(0, 0, dtype=torch.float64)
        sample = _Sample(self.pictures)
        with evaluation_mode(autoencoder):
            extract = feature_extractor(
                autoencoder.encoder, accelerator, pool="mean", key="evaluators.reconstruction.pool"
            )
            for batch in batches("val"):
                with accelerator.autocast():
                    loss, _, mask = autoencoder(batch.images, _noise(batch.index, autoencoder), everywhere=False)
                masked = float(mask.sum())
                sums += torch.tensor([len(mask), masked, float(loss) * masked], dtype=torch.float64)
                found = _moments(extract(batch.images))
                moments = found if not len(moments) else moments + found
                sample.add(batch)
            if accelerator.num_processes > 1:
                sums = gather_rows(sums[None].to(accelerator.device), accelerator).sum(dim=0).cpu()
                shares = gather_rows(moments.to(accelerator.device), accelerator).cpu()
                moments = torch.stack(shares.split(shares.shape[1] + 1)).sum(dim=0)
            count = int(sums[0])
            if not count:
                raise UserError("evaluators.reconstruction: the split is empty; evaluators=none trains without")
            images, index = sample.gathered(accelerator)
            arrays = _reconstruct(autoencoder, images, index, accelerator) if len(images) else {}
        metrics = {"loss": float(sums[2] / sums[1]), "effective_rank": effective_rank(moments, count)}
        return Evaluation(metrics=metrics, arrays={f"reconstruction_{k}": v for k, v in arrays.items()}, count=count)


def effective_rank(moments: Tensor, count: int) -> float:
    """exp of the entropy of the singular values' shares, from 1 to d: Roy & Vetterli 2007, "The effective rank".

    Of the (count, d) matrix of features with their mean taken off, whose singular values are the roots of the
    eigenvalues of its scatter matrix (d, d), so that no more than that is held. `moments` (1 + d, d): the features'
    sum over their products. 0 where they are all the same, nan where one is not finite."""
    if not bool(moments.isfinite().all()):
        return math.nan
    total, products = moments[0], moments[1:]
    eigenvalues = torch.linalg.eigvalsh(products - total.outer(total) / count)
    rounding = len(total) * torch.finfo(moments.dtype).eps * products.trace()
    singular = eigenvalues.where(eigenvalues > rounding, 0).sqrt()
    if not singular.any():
        return 0.0
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


def _moments(vectors: Tensor) -> Tensor:
    """(1 + d, d) in float64 on the CPU: the sum of vectors (b, d) over the sum of their products."""
    vectors = vectors.cpu().double()
    return torch.cat([vectors.sum(dim=0, keepdim=True), vectors.T @ vectors])


def _noise(index: Tensor, autoencoder: Any) -> Tensor:
    """(b, n) on the device of the pictures: what their masks are drawn from."""
    height, width = autoencoder.grid_size
    noise = uniforms(SEED, MASK, index.cpu().numpy(), height * width)
    return torch.from_numpy(noise).float().to(next(autoencoder.parameters()).device)


class _Sample:
    """The pictures to draw: those of a split whose random number, a function of their position, is lowest. So they are
    spread over a split in order of classes, without its length being known."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.images, self.index = torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64)

    def add(self, batch: Batch) -> None:
        chosen = self._lowest(batch.index)
        images, index = batch.images[chosen.to(batch.images.device)], batch.index[chosen.to(batch.index.device)]
        if len(self.index):
            images, index = torch.cat([self.images, images]), torch.cat([self.index, index])
        self._keep(images, index)

    def gathered(self, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Pictures and positions, in the order of the split, the same on every rank."""
        device = accelerator.device
        self._keep(gather_rows(self.images.to(device), accelerator), gather_rows(self.index.to(device), accelerator))
        order = self.index.argsort()
        return self.images[order], self.index[order]

    def _keep(self, images: Tensor, index: Tensor) -> None:
        chosen = self._lowest(index).to(index.device)
        self.images, self.index = images[chosen], index[chosen]

    def _lowest(self, index: Tensor) -> Tensor:
        return torch.from_numpy(uniforms(SEED, CHOICE, index.cpu().numpy(), 1)[:, 0].argsort()[: self.size])


def _reconstruct(autoencoder: Any, images: Tensor, index: Tensor, accelerator: Accelerator) -> dict[str, np.ndarray]:
    with accelerator.autocast():
        _, prediction, mask = autoencoder(images, _noise(index, autoencoder), everywhere=True)
    prediction = prediction.float()
    a_patch = {"masks": mask, "losses": (prediction - autoencoder.targets(images)).square().mean(dim=-1)}
    if autoencoder.norm_pix_loss:
        a_patch |= dict(zip(("means", "stds"), patch_statistics(autoencoder.patchify(images)), strict=True))
    arrays = {name: values.reshape(-1, *autoencoder.grid_size) for name, values in a_patch.items()}
    arrays |= {"originals": images, "predictions": autoencoder.unpatchify(prediction)}
    return {name: values.float().cpu().numpy() for name, values in arrays.items()}
