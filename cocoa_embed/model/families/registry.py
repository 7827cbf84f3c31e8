"""The supported families, by the ``model_type`` of a config."""

from transformers import PreTrainedConfig, ProcessorMixin

from cocoa_embed.errors import UsageError
from cocoa_embed.model.families.family import Family
from cocoa_embed.model.families.internvl import InternVL
from cocoa_embed.model.families.qwen2_5_vl import Qwen25VL
from cocoa_embed.model.families.qwen2_vl import Qwen2VL
from cocoa_embed.model.families.qwen3_vl import Qwen3VL
from cocoa_embed.model.families.smolvlm import SmolVLM, SmolVLM2

FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "idefics3": SmolVLM,
    "smolvlm": SmolVLM2,
    "internvl": InternVL,
}


def family_of(config: PreTrainedConfig, name: str = "this model") -> Family:
    """Return the family of a config.

    :param name: The model's name, for the error.
    :raises UsageError: If its model type is not supported.
    """
    if config.model_type not in FAMILIES:
        raise UsageError(f"{name} is a {config.model_type!r} model; supported types are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[config.model_type](config)


def family_of_images(processor: ProcessorMixin) -> type[Family]:
    """Return the family of a processor.

    :raises UsageError: If it is not the processor of a supported model.
    """
    for family in FAMILIES.values():
        if isinstance(processor, family.processor_class):
            return family
    raise UsageError(
        f"{type(processor).__name__} is not the processor of a supported model; supported types are "
        f"{', '.join(sorted(FAMILIES))}."
    )
