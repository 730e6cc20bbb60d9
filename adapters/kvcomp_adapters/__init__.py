"""The built-in model adapters: a plugin like any other."""

from collections.abc import Sequence

from kvcomp.core.hookspecs import hookimpl
from kvcomp.runtime.adapter import ModelAdapter
from kvcomp_adapters.generic import GenericAdapter
from kvcomp_adapters.mobilevlm import register


@hookimpl
def kvcomp_adapters() -> Sequence[type[ModelAdapter]]:
    """Return the built-in adapters. From then on transformers knows the models that we add to it."""
    register()
    return (GenericAdapter,)
