"""The number of threads is put back."""

import pytest
import torch

from kvcomp.lab.threads import torch_threads


def test_the_number_of_threads_holds_inside_the_block_and_not_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.get_num_threads() == before
