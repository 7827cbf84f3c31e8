"""Run a pretraining: read the data, build the model, train its stages one after the other, write the backbone."""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor, TrainingArguments, set_seed

from cocoa_embed.demo.pretrain.data import (
    CaptionCollator,
    CaptionedImages,
    CaptionedScenes,
    Example,
    held_out_pairs,
    read_images,
    refuse_overlap,
)
from cocoa_embed.demo.pretrain.model import build_model, embed_language_model
from cocoa_embed.demo.pretrain.muon import require_muon
from cocoa_embed.demo.pretrain.settings import SCENES, STAGES, PretrainSettings
from cocoa_embed.demo.pretrain.teacher import Teacher, make_views, with_features
from cocoa_embed.demo.pretrain.tokenizer import build_processor, build_tokenizer, train_tokenizer
from cocoa_embed.demo.pretrain.trainer import PretrainTrainer, Record
from cocoa_embed.demo.pretrain.vision import VisionCollator, VisionTraining, Words
from cocoa_embed.errors import CocoaError, UsageError, printable
from cocoa_embed.folders import (
    claim_folder,
    only_writer,
    refuse_checkpoint,
    refuse_to_overwrite,
    write_atomically,
)
from cocoa_embed.train.data.cache import replace_atomically
from cocoa_embed.train.loop.callbacks import SaveAndStop, show_progress
from cocoa_embed.train.loop.checkpoints import newest_complete
from cocoa_embed.train.loop.trainer import WEIGHTS

MARKER = "pretraining.json"
"""A file with the settings of a run, the fingerprints of its rows, and whether it is finished; it marks its folder."""

CHECKPOINTS = "checkpoints"
SAVE_MINUTES = 10


class Parts(NamedTuple):
    """What the stages of a run share.

    :param new_tokens: The ids of tokens that the language model on disk did not have.
    :param words: The words of captions that the vision encoder learns, if it has a stage.
    :param teacher: The features of images that it learns, if there is a teacher.
    :param fingerprints: The fingerprints of the rows of ``--data`` and ``--held-out``.
    """

    model: Qwen2VLForConditionalGeneration
    processor: Qwen2VLProcessor
    new_tokens: list[int]
    data: CaptionedScenes | CaptionedImages
    held_out: Mapping[str, Sequence[Example]] | None
    words: Words | None
    teacher: Teacher | None
    fingerprints: dict[str, str]


