"""The settings of a pretraining: the model's sizes, its stages, how images are varied, what is measured."""

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cocoa_embed.errors import UsageError
from cocoa_embed.train.recipe import apply_override, describe_fault
from cocoa_embed.train.settings import Count, Positive, Rate, Ratio, Settings

SCENES = "scenes"
"""The data argument that stands for drawn scenes instead of a folder."""


class ModelSettings(Settings):
    """The sizes of a Qwen2-VL; the defaults make 8.9 million parameters, for photographs at 112 x 112.

    :param width: The width of the language model. ``layers``, ``heads``, ``key_value_heads`` and ``inner_width`` (of
        its MLP) are also the language model's.
    :param vocabulary: The maximum tokens of the tokenizer that is trained on the captions.
    :param image_size: The side of the largest square image, in pixels.
    :param patch_size: The side of a patch in pixels; ``merge_size`` squared patches become one visual token.
    """

    width: Positive = 256
    inner_width: Positive = 704
    layers: Positive = 6
    heads: Positive = 8
    key_value_heads: Positive = 4
    vocabulary: Annotated[int, Field(ge=512)] = 3072
    vision_width: Positive = 192
    vision_layers: Positive = 6
    vision_heads: Positive = 6
    image_size: Positive = 112
    patch_size: Positive = 14
    merge_size: Positive = 2

    @property
    def token_size(self) -> int:
        """The side of a visual token in pixels."""
        return self.patch_size * self.merge_size

    @model_validator(mode="after")
    def _check_together(self) -> "ModelSettings":
        for whole, part, times in MULTIPLES:
            if getattr(self, whole) % (times * getattr(self, part)):
                name = part.replace("token_size", "patch_size x merge_size")
                raise ValueError(f"{whole} {getattr(self, whole)} is not a multiple of {times} x {name} "
                                 f"({getattr(self, part)})")  # fmt: skip
        return self


MULTIPLES = (
    ("width", "heads", 2),
    ("heads", "key_value_heads", 1),
    ("vision_width", "vision_heads", 4),
    ("image_size", "token_size", 1),
)
"""What the sizes of a model have to be multiples of; rotary positions rotate pairs of values, in two directions."""


class StageSettings(Settings):
    """The optimisation of a stage: AdamW, or AdamW and Muon.

    Learning rates rise for a twentieth of the steps, then fall on a cosine.

    :param steps: 0 leaves the stage out.
    :param muon_learning_rate: Update the weight matrices of the layers with Muon at this learning rate. None: AdamW.
    """

    steps: Count = 0
    batch_size: Positive = 64
    learning_rate: Rate = 1e-3
    muon_learning_rate: Rate | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.98


class VisionSettings(StageSettings):
    """The stage that trains the vision encoder alone, on the words of captions and the features of a teacher.

    :param word_images: The minimum number of images that a word must have to be predicted.
    :param word_weight: The weight of the words' loss relative to that of the features. With a higher one, the encoder
        memorises the words of a few thousand images.
    :param components: The maximum number of principal components of a teacher's features.
    :param views: The number of crops of each image whose features are computed, once; each is also used mirrored.
    """

    batch_size: Positive = 96
    word_images: Positive = 10
    word_weight: Rate = 0.002
    components: Positive = 256
    views: Positive = 8


class AugmentationSettings(Settings):
    """How an image of a folder varies from epoch to epoch.

    :param scale: The minimum ratio of the image's area that a random crop keeps.
    :param flip: Mirror half of the images; captions that say left and right are then wrong.
    :param jitter: The maximum by which brightness, contrast and saturation are scaled up or down.
    """

    scale: Ratio = 0.5
    flip: bool = False
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.2


class PretrainSettings(Settings):
    """A pretraining: its inputs, the sizes of the model, the stages in order, and what they have in common.

    :param data: ``scenes``, or an image folder.
    :param held_out: An image folder to measure on.
    :param language_model: The folder of a language model to build on, by default none: all weights are random.
    :param teacher: A program that maps pixels to features (``Teacher``), for the vision stage.
    :param vision: Trains the vision encoder alone.
    :param language: Trains the language model as a captioner; the vision encoder is frozen.
    :param connector: Trains the vision encoder and the embeddings of new tokens as a captioner; the language model is
        frozen.
    :param all: Trains everything as a captioner.
    :param mixed_precision: ``bf16`` runs forward and backward passes under bfloat16 autocast.
    :param measure_steps: Steps between two measurements on held-out images, and between two checkpoints.
    :param held_out_images: The maximum number of images to measure on.
    """

    data: str = SCENES
    held_out: Path | None = None
    language_model: Path | None = None
    teacher: Path | None = None
    model: ModelSettings = ModelSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    vision: VisionSettings = VisionSettings()
    language: StageSettings = StageSettings()
    connector: StageSettings = StageSettings()
    all: StageSettings = StageSettings()
    mixed_precision: Literal["no", "bf16"] = "bf16"
    measure_steps: Positive = 250
    logging_steps: Positive = 25
    held_out_images: Annotated[int, Field(ge=2)] = 500
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def stages(self) -> dict[str, StageSettings]:
        """The stages that have steps, by their keys."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)).steps}


STAGES = ("vision", "language", "connector", "all")
"""The keys of the stages, in their order."""

PRESETS: dict[str, dict[str, Any]] = {
    SCENES: {
        "model": {"width": 192, "inner_width": 512, "layers": 4, "heads": 6, "key_value_heads": 2, "vocabulary": 768,
                  "vision_width": 128, "vision_layers": 4, "vision_heads": 4},
        "all": {"steps": 3000},
        "mixed_precision": "no",
    },
    "photographs": {
        "vision": {"steps": 1500, "muon_learning_rate": 8e-3},
        "language": {"steps": 1200, "muon_learning_rate": 5e-3},
        "all": {"steps": 400, "learning_rate": 3e-4, "muon_learning_rate": 2e-3},
    },
    "language model": {
        "vision": {"steps": 1500, "muon_learning_rate": 8e-3},
        "connector": {"steps": 1000},
        "all": {"steps": 2000, "learning_rate": 2e-4},
    },
}  # fmt: skip
"""The defaults for the package's own captioner of scenes, for a folder, and for a folder with a language model."""

OPTIONS = ("data", "held_out", "language_model", "teacher")
"""The inputs of a pretraining: they have separate options, and cannot be given as overrides."""

LANGUAGE_SIZES = {"width", "inner_width", "layers", "heads", "key_value_heads", "vocabulary"}


def read_settings(overrides: list[str], **given: object) -> PretrainSettings:
    """Return the settings for the given ``OPTIONS``, of which ``data`` is required, with ``key.sub=value`` overrides.

    :raises UsageError: With one sentence for each fault.
    """
    has_language_model = given.get("language_model") is not None
    kind = "language model" if has_language_model else SCENES if given["data"] == SCENES else "photographs"
    values = deepcopy(PRESETS[kind]) | given
    for override in overrides:
        if (key := override.partition("=")[0]) in OPTIONS:
            raise UsageError(f"Override {override!r}: give --{key.replace('_', '-')} instead.")
        apply_override(PretrainSettings, values, override)
    try:
        settings = PretrainSettings.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(describe_fault(PretrainSettings, fault) for fault in error.errors())
        raise UsageError(f"{faults}.") from error
    if has_language_model and (set_twice := LANGUAGE_SIZES & settings.model.model_fields_set):
        keys = ", ".join(f"model.{key}" for key in sorted(set_twice))
        raise UsageError(f"{keys}: --language-model has its own sizes; leave these out.")
    return settings
