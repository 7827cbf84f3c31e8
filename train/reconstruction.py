"""What the two reconstruction stages share: the forward pass, the head on hidden tokens alone, the trainer."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from cocoa_embed.attention import as_model_mask, bidirectional_mask, bridge_mask
from cocoa_embed.flex import bidirectional_block_mask, bridge_block_mask, uses_flex_attention
from cocoa_embed.train.finite import FiniteLossTrainer
from cocoa_embed.train.losses import predicting_states


def position_ids(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the multimodal rotary positions of a right-padded batch, int64 ``[3, B, L]``.

    A prepared 4-D mask tells a model nothing of padding, so positions are passed with it.
    """
    if "image_grid_thw" not in batch:
        rows, length = batch["input_ids"].shape
        return torch.arange(length, device=batch["input_ids"].device).expand(3, rows, length)
    positions, _ = model.base_model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    return positions


def last_hidden_states(
    model: PreTrainedModel, batch: dict[str, Tensor], attention_mask: Tensor | BlockMask, positions: Tensor
) -> Tensor:
    """Run the backbone without its head under a prepared attention mask: ``[B, L, D]``."""
    return model.base_model(
        input_ids=batch["input_ids"],
        attention_mask=attention_mask,
        position_ids=positions,
        pixel_values=batch.get("pixel_values"),
        image_grid_thw=batch.get("image_grid_thw"),
        mm_token_type_ids=batch["mm_token_type_ids"],
        use_cache=False,
    ).last_hidden_state


def model_mask(model: PreTrainedModel, allowed: Tensor) -> Tensor:
    """Return ``allowed`` (bool ``[B, L, L]``) in the form that the model's attention implementation takes."""
    implementation = "sdpa" if uses_flex_attention(model) else model.config._attn_implementation
    return as_model_mask(allowed, attn_implementation=implementation, dtype=model.dtype)


def bidirectional_model_mask(model: PreTrainedModel, attention_mask: Tensor) -> Tensor | BlockMask:
    """Return full attention under padding (int64 ``[B, L]``) in the form that the model takes: ``[B, 1, L, L]``."""
    if uses_flex_attention(model):
        return bidirectional_block_mask(attention_mask)
    return model_mask(model, bidirectional_mask(attention_mask))


def bridge_model_mask(model: PreTrainedModel, blocks: Tensor, *, eos_attends_to_b: bool = True) -> Tensor | BlockMask:
    """Return the bridge mask of ``blocks`` (int64 ``[B, L]``) in the form that the model takes: ``[B, 1, L, L]``."""
    if uses_flex_attention(model):
        return bridge_block_mask(blocks, eos_attends_to_b=eos_attends_to_b)
    return model_mask(model, bridge_mask(blocks, eos_attends_to_b=eos_attends_to_b))


def hidden_token_logits(model: PreTrainedModel, hidden_states: Tensor, hidden: Tensor) -> Tensor:
    """Apply the language-model head where a hidden token is predicted, and nowhere else: ``[hidden tokens, V]``."""
    return model.get_output_embeddings()(predicting_states(hidden_states, hidden))


Probe = Callable[[nn.Module], dict[str, float]]


class StageTrainer(FiniteLossTrainer):
    """A :class:`~transformers.Trainer` that also logs the parts that a stage's model returns beside its loss.

    The model returns a dictionary of scalars with ``loss`` among them; each log line holds the mean of the others since
    the line before.

    :param probe: Measures the model for the log: at the first line after every ``probe_steps`` steps, and at the last.
    """

    def __init__(self, *args: Any, probe: Probe | None = None, probe_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._probe = probe
        self._probe_steps = probe_steps
        self._probed_at = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the model's loss and keep its other parts for the log."""
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name].append(value.detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts' means to ``logs``."""
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._parts.items()}
            self._parts.clear()
            if self._probe is not None and self._is_probe_due():
                logs |= self._probe(self.accelerator.unwrap_model(self.model))
                self._probed_at = self.state.global_step
        super().log(logs, *args, **kwargs)

    def _is_probe_due(self) -> bool:
        step = self.state.global_step
        return step - self._probed_at >= self._probe_steps or step == self.state.max_steps
