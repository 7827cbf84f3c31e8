"""Stage 3: its batches, its loss and its trainer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, set_seed

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import UsageError
from cocoa_embed.evaluation.geometry import ALIGNMENT
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.flex_attention import FLEX
from cocoa_embed.train.data.broken_rows import unbroken
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Example
from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.memory_trial import Trial
from cocoa_embed.train.loop.trainer import CocoaTrainer, Probe, StageContext
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.contrastive.batches import PairBatches, pair_groups, step_contents
from cocoa_embed.train.stages.contrastive.inputs import preprocess_items, worst_column
from cocoa_embed.train.stages.contrastive.loss import contrastive_loss
from cocoa_embed.train.stages.contrastive.mini_batches import CPU_TOKENS, TokenLimits, take
from cocoa_embed.train.stages.contrastive.model import as_sentence_transformer, embedding_probe
from cocoa_embed.train.stages.contrastive.pairs import PairCollator
from cocoa_embed.train.stages.contrastive.reconstruction_term import MASKINGS, has_text, prepare_head, reconstruct
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.trainer import ContrastiveTrainer
from cocoa_embed.train.stages.probe import pictured_rows
from cocoa_embed.train.stages.rendering import render_items
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.vision_features import share_frozen_vision

TRIED_TOKENS = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512)
"""The sizes to try; more tokens at once are no faster."""

PROBED_TOKENS = 64
"""The tokens per item with which the probe fills a mini-batch: without gradients, items take little memory."""

DIRECTIONS = {
    "forward": "",
    "both": " Each pair is trained in both directions, as two rows.",
    "symmetric": " Each positive is matched to its query too, in the same loss.",
}


class Contrastive(Stage[ContrastiveSettings]):
    """InfoNCE with in-batch negatives over the embeddings of queries and documents."""

    can_shard = False
    sends_uint8 = True
    accumulates = False  # cached gradients cut a batch into mini-batches
    enough_at_once = 1024  # tokens

    def check_backbone(self, config: PreTrainedConfig) -> None:
        """Check ``matryoshka_dims`` against the embeddings' width, and ``reconstruction_weight`` against ``pooling``.

        :raises UsageError: If a length is larger than the width, or reconstruction is on without pooling eos.
        """
        if self.settings.reconstruction_weight and self.run.pooling != "eos":
            raise UsageError(
                f"{self.name}.reconstruction_weight teaches <EOS> to hold the content, but pooling={self.run.pooling}; "
                f"set pooling=eos or {self.name}.reconstruction_weight=0."
            )
        width, longest = config.get_text_config().hidden_size, max(self.settings.matryoshka_dims or [0])
        if longest > width:
            raise UsageError(
                f"{self.name}.matryoshka_dims asks for {longest} values, but this backbone's embeddings have {width}; "
                f"give lengths up to {width}."
            )

    def check_rows(self, rows: RowTable) -> None:
        """Check that every subset makes batches, and that each batch has something to contrast.

        :raises UsageError: If a subset does not.
        """
        devices = PartialState().num_processes
        contents = step_contents(rows, self.settings, devices)
        trained = {content.subset for content in contents if content.batches}
        for content in contents:
            if (fault := content.fault(devices)) and (content.batches or content.subset not in trained):
                raise UsageError(
                    f"Subset {content.subset!r} of stage {self.name} {fault}; leave it out of the stage, or give it "
                    "more different pairs."
                )

    def joined_rows(self, rows: RowTable) -> np.ndarray:
        """Return the rows that are also reconstructed, bool ``[rows]``; otherwise each item is its own sequence."""
        found: np.ndarray = rows.column("query_text") + rows.column("positive_text") > 0
        return found & (self.settings.reconstruction_weight > 0)

    def step_contents(self, rows: RowTable) -> list[dict[str, Any]]:
        """Return what a step on each subset holds."""
        return [asdict(content) for content in step_contents(rows, self.settings, PartialState().num_processes)]

    def mean_batch_size(self, rows: RowTable) -> float:
        """Return the mean number of rows of an epoch's batches, the last of which may be smaller."""
        size, devices = self.settings.batch_size, PartialState().num_processes
        batches = sum(group.batches(size, devices) for group in pair_groups(rows, self.settings))
        return len(rows) * self.passes_per_epoch / batches

    def row_warnings(self, rows: RowTable) -> list[str]:
        """Return a sentence for each subset with small batches, few negatives, or rows that are in no batch."""
        devices = PartialState().num_processes
        remedy = f"give it more different pairs, lower {self.name}.batch_size, or leave it out of the stage"
        warnings = []
        for content in step_contents(rows, self.settings, devices):
            subset = f"Subset {content.subset!r} of stage {self.name}"
            if not content.batches:
                several, hard = content.rows > 1, content.hard_negatives
                warnings.append(
                    f"{subset}: its {content.rows} row{'s' * several} with {hard} hard negative{'s' * (hard != 1)} "
                    f"make{'s' * (not several)} no batch; give all rows equally many, or leave such rows out."
                )
            elif warning := content.warning(self.settings.batch_size):
                warnings.append(f"{subset} {warning}; {remedy}.")
        return warnings

    @property
    def passes_per_epoch(self) -> int:
        """Once per direction that counts as a separate row."""
        return 2 if self.settings.directions == "both" else 1

    @property
    def tokens_at_once(self) -> int:
        """The tokens of a mini-batch where memory does not decide."""
        tokens = self.settings.mini_batch_tokens
        return CPU_TOKENS if tokens == "auto" else tokens

    def sizes_at_once(self, devices: int) -> Sequence[int]:
        """Return the sizes of a mini-batch, in tokens, that memory may choose from."""
        tokens = self.settings.mini_batch_tokens
        return TRIED_TOKENS if tokens == "auto" else (tokens,)

    def sequences_at_once(self, devices: int, longest: int = 1, size: int | None = None) -> int:
        """Return how many items of the longest length make a mini-batch."""
        return max(1, min((size or self.tokens_at_once) // longest, self.settings.batch_size // devices))

    def kind_at_once(self, *, with_image: bool) -> str:
        """Return what items are counted in."""
        return f"tokens of {'images' if with_image else 'texts'}"

    def memory_remedy(self) -> str:
        """Return what to change in the recipe when a step does not fit into memory."""
        tokens = self.settings.mini_batch_tokens
        return f"lower {self.name}.mini_batch_tokens ({tokens}) or max_pixels, or set gradient_checkpointing=true"

    def sequences(self, example: Example, processor: ProcessorMixin) -> list[Batch]:
        """Return a sequence for each item of the row."""
        _, row = example
        items = (row.query, row.positive, *row.negatives[: self.settings.hard_negatives])
        masked = [BridgeCollator(processor, self.run.seed)([example])] if self._reconstructs(row) else []
        return [*(render_items(processor, [item]) for item in items), *masked]

    def _reconstructs(self, row: Row) -> bool:
        return self.settings.reconstruction_weight > 0 and has_text(row)

    def alike(self, row: Row) -> list[Row]:
        """Return for each item of the row a pair of this item with itself."""
        items = (row.query, row.positive, *row.negatives[: self.settings.hard_negatives])
        alike = [replace(row, query=item, positive=item, negatives=()) for item in items]
        return alike + [row] * self._reconstructs(row)

    def attention(self) -> str:
        """Return the attention implementation; sentence-transformers makes the masks, which are not block masks."""
        asked = self.run.attn_implementation
        return "sdpa" if asked == FLEX and self.run.bidirectional else super().attention()

    def arguments(self, *, steps: int, folder: Path, layers: Sequence[str] = ()) -> dict[str, Any]:
        """Return the ``TrainingArguments``: the batch sampler itself gives each device its part of a batch."""
        arguments = super().arguments(steps=steps, folder=folder, layers=layers)
        return arguments | {
            "accelerator_config": {**arguments["accelerator_config"], "split_batches": False},
            "per_device_train_batch_size": self.settings.batch_size // PartialState().num_processes,
            # Texts and images are embedded in separate passes.
            "ddp_find_unused_parameters": not self.settings.freeze_vision,
            "dataloader_prefetch_factor": 1 if arguments["dataloader_num_workers"] else None,  # a batch is large
        }

    def trainer(self, backbone: Backbone, rows: RowTable, context: StageContext) -> ContrastiveTrainer:
        """Return the trainer, whose model is a SentenceTransformer over the backbone."""
        settings, probe = self.settings, None
        model = as_sentence_transformer(backbone, self.run)
        model.model_card_data.widget = [{}]  # otherwise the trainer picks examples for a card that is not written
        set_seed(self.run.seed)
        query, document = self.run.prompts.query, self.run.prompts.document
        prompts = {"anchor": query, "positive": document}
        prompts |= {f"negative_{place + 1}": document for place in range(settings.hard_negatives)}
        inner = cast(PreTrainedModel, model[0].auto_model)
        adapter = prepare_trainable(inner, settings, bf16=self.run.mixed_precision == "bf16")
        vision = share_frozen_vision(inner, self.run, remembers=True) if settings.freeze_vision else None
        probe_rows = unbroken(pictured_rows(rows, settings.probe_rows, self.run.seed), context.on_bad_row)
        if len(probe_rows) > 1:
            measure = embedding_probe(model, probe_rows, self.sequences_at_once(1, PROBED_TOKENS))
            probe = Probe(measure, settings.probe_steps, {ALIGNMENT})
        arguments = SentenceTransformerTrainingArguments(**context.arguments)
        groups, limits = pair_groups(rows, settings), TokenLimits(self.tokens_at_once, self.tokens_at_once)
        span, turns, masking, term = 2 * len(rows), 1, None, None
        if settings.reconstruction_weight:
            turns, masking = MASKINGS, BridgeCollator(backbone.processor, self.run.seed)
            term = partial(reconstruct, prepare_head(backbone.model), settings.reconstruction_weight)
        return ContrastiveTrainer(
            model=model,
            args=arguments,
            batches=PairBatches(
                groups,
                settings.batch_size,
                arguments.max_steps,
                arguments.seed,
                PartialState().num_processes,
                turns,
                span,
            ),
            train_dataset=Dataset.from_dict({"row": np.arange(turns * span)}),
            limits=limits,
            loss=contrastive_loss(model, settings, limits, vision, term, self.run.eos_tokens),
            data_collator=PairCollator(
                preprocess_fn=partial(preprocess_items, model),
                prompts={column: prompt for column, prompt in prompts.items() if prompt},
                rows=rows,
                hard_negatives=settings.hard_negatives,
                flops_of=context.flops_of,
                lengths_of=context.lengths_of,
                on_bad_row=context.on_bad_row,
                masking=masking,
            ),
            rows=rows,
            context=context,
            adapter=adapter,
            probe=probe,
        )

    def trials(self, trainer: CocoaTrainer, rows: RowTable) -> list[Trial]:
        """Return the tokens of texts, and of items with images, that a device may run at once."""
        model: Any = trainer.model
        limits, sizes = cast(ContrastiveTrainer, trainer).limits, self.sizes_at_once(1)

        def trial(kind: str, *, with_image: bool) -> Trial:
            column = worst_column(model, self.run.max_length, with_image=with_image)

            def run(size: int) -> Iterator[Tensor]:
                batch = take(column, [0] * max(1, size // column["attention_mask"].numel()))
                with trainer.accelerator.autocast():
                    yield model(send_to_device(batch, trainer.accelerator.device))["sentence_embedding"].sum()

            name = self.kind_at_once(with_image=with_image)
            return Trial(name, sizes, run, partial(setattr, limits, kind), self.enough_at_once)

        return [trial("texts", with_image=False), trial("images", with_image=True)]

    def run_whole(self, trainer: CocoaTrainer, tokens: int) -> None:
        """Set the limits so that a mini-batch is a whole column, and two columns are too many for a single pass."""
        limits = cast(ContrastiveTrainer, trainer).limits
        limits.texts = limits.images = tokens

    def save(self, trainer: CocoaTrainer, processor: ProcessorMixin, folder: Path) -> None:
        """Write the SentenceTransformer; every process calls this, and the first one writes."""
        if trainer.is_world_process_zero():
            cast(SentenceTransformer, trainer.model).save(str(folder), create_model_card=False)

    def facts(self) -> dict[str, Any]:
        """Return the loss in words, and the lengths at which embeddings can be cut."""
        count = self.settings.hard_negatives
        hard = f"up to {count} hard negative{'s' * (count > 1)} of each of its rows" if count else "no hard negatives"
        return {
            "description": (
                f"Contrastive learning: InfoNCE at temperature {self.settings.temperature:g}, with in-batch negatives "
                f"and {hard}. A batch is drawn from one subset.{DIRECTIONS[self.settings.directions]}"
            ),
            "matryoshka_dims": self.settings.matryoshka_dims,
        }
