"""PNG pictures of runs in one quiet style."""

from vitexp.plots.answers import confusion_matrix, reliability
from vitexp.plots.features import attention, position_similarity
from vitexp.plots.label_maps import LabelledPicture, PlaceLabels, token_labels
from vitexp.plots.lines import by_epoch, curves, lr_curve, lr_range
from vitexp.plots.pictures import picture_grid, reconstructions
from vitexp.plots.settings import effects, parallel_coordinates

__all__ = [
    "LabelledPicture",
    "PlaceLabels",
    "attention",
    "by_epoch",
    "confusion_matrix",
    "curves",
    "effects",
    "lr_curve",
    "lr_range",
    "parallel_coordinates",
    "picture_grid",
    "position_similarity",
    "reconstructions",
    "reliability",
    "token_labels",
]
