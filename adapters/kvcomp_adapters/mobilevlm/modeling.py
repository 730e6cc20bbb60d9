"""MobileVLM V2: LLaVA with a projector that makes few tokens of an image. The rest is from transformers."""

import math

from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel

from kvcomp.core.errors import UnsupportedUseError
from kvcomp_adapters.mobilevlm.configuration import MobileVLMConfig


class DownsampleProjector(nn.Module):
    """The lightweight downsample projector LDPv2: two pointwise layers, average pooling to a fixed grid, and a
    depthwise convolution beside a residual connection, which tells the places apart (arXiv:2402.03766;
    Meituan-AutoML/MobileVLM, mobilevlm/model/vision_projector.py).
    """

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(hidden, hidden)
        self.pool = nn.AdaptiveAvgPool2d(config.projector_side)
        self.position = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Return an image's tokens `(batch, projector_side ** 2, hidden)`.

        Args:
            features: of its patches without the class token, row by row, `(batch, patches, vision_hidden)`.

        Raises:
            UnsupportedUseError: the patches are no square.
        """
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1]:
            raise UnsupportedUseError(
                f"the projector of MobileVLM takes the patches of a square image without the class token, and got "
                f"patches={features.shape[1]}; set vision_feature_select_strategy='default' and use square images"
            )
        mixed = self.linear_2(self.activation(self.linear_1(features)))
        grid = self.pool(mixed.transpose(1, 2).unflatten(2, (side, side)))  # (batch, hidden, grid, grid)
        placed: Tensor = grid + self.position(grid)
        return placed.flatten(2).transpose(1, 2)


class MobileVLMModel(LlavaModel):
    """A CLIP tower, the projector and a Llama, without the language head."""

    config_class = MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        super(LlavaModel, self).__init__(config)  # LLaVA's own projector is not wanted
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = DownsampleProjector(config)  # type: ignore[assignment]  # the one that differs
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class MobileVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """MobileVLM V2 with its language head. An image stands in the prompt as `config.image_seq_length` placeholders
    `config.image_token_id`, and in `pixel_values` as `(images, 3, height, width)`.
    """

    config_class = MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # for its part, it would build LLaVA's model
        self.model = MobileVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
