"""The name by which transformers' models take a cache: `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

NEW, OLD = "cache", "past_key_values"
CACHE = NEW if any(field.name == NEW for field in fields(CausalLMOutputWithPast)) else OLD  # of this transformers


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """Return the cache that a forward was given under either name, None where there is none.

    From 5.24 on a model still takes the old name, with a warning, and gives the cache to its parts under the new one.
    """
    given = inputs.get(NEW)
    return inputs.get(OLD) if given is None else given
