"""Keep the tokens whose keys have the smallest L2 norm."""

from torch import Tensor

import kvcomp


class HelloKeyNorm(kvcomp.Scorer, use="hello-key-norm"):
    """Keys of small norm tend to draw the most attention, so they score highest (arXiv:2406.11430)."""

    def score(self, layer: kvcomp.LayerView, slots: Tensor) -> Tensor:
        return -layer.keys.float().norm(dim=-1)  # (batch, kv_heads, tokens)


@kvcomp.hookimpl
def kvcomp_parts():
    return [HelloKeyNorm]


@kvcomp.hookimpl
def kvcomp_recipes():
    return [{"name": "hello", "budget": 0.5, "scorer": "hello-key-norm", "selector": "top-k"}]
