"""Low-rank adapters (LoRA, DoRA) inside the stock model during a stage, merged into its weights at the end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.errors import CocoaError, require
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.forward_inputs import forward_inputs
from cocoa_embed.train.settings import AdapterSettings, StageSettings

if TYPE_CHECKING:
    from peft import LoraModel

    from cocoa_embed.train.loop.dora import WeightNorms

LANGUAGE_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""The linear modules of the language model's layers that are adapted."""

MERGE_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest relative difference of hidden states before and after a merge, by the dtype of the weights.

A merge rounds each weight once and changes the order of sums. Through 28 random layers the difference is 1e-5 in
float32 (with matrix products in full precision, PyTorch's default) and 0.1 in bfloat16; float16 is eight times as
precise. A wrong merge loses what the adapter has learned, which makes a larger difference.
"""


@dataclass(frozen=True)
class Adapter:
    """The adapter inside a model, which keeps its stock class.

    :param model: The model, adapted in place.
    :param layers: PEFT's handle on the adapted layers.
    :param trainable: The parameters that were trainable before, and are again after ``merge``.
    :param norms: The weight norms of DoRA's layers.
    :param exact: The frozen parameters and their float32 values on the host, if the model has them in bfloat16.
    """

    model: PreTrainedModel
    layers: "LoraModel"
    trainable: tuple[nn.Parameter, ...]
    norms: "tuple[WeightNorms, ...]" = ()
    exact: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def merge(self, batch: Mapping[str, Tensor]) -> float:
        """Add the adapter to the weights, in place; the model is then a stock model again.

        A model with frozen weights in bfloat16 moves to the host, and all its weights are float32 again.

        :param batch: From ``render_items``; with an image, so that the vision encoder is compared too.
        :returns: The relative difference of the last hidden states of ``batch`` before and after the merge.
        :raises CocoaError: If the difference is larger than rounding explains, or a merged weight is not finite.
        """
        threads = torch.get_num_threads()
        if self.exact:
            self._restore()
            torch.set_num_threads(available_cores())  # a launcher gives each process one thread, but others wait now
        try:
            return self._merge(dict(send_to_device(dict(batch), self.model.device)))
        finally:
            torch.set_num_threads(threads)

    def _restore(self) -> None:
        model: Any = self.model
        model.to("cpu")
        while self.exact:
            parameter, value = self.exact.pop()
            parameter.data = value

    def _merge(self, batch: Mapping[str, Tensor]) -> float:
        before = _last_hidden_states(self.model, batch)
        try:
            self.layers.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise CocoaError(
                f"The adapter cannot be merged: {error} Lower learning_rate or raise warmup_steps."
            ) from error
        for norms in self.norms:
            norms.remove()
        vars(self.model).pop("peft_config", None)  # some versions of peft leave it behind
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        after = _last_hidden_states(self.model, batch)
        difference = ((after - before).abs().max() / before.abs().max()).item()
        tolerance = MERGE_TOLERANCES[self.model.dtype]
        if not difference <= tolerance:  # true for NaN too
            raise CocoaError(
                f"The merged model differs from the adapted one: its last hidden states differ by {difference:.2g} of "
                f"the largest value, but rounding in {self.model.dtype} explains at most {tolerance:.2g}. The adapter "
                "was not merged as it was trained; try another version of peft, or train without an adapter."
            )
        return difference

    def return_to(self, device: torch.device) -> None:
        """Move the merged model from the host, where its weights were saved, to a device, in bfloat16 as before."""
        model: Any = self.model
        if model.device != device:
            _to_bfloat16(model.parameters())
            model.to(device)


def prepare_trainable(model: PreTrainedModel, settings: StageSettings, *, bf16: bool = False) -> Adapter | None:
    """Freeze the vision encoder with its merger and the first layers, and add an adapter, in place, by the settings.

    Call it after copying parts of the model: a layer copied later would have an adapter too, and be frozen.

    :param bf16: The model runs under bfloat16 autocast, so that weights that an adapter freezes need not be float32.
    :returns: The adapter, which is merged at the end of the stage; None if the weights themselves are trained.
    """
    if settings.freeze_vision:
        family_of(model.config).vision(model).requires_grad_(False)
    decoder: Any = model.get_decoder()
    decoder.layers[: settings.freeze_layers].requires_grad_(False)
    if settings.adapter is None:
        return None
    return add_adapter(model, settings.adapter, vision=not settings.freeze_vision, bf16=bf16)


def add_adapter(
    model: PreTrainedModel, settings: AdapterSettings, *, vision: bool = True, bf16: bool = False
) -> Adapter:
    """Add an adapter to ``model``, in place, and freeze everything else in it.

    It adapts the projections of the language model's layers (``LANGUAGE_LINEARS``) and, with ``vision``, those of the
    vision encoder's blocks (``Family.adapted``); never the embeddings, the head, the patch embedding or the merger.
    The adapter's weights are float32, whatever the model's dtype.

    :param model: A supported model, with its head or without (``Qwen2VLForConditionalGeneration``, ``Qwen2VLModel``).
    :param bf16: Make all other weights bfloat16; the first process, which merges, keeps their values on the host.
        The model then runs only under autocast.
    :raises CocoaError: If the model has no such projections.
    """
    require("peft", "train")
    from cocoa_embed.train.loop.dora import WeightNorms

    trainable = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    layers = add_lora(model, settings, _targets(model, vision))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    parts = (model.get_decoder(), family_of(model.config).runs_layers(model)) if settings.kind == "dora" else ()
    norms = tuple(map(WeightNorms, parts))
    exact = []
    if bf16:
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        if PartialState().is_main_process:
            exact = [(parameter, parameter.data.to("cpu")) for parameter in frozen]
        _to_bfloat16(frozen)
        for name in layers.targeted_module_names:
            layer: Any = model.get_submodule(name)
            layer.cast_input_dtype_enabled = False  # PEFT casts to float32, which autocast would undo
    return Adapter(model, layers, trainable, norms, exact)


def add_lora(model: PreTrainedModel, settings: AdapterSettings, targets: list[str]) -> "LoraModel":
    """Add PEFT's adapter to the named modules, in place, and return its handle."""
    from peft import LoraConfig, LoraModel

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
        use_dora=settings.kind == "dora",
        target_modules=targets,
    )
    return LoraModel(model, config, "default")


def _to_bfloat16(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()


def _targets(model: PreTrainedModel, vision: bool) -> list[str]:
    """Return the names in ``model`` of the projections to adapt."""
    parts = [("the language model's layers", model.get_decoder().get_submodule("layers"), LANGUAGE_LINEARS)]
    if vision:
        family = family_of(model.config)
        parts += [("the vision encoder's blocks", family.vision_layers(model), family.adapted)]
    targets = []
    for place, part, known in parts:
        within = set(part.modules())
        names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each in within]
        chosen = [name for name in names if name.rpartition(".")[2] in known]
        if not chosen:
            found = sorted({name.rpartition(".")[2] for name in names})
            raise CocoaError(
                f"No adapter fits {type(model).__name__}: {place} have no linear layer named "
                f"{', '.join(sorted(known))}, but {', '.join(found) or 'none at all'}. Train the weights themselves: "
                "remove adapter from the stage's settings."
            )
        targets += chosen
    return targets


def _last_hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Run the backbone without its head and without dropout: float32 ``[B, L, D]``."""
    was_training = model.training
    inputs = {**forward_inputs(model.eval(), batch), "attention_mask": batch["attention_mask"]}
    states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    model.train(was_training)
    return states.float()
