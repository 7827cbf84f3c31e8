from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.train.loop.progress import LiveLossCallback

STEP = {"loss": 2.345678, "masked_token_accuracy": 0.41, "learning_rate": 1e-3, "tokens_per_second": 9e3}
PROBED = {
    "accuracy_matching_image": 0.51,
    "accuracy_shuffled_image": 0.31,
    "accuracy_no_image": 0.3,
    "alignment": 1.2,
    "uniformity": -2.0,
    "modality_gap": 0.9,
    "effective_rank": 20.0,
}


class Bar:
    """Keeps what stands beside it, as a reader sees it."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def set_postfix(self, values: dict[str, Any]) -> None:
        self.shown.append(", ".join(f"{name}={value}" for name, value in values.items()))


@pytest.mark.parametrize("step_figures", [STEP, {**STEP, "mntp_loss": 2.0, "mae_loss": 0.5}])
def test_the_probes_accuracies_take_the_place_of_the_batchs(step_figures: dict[str, float]) -> None:
    callback = LiveLossCallback("bridge")
    bar = callback.training_bar = Bar()
    nothing: Any = (TrainingArguments(report_to="none", use_cpu=True), TrainerState(), TrainerControl())
    for logs in (step_figures, {**step_figures, **PROBED}, {**step_figures, "loss": 1.0}):
        callback.on_log(*nothing, logs=logs)
    parts = ", text=2.000, pixels=0.500" if "mntp_loss" in step_figures else ""
    probed = "right image=0.510, shuffled=0.310, no image=0.300"
    assert bar.shown == [
        f"loss=2.346{parts}, accuracy=0.410",
        f"loss=2.346{parts}, {probed}",
        f"loss=1.000{parts}, {probed}",
    ]
    assert len(bar.shown[1]) - len(parts) <= 64, "there is room for it beside a bar"
