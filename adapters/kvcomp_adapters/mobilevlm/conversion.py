"""Checkpoints of MobileVLM V2 as its authors publish them, made into ones that transformers loads.

The original layout (Meituan-AutoML/MobileVLM, mobilevlm/model): Llama's names for the language model and its head; the
tower under `model.vision_tower.vision_tower.vision_model`; the projector under `model.mm_projector`, in which the
pointwise layers are `mlp.mlp.0` and `mlp.mlp.2`, the convolution is `peg.peg.0`, and the pooling `dwn` has no weights.

Deviation: the original replaces the id -200, which is no token. Here the vocabulary has one token more, which stands
for images. Its embedding is replaced by image features, its logit is 0, and the generation settings keep it from being
generated.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from kvcomp.core.errors import InputError
from kvcomp_adapters.mobilevlm.configuration import MobileVLMConfig
from kvcomp_adapters.mobilevlm.modeling import MobileVLMForConditionalGeneration

State = dict[str, Tensor]

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = (
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Fields of the original configuration that describe the language model."""
PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": ("model.vision_tower.", "model.vision_tower.vision_model."),
    "model.mm_projector.mlp.mlp.0.": ("model.multi_modal_projector.linear_1.",),
    "model.mm_projector.mlp.mlp.2.": ("model.multi_modal_projector.linear_2.",),
    "model.mm_projector.peg.peg.0.": ("model.multi_modal_projector.position.",),
    "model.": ("model.language_model.",),
    "lm_head.": ("lm_head.",),
}
"""Original beginnings of names, and ours; of two, the one that the installed transformers has. The first that fits."""
RECOMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Ends of the names of constants that old versions of transformers saved."""
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
PICKLES = ("*.bin", "*.pt", "*.pth")


def convert(checkpoint: str | Path, folder: str | Path, vision: CLIPVisionConfig | None = None) -> MobileVLMConfig:
    """Return the configuration of a MobileVLM V2 checkpoint, written to `folder` as transformers loads it.

    Args:
        checkpoint: a folder with `config.json` and `*.safetensors` in the authors' layout.
        folder: where the model goes, its configuration and generation settings with it; no tokenizer.
        vision: the tower's configuration, which the original one does not hold; CLIP ViT-L/14 at 336 pixels by default.

    Raises:
        InputError: a file is missing, unreadable or pickled, the model is another than MobileVLM V2, or tensors are
            missing, unknown or of another shape; every one is named.
    """
    source = Path(checkpoint)
    config = configuration(_settings(source), source, vision)
    with torch.device("meta"):
        model = MobileVLMForConditionalGeneration(config)
    state = renamed(_tensors(source), model.state_dict(), source)
    model.load_state_dict(state, assign=True)
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.save_pretrained(folder)
    return config


def configuration(settings: Mapping[str, Any], source: Path, vision: CLIPVisionConfig | None = None) -> MobileVLMConfig:
    """Return our configuration of a model with these original settings, its vocabulary one token larger.

    Raises:
        InputError: settings are missing, or are those of a model that is not MobileVLM V2.
    """
    faults = [f"{name}: must be given" for name in NEEDED if name not in settings]
    projector = settings.get("mm_projector_type")
    if not str(projector).startswith("ldpnetv2"):
        faults.append(f"mm_projector_type: must be ldpnetv2, the projector of MobileVLM V2, got {projector!r}")
    selected = settings.get("mm_vision_select_feature", "patch")
    if selected != "patch":
        faults.append(f"mm_vision_select_feature: must be patch, got {selected!r}")
    _refuse(faults, f"{source / 'config.json'} does not describe a MobileVLM V2 that can be converted")
    text = {name: settings[name] for name in (*NEEDED, *OPTIONAL) if settings.get(name) is not None}
    return MobileVLMConfig(
        text_config=LlamaConfig(**text | {"vocab_size": text["vocab_size"] + 1}),
        vision_config=vision,
        image_token_index=text["vocab_size"],
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
    )


def renamed(original: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path) -> State:
    """Return the original tensors under our names, the vocabulary's with a row of zeros more.

    Args:
        original: by their names in the authors' layout.
        wanted: what the model must be given, by name; only shapes are looked at.
        source: where they come from, for messages.

    Raises:
        InputError: tensors are unknown, missing or of another shape.
    """
    faults, found, origin = [], State(), {}
    for name, tensor in original.items():
        if name.endswith(RECOMPUTED):
            continue
        ours = next((option for option in _options(name) if option in wanted), None)
        if ours is None:
            faults.append(f"{name}: unknown")
        else:
            found[ours], origin[ours] = _with_image_token(ours, tensor), name
    faults += [f"{_original(name)}: missing" for name in wanted if name not in found]
    faults += [
        f"{before}: must have shape {_original_shape(name, wanted[name])}, got {tuple(original[before].shape)}"
        for name, before in origin.items()
        if found[name].shape != wanted[name].shape
    ]
    _refuse(
        faults,
        f"the tensors in {source} are not those of its configuration; look for a second file of weights, "
        "or give the tower's configuration as `vision`",
    )
    return found


def _settings(source: Path) -> dict[str, Any]:
    """Return the original configuration."""
    file = source / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} must be the configuration of a MobileVLM checkpoint: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file} must hold an object, got {type(settings).__name__}")
    return settings


def _tensors(source: Path) -> State:
    """Return all tensors of a folder."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        _refuse_pickles(source)
        raise InputError(f"{source} must hold weights as *.safetensors, and holds none; fetch the whole checkpoint")
    tensors = State()
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} must be a safetensors file: {error}; fetch it again") from error
    return tensors


def _refuse_pickles(source: Path) -> None:
    pickles = sorted(file.name for pattern in PICKLES for file in source.glob(pattern))
    if pickles:
        raise InputError(
            f"{source} holds its weights pickled ({', '.join(pickles)}), and kvcomp does not open pickles, which can "
            "run code; convert each first: safetensors.torch.save_file({name: tensor.clone().contiguous() for name, "
            "tensor in torch.load('FILE.bin', map_location='cpu', weights_only=True).items()}, 'FILE.safetensors')"
        )


def _options(name: str) -> list[str]:
    """Return what an original name may be called here."""
    for before, after in PREFIXES.items():
        if name.startswith(before):
            return [new + name.removeprefix(before) for new in after]
    return []


def _original(name: str) -> str:
    """Return the original name of one of ours."""
    pairs = [(before, new) for before, after in PREFIXES.items() for new in after if name.startswith(new)]
    before, new = max(pairs, key=lambda pair: len(pair[1]))
    return before + name.removeprefix(new)


def _with_image_token(name: str, tensor: Tensor) -> Tensor:
    if name not in VOCABULARY:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])


def _original_shape(name: str, wanted: Tensor) -> tuple[int, ...]:
    first, *rest = wanted.shape
    return (first - (name in VOCABULARY), *rest)


def _refuse(faults: list[str], problem: str) -> None:
    """Raise an error that lists the faults, where there are any."""
    if faults:
        raise InputError("\n  ".join([f"{problem}:", *faults]))
