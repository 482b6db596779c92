"""A bf16 training step of vitexp's ViT beside timm's and lucidrains': forward, backward, clip, fused AdamW.

All get the same batch, autocast, loss, clipping and optimizer; only the model differs. `timm as shipped` is its
default, torch's fused attention. lucidrains' row needs `pip install vit-pytorch`.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import timm
import torch
from measuring import Clock, classification_step, parser, ratio, spread, start, table, take_turns, verdict
from torch import nn

from vitexp.costs import TRAIN_TO_FORWARD, forward_gflops
from vitexp.models.vit import VisionTransformer

try:
    from vit_pytorch import ViT as LucidrainsViT
except ImportError:
    LucidrainsViT = None


class Size(NamedTuple):
    name: str
    image: int
    patch: int
    width: int
    heads: int
    classes: int
    batch: int
    timm_name: str
    goals: dict[str, float]


SIZES = (
    Size("ViT-Ti/4 32 px, batch 128", 32, 4, 192, 3, 10, 128, "vit_tiny_patch16_224", {"timm": 1.9, "lucidrains": 1.0}),
    Size("ViT-S/16 224 px, batch 16", 224, 16, 384, 6, 1000, 16, "vit_small_patch16_224", {"timm": 1.2}),
)


def models(size: Size) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {
        "vitexp": VisionTransformer(
            image_size=size.image,
            patch_size=size.patch,
            embed_dim=size.width,
            depth=12,
            num_heads=size.heads,
            num_classes=size.classes,
        ),
        "timm": timm.create_model(size.timm_name, img_size=size.image, patch_size=size.patch, num_classes=size.classes),
    }
    if LucidrainsViT is not None:
        made["lucidrains"] = LucidrainsViT(
            image_size=size.image,
            patch_size=size.patch,
            num_classes=size.classes,
            dim=size.width,
            depth=12,
            heads=size.heads,
            mlp_dim=4 * size.width,
            dim_head=size.width // size.heads,
        )
    return made


def gemm_peak(clock: Clock, *, repeats: int) -> float:
    """10^9 bf16 operations a second of the best of a few square products: the floor under any step."""
    best = 0.0
    for side in (1024, 1536, 2048):
        a, b = (torch.randn(side, side).bfloat16() for _ in range(2))
        a @ b
        for _ in range(repeats):
            began = clock()
            a @ b
            best = max(best, 2 * side**3 / max(clock() - began, 1e-9) / 1e9)
    return best


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    clock = start(arguments)
    if LucidrainsViT is None:
        print("lucidrains: left out, vit-pytorch is not installed\n")
    peak = gemm_peak(clock, repeats=3 if arguments.quick else 15)
    rounds = arguments.rounds or (2 if arguments.quick else 15)
    rows = []
    for size in SIZES:
        batch = max(size.batch // 16, 1) if arguments.quick else size.batch
        torch.manual_seed(0)
        images = torch.randn(batch, 3, size.image, size.image)
        targets = torch.randint(size.classes, (batch,))
        contenders = models(size)
        gflops = TRAIN_TO_FORWARD * batch * forward_gflops(contenders["vitexp"], size.image)
        times = take_turns(
            {n: classification_step(m, images, targets) for n, m in contenders.items()}, rounds=rounds, clock=clock
        )
        for name in contenders:
            seconds = statistics.median(times[name])
            goal = size.goals.get(name)
            rows.append(
                [
                    f"{size.name}: {'timm as shipped' if name == 'timm' else name}",
                    f"{1000 * seconds:.0f}",
                    f"{batch / seconds:.1f}",
                    f"{100 * gflops / peak / seconds:.0f} %",
                    "" if name == "vitexp" else spread(times, ours="vitexp", theirs=name),
                    "" if goal is None else verdict(ratio(times, ours="vitexp", theirs=name), goal),
                ]
            )
    print(f"bf16 matrix product, best: {peak:.0f} GFLOP/s; `of floor` is the step's products at that speed / its time")
    table(["model", "ms a step", "pictures/s", "of floor", "vitexp is x faster", "goal"], rows)


if __name__ == "__main__":
    main()
