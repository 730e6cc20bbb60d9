"""Padding masks as flash attention takes them, and which implementations are flash attention."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcomp.runtime import attention, flash

PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_the_tensor_is_the_mask_of_sdpa(queries):
    seen = 5 - queries
    expected = sdpa_mask(2, queries, 5, q_offset=seen, attention_mask=PADDING, allow_is_causal_skip=False)
    found = flash.as_tensor(PADDING.clone(), queries)
    assert torch.equal(found, expected)
    padding = PADDING.clone()
    assert flash.as_tensor(padding, queries) is flash.as_tensor(padding, queries)


def test_no_padding_is_no_tensor_and_a_tensor_stays_what_it_is():
    assert flash.as_tensor(None, 3) is None
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    assert flash.as_tensor(mask, 3) is mask


def test_a_kernel_of_the_hub_is_flash_attention_where_transformers_calls_it_so():
    kernel, other = "someone/flash-attn2", "someone/flash-of-their-own"
    AttentionInterface.register(kernel, ALL_ATTENTION_FUNCTIONS[flash.NAME])
    AttentionMaskInterface.register(kernel, ALL_MASK_ATTENTION_FUNCTIONS[flash.NAME])
    AttentionInterface.register(other, lambda *_: None)
    AttentionMaskInterface.register(other, ALL_MASK_ATTENTION_FUNCTIONS[flash.NAME])
    assert attention.supports(kernel)
    assert attention.register(kernel) == "kvcomp_someone_fa-attn2"  # a name that makes transformers load nothing
    assert not attention.supports(other)
    assert not flash.is_flash("sdpa")


def test_only_what_is_replaced_is_read_from_elsewhere():
    module = torch.nn.Linear(2, 3)
    overlay = flash._Overlay(module, in_features=5)
    assert (overlay.in_features, overlay.out_features, module.in_features) == (5, 3, 2)
    assert not hasattr(overlay, "is_causal")
