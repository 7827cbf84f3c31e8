"""A stage of joint reconstruction: its trainer and its samples."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from accelerate.utils import send_to_device
from transformers import ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.forward_inputs import HostInputs
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.stage_trainer import StageTrainer, stage_trainer
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.stages.joint.collator import JointCollator
from cocoa_embed.train.stages.joint.model import JointModel
from cocoa_embed.train.stages.joint.settings import JointSettings
from cocoa_embed.train.stages.rendering import joined, row_images
from cocoa_embed.train.stages.samples import shown_images, token_samples
from cocoa_embed.train.stages.stage import Stage

Own = TypeVar("Own", bound=JointSettings, covariant=True)


class Joint(Stage[Own]):
    """A stage that differs from others of its kind in what its collator masks and how its model predicts it."""

    has_samples = True

    collator_class: ClassVar[type[JointCollator]]
    model_class: ClassVar[type[JointModel]]

    @property
    def shown_metrics(self) -> Mapping[str, str]:
        """Both losses, and the accuracy on masked tokens."""
        text_loss = self.model_class.text_loss
        return {"loss": "loss", text_loss: "text", "mae_loss": "pixels", "masked_token_accuracy": "accuracy"}

    def collator(self, processor: ProcessorMixin) -> JointCollator:
        """Return the stage's collator."""
        return self.collator_class(processor, self.run.seed, self.settings)

    def sequences(self, example: Example, processor: ProcessorMixin) -> list[Batch]:
        """Return the single sequence of the row."""
        return [self.collator(processor)([example])]

    def trainer(self, backbone: Backbone, rows: RowTable, context: StageContext) -> StageTrainer:
        """Return the trainer; the pixel decoder in its model is not saved."""
        model = self.model_class(backbone.model, self.settings)
        collator = HostInputs(backbone.model.config).after(self.collator(backbone.processor))
        return stage_trainer(model, backbone.model, rows, collator, self.settings, context)

    def samples(
        self, model: JointModel, processor: ProcessorMixin, batch: Batch, rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Predict the masked patches and tokens of a batch.

        :returns: ``tokens`` (``token_samples``), and ``patches``: for each image its row's text as ``caption``, and the
            images ``original``, ``masked`` and ``reconstructed``.
        """
        logits, predicted = model.predict(dict(send_to_device(batch, model.backbone.device)))
        shown = batch.get("pixel_values", batch["target_patches"])
        before, masked, after = (
            shown_images(batch, pixels, model.pixel_decoder.geometry, processor)
            for pixels in (
                shown.masked_scatter(batch["masked_patches"][:, None], batch["target_patches"]),
                shown,
                shown.masked_scatter(batch["masked_patches"][:, None], predicted.float().cpu()),
            )
        )
        captions = [joined(row).text or "" for row in rows for _ in row_images(row)]
        patches = [
            {"caption": caption, "original": first, "masked": second, "reconstructed": third}
            for caption, first, second, third in zip(captions, before, masked, after, strict=True)
        ]
        return {"patches": patches, "tokens": token_samples(batch, logits, processor, rows, before)}
