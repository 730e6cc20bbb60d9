"""MobileVLM V2, which transformers does not have: a model class, and a converter of its checkpoints.

Source: arXiv:2402.03766; Meituan-AutoML/MobileVLM, mobilevlm/model.
"""

from transformers import AutoConfig, AutoModelForImageTextToText

from kvcomp_adapters.mobilevlm.configuration import MobileVLMConfig
from kvcomp_adapters.mobilevlm.conversion import convert
from kvcomp_adapters.mobilevlm.modeling import MobileVLMForConditionalGeneration

__all__ = ["MobileVLMConfig", "MobileVLMForConditionalGeneration", "convert", "register"]


def register() -> None:
    """Make `AutoConfig` and `AutoModelForImageTextToText` know the model type `mobilevlm`; more than once is fine."""
    AutoConfig.register(MobileVLMConfig.model_type, MobileVLMConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MobileVLMConfig, MobileVLMForConditionalGeneration, exist_ok=True)