def pretrain(settings: PretrainSettings, out: Path, *, resume: bool = False) -> None:
    """Make a backbone and write it to ``out``: bfloat16 safetensors, processor and config, and ``log.jsonl``.

    With ``held_out``, the weights are those with the lowest loss on it; if those of the last step differ, they are in
    ``last``.

    :param resume: Continue the interrupted run in ``out``, if there is one; a finished run does not change.
    :raises UsageError: If the settings contradict each other, or the interrupted run had other settings or rows.
    :raises Stopped: If SIGTERM or Ctrl-C has stopped the run; it can be resumed.
    :raises CocoaError: If data, model, teacher or folder cannot be used, or another run writes to the folder.
    """
    _check(settings, out)
    request = settings.model_dump(mode="json")
    with only_writer(out, marker=MARKER):
        earlier = _earlier_run(out, request) if resume else {}
        if not earlier.get("finished"):
            _train_stages(settings, request, earlier, out)
            _record(out, request, finished=True)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _train_stages(settings: PretrainSettings, request: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """Start a run, or continue an ``earlier`` one that is not finished, and write its backbone."""
    set_seed(settings.seed)
    parts = _build(settings)
    if not earlier:
        claim_folder(out, marker=MARKER)
        _record(out, request, rows=parts.fingerprints)
    elif earlier.get("rows", parts.fingerprints) != parts.fingerprints:  # earlier versions did not record them
        raise UsageError(f"The captions or the images of the run in {printable(out)} have changed since it began; "
                         "restore them, or leave out --resume to begin again.")  # fmt: skip
    for name in settings.stages:
        result = out / CHECKPOINTS / f"{name}.safetensors"
        if not result.is_file():
            _run_stage(name, settings, parts, out)
            replace_atomically(result, lambda path: save_model(parts.model, str(path)))
            shutil.rmtree(out / CHECKPOINTS / name, ignore_errors=True)
        load_model(parts.model, str(result))
    write_backbone(parts.model, parts.processor, out)


def _record(out: Path, request: dict[str, Any], **facts: object) -> None:
    write_atomically(out / MARKER, json.dumps({**request, **facts}, indent=2) + "\n")


def write_backbone(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, folder: Path) -> None:
    """Write a model in bfloat16, and its processor."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)


def _check(settings: PretrainSettings, out: Path) -> None:
    refuse_checkpoint(out)
    read = (None if settings.data == SCENES else Path(settings.data), settings.held_out)
    refuse_to_overwrite(out, filter(None, (*read, settings.language_model, settings.teacher)))
    if not settings.stages:
        raise UsageError(f"No stage has steps; set one of {', '.join(f'{name}.steps' for name in STAGES)}.")
    if any(stage.muon_learning_rate is not None for stage in settings.stages.values()):
        require_muon()
    if settings.teacher is not None and not settings.vision.steps:
        raise UsageError("--teacher is for the vision stage, which has no steps; set vision.steps.")
    if settings.teacher is not None and settings.data == SCENES:
        raise UsageError("--teacher needs a folder of images as --data: scenes are drawn afresh in each step.")
    if settings.connector.steps and settings.language_model is None:
        raise UsageError("The connector stage freezes the language model, which is random without --language-model; "
                         "give one, or set connector.steps=0.")  # fmt: skip


def _earlier_run(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``MARKER`` for the run in ``out``, empty if there is none.

    :raises UsageError: If the run had other settings.
    """
    if not (out / MARKER).is_file():
        return {}
    earlier: dict[str, Any] = json.loads((out / MARKER).read_text(encoding="utf-8") or "{}")
    if other := [key for key in request if earlier and earlier.get(key) != request[key]]:
        raise UsageError(f"The run in {printable(out)} had other values of {' and '.join(other)} (see {MARKER} there); "
                         "give the same values, or leave out --resume to begin again.")  # fmt: skip
    return earlier


def _build(settings: PretrainSettings) -> Parts:
    """Read the data and build the model."""
    size, varied, seed, vision = settings.model.image_size, settings.augmentation, settings.seed, settings.vision
    data, held_out, teacher = settings.data, settings.held_out, settings.teacher
    images = None if data == SCENES else read_images(Path(data), size, varied, seed)
    unseen = None if held_out is None else read_images(held_out, size, varied, seed, settings.held_out_images)
    if unseen and len(unseen) < 2:
        raise CocoaError(f"{printable(str(held_out))} has one image; measuring needs at least two, to swap them.")
    if unseen and images:
        refuse_overlap(images, unseen, (data, str(held_out)))
    new_tokens: list[int] = []
    if settings.language_model is not None:
        model, tokenizer, new_tokens = embed_language_model(settings.language_model, settings.model)
    else:
        texts = None if images is None else (text for texts in images.captions for text in texts)
        tokenizer = train_tokenizer(texts, settings.model.vocabulary) if texts else build_tokenizer(seed)
        model = build_model(tokenizer, settings.model)
    training = images or CaptionedScenes(seed)
    return Parts(
        model,
        build_processor(tokenizer, settings.model),
        new_tokens,
        training,
        None if unseen is None else held_out_pairs(unseen),
        Words(training.all_words(), vision.word_images) if vision.steps else None,
        Teacher(teacher, images.images, size, vision.components) if teacher and images else None,
        {name: read.fingerprint for name, read in (("data", images), ("held_out", unseen)) if read is not None},
    )


def _run_stage(name: str, settings: PretrainSettings, parts: Parts, out: Path) -> None:
    """Train a stage, and leave its best weights in the model.

    :raises Stopped: If a signal has stopped it.
    """
    folder, held_out = out / CHECKPOINTS / name, parts.held_out
    data: Dataset[Example] = parts.data
    trained: nn.Module = parts.model
    collate: Any = CaptionCollator(parts.processor)
    set_seed(settings.seed)
    if name == "vision" and parts.words is not None:
        collate, channels = VisionCollator(parts.processor, parts.words), 0
        if parts.teacher is not None and isinstance(parts.data, CaptionedImages):
            data = views = make_views(parts.data, parts.teacher, settings.vision, out / CHECKPOINTS / "views")
            held_out, channels = held_out and with_features(held_out, parts.teacher), views.features.shape[-1]
        trained = VisionTraining(parts.model, len(parts.words), channels, settings.vision.word_weight)
    parts.model.model.visual.requires_grad_(name != "language")
    frozen = frozen_language_model(parts.model, parts.new_tokens) if name == "connector" else nullcontext(())
    with frozen as undecayed:
        trainer = PretrainTrainer(
            model=trained,
            args=training_arguments(name, settings, folder),
            train_dataset=data,
            data_collator=collate,
            eval_dataset=held_out,
            undecayed=undecayed,
            muon_learning_rate=settings.stages[name].muon_learning_rate,
            callbacks=[Record(out / "log.jsonl", name)],
        )
        show_progress(trainer, name, {"loss": "loss", "eval_right": "right", "eval_gap": "gap"})
        train(trainer, folder, name)
    best, last = trainer.state.best_global_step, trainer.state.global_step
    if best not in (None, last):
        if name == list(settings.stages)[-1]:
            write_backbone(parts.model, parts.processor, out / "last")
        load_model(trainer.trained, str(folder / f"checkpoint-{best}" / WEIGHTS))


def train(trainer: PretrainTrainer, folder: Path, stage: str) -> None:
    """Train to the last step, from the newest checkpoint if there is one.

    :raises Stopped: If a signal has stopped it before.
    """
    stop = SaveAndStop(trainer, SAVE_MINUTES)
    trainer.add_callback(stop)
    stop.train(newest_complete(folder), stage)


def training_arguments(name: str, settings: PretrainSettings, folder: Path) -> TrainingArguments:
    """Return the arguments of a stage."""
    stage, every, on_gpu = settings.stages[name], settings.measure_steps, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=stage.steps // 20,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.adam_beta2,
        logging_steps=settings.logging_steps,
        save_steps=every,
        save_total_limit=2,
        eval_strategy="no" if settings.held_out is None else "steps",
        eval_steps=every,
        metric_for_best_model="right",
        greater_is_better=False,
        bf16=settings.mixed_precision == "bf16",
        use_cpu=not on_gpu,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        # The dispatcher would cut pixel_values, which have a row for each patch, to the number of captions.
        accelerator_config={"dispatch_batches": False},
        seed=settings.seed,
    )


@contextmanager
def frozen_language_model(model: Qwen2VLForConditionalGeneration, new_tokens: Sequence[int]) -> Iterator[list[str]]:
    """Train only the vision encoder and the embeddings of new tokens inside the block.

    :returns: The names of parameters to exclude from weight decay, since most of their rows are frozen.
    """
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    embeddings: Any = model.get_input_embeddings().weight
    embeddings.requires_grad_(bool(new_tokens))
    is_new = torch.zeros(len(embeddings), 1)
    is_new[list(new_tokens)] = 1
    hooks = [embeddings.register_hook(lambda gradient: gradient * is_new.to(gradient.device))] if new_tokens else []
    yield [name for name, parameter in model.named_parameters() if parameter is embeddings]
    for hook in hooks:
        hook.remove()
    model.requires_grad_(True)
