"""The interface of a family of backbones."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from cocoa_embed.model.template import Markers

MAX_ASPECT_RATIO = 200
"""Images with a greater ratio of the longer side to the shorter are refused, as Qwen's image processors do."""


class PartNames(NamedTuple):
    """The names of the parts of a vision encoder.

    :param encoder: The encoder, in the model without its head.
    :param layers: The layers, in the encoder.
    :param attention: The attention, in a layer.
    :param attention_output: The last matrix of the attention, in a layer.
    :param patches: The weight of the patch embedding, in the encoder.
    :param depth: The number of layers, in the vision encoder's config.
    :param merger: The merger, in the model without its head, if it is not in the encoder.
    """

    encoder: str
    layers: str
    attention: str
    attention_output: str
    patches: str
    depth: str = "depth"
    merger: str | None = None


class Seen(NamedTuple):
    """The output of a vision encoder for images.

    :param features: The features of visual tokens, ``[visual tokens, D]``.
    :param of_layers: More features of the same shape, which enter the first layers of the language model.
    """

    features: Tensor
    of_layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class PatchGeometry:
    """How an image becomes rows of ``pixel_values`` and visual tokens."""

    channels: int
    temporal_patch_size: int
    patch_size: int
    merge_size: int

    @property
    def patch_width(self) -> int:
        """The number of values of a raw patch, a row of ``pixel_values`` (1176 for Qwen2-VL)."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Raw patches per visual token (4 for Qwen2-VL)."""
        return self.merge_size**2


class Family(ABC):
    """What the package has to know about a backbone in addition to its stock class.

    In a batch, ``pixel_values`` has a row for each raw patch, with the patches of a visual token adjacent;
    ``image_grid_thw`` has a row for each image (frames, rows and columns of raw patches); and ``mm_token_type_ids`` is
    1 for visual tokens.

    :param config: The config of the whole model.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[ProcessorMixin]]
    markers: ClassVar[Markers]
    parts: ClassVar[PartNames]
    adapted: ClassVar[frozenset[str]]
    """The linear modules of vision layers that an adapter changes: of queries, keys and values, and of the MLP."""

    packs_attention: ClassVar[bool] = False
    """Whether the vision encoder takes the patches of all images as one sequence."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config: Any = config

    @property
    @abstractmethod
    def geometry(self) -> PatchGeometry:
        """How many raw patches a visual token has, and how wide each is."""

    @property
    def patches_per_row(self) -> int:
        """How many patches of the vision encoder are in a row of ``pixel_values``."""
        return 1

    @classmethod
    @abstractmethod
    def image_geometry(cls, processor: ProcessorMixin) -> PatchGeometry:
        """Return the geometry of a processor's images, which is the model's."""

    @classmethod
    @abstractmethod
    def limit_pixels(cls, processor: ProcessorMixin, pixels: int | None) -> None:
        """Have the processor scale images down to ``pixels``, in place; None keeps its own limit."""

    @classmethod
    @abstractmethod
    def most_pixels(cls, processor: ProcessorMixin) -> int:
        """Return the maximum number of pixels of an image."""

    @classmethod
    @abstractmethod
    def most_visual_tokens(cls, processor: ProcessorMixin) -> int:
        """Return the maximum number of visual tokens of an image."""

    @classmethod
    @abstractmethod
    def visual_tokens(cls, processor: ProcessorMixin, width: int, height: int) -> int:
        """Return how many visual tokens an image of this size becomes."""

    @classmethod
    @abstractmethod
    def patches(cls, processor: ProcessorMixin, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the raw patches of an image before its values are scaled and its frame is repeated.

        :returns: Raw patches, ``[patches, channels * patch_size ** 2]``, and the grid, int64 ``[1, 3]``.
        """

    @abstractmethod
    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the positions of a batch, on the CPU, as the language model takes them.

        :param batch: ``input_ids`` and, with images, ``attention_mask``, ``mm_token_type_ids`` and ``image_grid_thw``.
        """

    @abstractmethod
    def image_inputs(self, grids: Tensor) -> dict[str, Any]:
        """Return what the vision encoder derives from grids, computed on the CPU; names begin with ``image_``.

        :param grids: ``image_grid_thw``, int64 ``[images, 3]``; it is returned, too.
        """

    @abstractmethod
    def run_vision(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Seen:
        """Run the vision encoder, as the stock class does.

        :param batch: ``pixel_values``, and the ``image_inputs``.
        """

    def feed_inner_layers(self, model: PreTrainedModel, is_visual: Tensor, features: Sequence[Tensor]) -> None:
        """Have the next forward pass of the language model also add features after its first layers.

        :param is_visual: Which tokens are visual, bool ``[B, L]``.
        :param features: ``Seen.of_layers``, one or more.
        """
        raise NotImplementedError

    @property
    def attention_window(self) -> int | None:
        """The side, in raw patches, of the windows of vision layers that do not attend to the whole image."""
        return None

    def layers(self) -> dict[str, int]:
        """Return how many layers there are of each kind: ``text``, ``vision`` and, if some have windows, ``full``."""
        return {
            "text": self.config.get_text_config().num_hidden_layers,
            "vision": getattr(self.config.vision_config, self.parts.depth),
        }

    def fewest_layers(self) -> int:
        """Return the fewest layers of ``text`` and ``vision`` with which a model still works like the whole one."""
        return 1

    def with_layers(self, layers: Mapping[str, int]) -> PreTrainedConfig:
        """Return the config with other numbers of ``layers``."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers["text"]
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[: layers["text"]]
        setattr(config.vision_config, self.parts.depth, layers["vision"])
        return config  # type: ignore[no-any-return]

    @classmethod
    def encoder(cls, model: PreTrainedModel) -> PreTrainedModel:
        """Return the vision encoder of a model, with its head or without."""
        return model.base_model.get_submodule(cls.parts.encoder)  # type: ignore[return-value]

    @classmethod
    def vision(cls, model: PreTrainedModel) -> nn.ModuleList:
        """Return the vision encoder with its merger."""
        merger = [] if cls.parts.merger is None else [model.base_model.get_submodule(cls.parts.merger)]
        return nn.ModuleList([cls.encoder(model), *merger])

    @classmethod
    def runs_layers(cls, model: PreTrainedModel) -> nn.Module:
        """Return the module of the vision encoder whose forward pass calls the layers."""
        return cls.encoder(model).get_submodule(cls.parts.layers.rpartition(".")[0])

    @classmethod
    def vision_layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        """Return the layers of the vision encoder."""
        return cls.encoder(model).get_submodule(cls.parts.layers)  # type: ignore[return-value]
