"""Block masks over columns and the tensors that they stand for."""

import pytest
import torch
from models import tiny_llama
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask

from kvcomp.runtime import flex

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and transformers' use of it
NAME = "flex_attention_of_a_test"


@pytest.fixture
def config():
    """A configuration whose masks are those of kvcomp on flex attention."""
    AttentionMaskInterface.register(NAME, flex.block_mask_over_columns)
    config = tiny_llama().config
    config._attn_implementation = NAME
    with torch.compiler.set_stance("force_eager"):
        yield config


def masks_of(config, padding=None, **shape):
    embeds = torch.empty(2, 6, 0)
    block = create_causal_mask(config, embeds, padding, None, **shape)
    config._attn_implementation = "sdpa"
    return block, create_causal_mask(config, embeds, padding, None, allow_is_causal_skip=False, **shape)


def test_a_plainly_causal_mask_is_no_tensor(config):
    block, _ = masks_of(config, torch.ones(2, 6))
    assert flex.as_tensor(block) is None


def test_padding_is_in_the_tensor(config):
    block, expected = masks_of(config, torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))
    assert torch.equal(flex.as_tensor(block), expected)
    assert flex.as_tensor(block) is flex.as_tensor(block)


def test_blocks_that_see_themselves_whole_are_in_the_tensor(config):
    block, expected = masks_of(config, block_sequence_ids=torch.tensor([[-1, 0, 0, 0, -1, -1], [-1] * 6]))
    assert torch.equal(flex.as_tensor(block), expected)
    assert not torch.equal(expected[0], expected[1])


def test_what_is_no_block_mask_stays_what_it_is():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert flex.as_tensor(mask) is mask
    assert flex.as_tensor(None) is None
