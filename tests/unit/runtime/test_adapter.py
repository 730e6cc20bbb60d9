"""What adapters say of attention modules."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama, tiny_qwen3, tiny_qwen_vl
from torch import nn

from kvcomp.runtime.adapter import adapter_for, per_head


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_qwen_vl], ids=lambda build: build.__name__)
def test_the_output_projection_is_the_models_own(build) -> None:
    model = build()
    attention = model.get_decoder().layers[1].self_attn
    weight = adapter_for(model.config).output_projection(attention)
    assert weight is attention.o_proj.weight


def test_each_head_has_its_own_columns_of_it() -> None:
    attention = tiny_qwen3().get_decoder().layers[0].self_attn
    heads = per_head(attention.o_proj.weight, 4)
    vector = torch.randn(4, 32)
    together = torch.einsum("hod,hd->o", heads, vector)
    assert torch.allclose(together, attention.o_proj(vector.flatten()), atol=1e-5)
    assert heads.data_ptr() == attention.o_proj.weight.data_ptr()
    assert not heads.requires_grad


class Coded(nn.Linear):
    """A layer whose weight is kept as codes."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("name", ["o_proj", "something_else"])
def test_what_cannot_be_read_is_none(name: str) -> None:
    attention = nn.Module()
    attention.add_module(name, Coded() if name == "o_proj" else nn.Linear(4, 4))
    assert adapter_for(tiny_llama().config).output_projection(attention) is None
    assert per_head(None, 2) is None
