"""Every feature of the envelope, by theme."""

from kvcomp.testing.envelope.feature import Feature
from kvcomp.testing.envelope.features import batches, kernels, lifecycle, storage, turns

FEATURES: dict[str, Feature] = {
    found.name: found
    for theme in (batches, turns, storage, kernels, lifecycle)
    for found in vars(theme).values()
    if isinstance(found, Feature)
}

__all__ = ["FEATURES"]
