"""Twenty and more model families in the small, for tests, for `kvcomp verify`, and for authors of parts."""

from kvcomp.testing.families.family import Family, Medium
from kvcomp.testing.families.grids import GRID_FAMILIES
from kvcomp.testing.families.pixels import PIXEL_FAMILIES
from kvcomp.testing.families.text import TEXT_FAMILIES

FAMILIES: dict[str, Family] = {family.name: family for family in (*TEXT_FAMILIES, *GRID_FAMILIES, *PIXEL_FAMILIES)}
"""By name."""

__all__ = ["FAMILIES", "Family", "Medium"]
