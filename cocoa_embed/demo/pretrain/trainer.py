"""The trainer of a stage: resumable, measured on held-out images, with a log file."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.demo.pretrain.data import Example
from cocoa_embed.demo.pretrain.muon import MuonAndAdamW
from cocoa_embed.folders import write_atomically
from cocoa_embed.train.data.sampling import RowStream
from cocoa_embed.train.loop.checkpoints import mark_complete
from cocoa_embed.train.loop.trainer import WEIGHTS
from cocoa_embed.train.stages.probe import evaluating
from cocoa_embed.train.stages.rendering import batched

Collate = Callable[[list[Example]], dict[str, Tensor]]


class PretrainTrainer(Trainer):
    """Transformers' trainer over the images of a folder, each once per epoch, or over a stream.

    Its ``eval_dataset`` is that of ``held_out_pairs``: examples by name.

    :param undecayed: Names of further parameters without weight decay.
    :param muon_learning_rate: Update the weight matrices of the layers with Muon at this learning rate.
    """

    optimizer: Any

    def __init__(
        self, *args: Any, undecayed: Sequence[str] = (), muon_learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.undecayed, self.muon_learning_rate = undecayed, muon_learning_rate
        self.trained: Any = self.model
        self.collate: Any = self.data_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> RowStream | None:  # noqa: ANN401
        data: Any = self.train_dataset
        if isinstance(data, IterableDataset):
            return None
        rows, batch_size = len(data), self.args.per_device_train_batch_size
        return RowStream(rows, self.args.max_steps * batch_size, batch_size, self.args.seed)

    def create_optimizer(self, model: Any = None) -> Optimizer:  # noqa: ANN401
        """Return the optimizer, which is created once."""
        if self.optimizer is None and self.muon_learning_rate is not None:
            decayed = self.get_decay_parameter_names(self.trained)
            rates = self.args.learning_rate, self.muon_learning_rate
            self.optimizer = MuonAndAdamW(self.trained, decayed, rates, self.args.weight_decay, self.args.adam_beta2)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.undecayed]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the loss on held-out images, with another image instead, and the gap, in nats per caption token."""
        held_out: Any = self.eval_dataset
        losses = {name: self._mean_loss(examples) for name, examples in held_out.items()}
        losses["gap"] = losses["wrong"] - losses["right"]
        metrics = {f"eval_{name}": value for name, value in losses.items()}
        self.log(dict(metrics))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        stage = Path(str(self.args.output_dir)).name
        tqdm.write(f"{stage}, step {self.state.global_step}, on held-out images: {shown}", file=sys.stderr)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_loss(self, examples: Sequence[Example]) -> float:
        """Return the mean loss: over tokens if there are labels, otherwise over images."""
        total, count = 0.0, 0
        with evaluating(self.trained), self.compute_loss_context_manager():
            for rows in batched(examples, self.args.per_device_train_batch_size):
                batch = self._prepare_inputs(self.collate(rows))
                weight = int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else len(rows)
                total += self.trained(**batch)["loss"].item() * weight
                count += weight
        return total / count

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        mark_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.trained, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model(self.trained, str(Path(resume_from_checkpoint) / WEIGHTS))


class Record(TrainerCallback):
    """Measures after the last step, too, and writes the log lines of a stage after those of the earlier stages."""

    def __init__(self, file: Path, stage: str) -> None:
        self.file, self.stage = file, stage
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.earlier = [line for line in lines if json.loads(line)["stage"] != stage]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a measurement."""
        control.should_evaluate |= state.global_step >= state.max_steps and args.eval_strategy != "no"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write all lines of the stage; a resumed run continues those of its checkpoint."""
        own = [json.dumps({"stage": self.stage, **line}) for line in state.log_history]
        write_atomically(self.file, "\n".join([*self.earlier, *own]) + "\n")
