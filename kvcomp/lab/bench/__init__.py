"""Speed and memory of compressed caches beside transformers' own, always as ratios inside one run."""

from kvcomp.lab.bench.cases import Case, make_cases
from kvcomp.lab.bench.measure import Bench, Found
from kvcomp.lab.bench.shapes import SHAPES, Shape, build_model, find_shape

__all__ = ["SHAPES", "Bench", "Case", "Found", "Shape", "build_model", "find_shape", "make_cases"]
