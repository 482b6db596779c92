"""A model's YAML offers what its class takes."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

from vitexp.models.build import model_options
from vitexp.models.deit import DeiT
from vitexp.models.lvvit import LVViT
from vitexp.models.t2t import T2TViT
from vitexp.models.t2t_dense import DenseT2TViT
from vitexp.models.vit import VisionTransformer


@pytest.mark.parametrize(
    ("option", "model"),
    [("vit", VisionTransformer), ("deit", DeiT), ("lvvit", LVViT), ("t2t", T2TViT), ("t2t_dense", DenseT2TViT)],
)
def test_a_yaml_lists_every_constructor_option_with_its_default(option: str, model: type[nn.Module]) -> None:
    listed = model_options(option)
    assert listed.pop("_target_") == f"{model.__module__}.{model.__name__}"
    signature = inspect.signature(model).parameters
    assert set(listed) == set(signature)
    for key, parameter in signature.items():
        if parameter.default is not inspect.Parameter.empty and key != "num_classes":
            assert listed[key] == parameter.default, key
