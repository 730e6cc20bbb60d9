"""What a MobileVLM V2 is made of."""

from typing import Any

from transformers import LlavaConfig


class MobileVLMConfig(LlavaConfig):
    """LLaVA's configuration, with the size of the grid that an image ends as.

    Attributes:
        projector_side: tokens each way of an image after the projector; `image_seq_length` is its square.
    """

    model_type = "mobilevlm"
    vision_config: Any = None
    text_config: Any = None
    projector_side: int = 12

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.image_seq_length = self.projector_side**2
