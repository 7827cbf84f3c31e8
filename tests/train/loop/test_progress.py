from io import StringIO

import pytest
from stages import alone
from tqdm import tqdm

from cocoa_embed.train.loop.callbacks import StageProgressCallback
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge

STEP = {"loss": 2.345678, "masked_token_accuracy": 0.41, "learning_rate": 1e-3, "tokens_per_second": 9e3}
PROBED = {
    "accuracy_matching_image": 0.51,
    "accuracy_shuffled_image": 0.31,
    "accuracy_no_image": 0.3,
    "pair_recall": 0.1,
}


@pytest.mark.parametrize("probe_rows", [0, 4])
def test_the_bar_shows_the_stages_newest_metrics(probe_rows: int) -> None:
    settings = BridgeSettings(steps=1, batch_size=1, probe_rows=probe_rows)
    callback = StageProgressCallback("bridge", alone(Bridge, settings).shown_metrics)
    bar = callback.training_bar = tqdm(file=StringIO())
    shown = []
    for logs in (STEP, {**STEP, **PROBED}, {**STEP, "loss": 1.0}):
        callback.on_log(logs=logs)
        shown.append(bar.postfix)
    probed = "matching image=0.510, shuffled=0.310, recall=0.100"
    if probe_rows:
        assert shown == ["loss=2.346", f"loss=2.346, {probed}", f"loss=1.000, {probed}"]
        assert len(shown[1]) <= 64, "there is room for it beside a bar"
    else:
        assert shown == [f"loss={loss}, accuracy=0.410" for loss in ("2.346", "2.346", "1.000")]
