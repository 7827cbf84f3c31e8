#!/usr/bin/env bash
# Measure training and embedding on one NVIDIA card, with random weights and without a network, in about nine minutes:
#
#     benchmarks/gpu.sh FOLDER
#
# FOLDER gets a JSON file and a log of each measurement, the most telling first, so that a run that is stopped half-way
# is worth something. PYTHON names another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:?usage: benchmarks/gpu.sh FOLDER}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

card=$($python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
if [ -z "$card" ]; then
    echo "gpu.sh: torch finds no NVIDIA card here; the other benchmarks run on a CPU" >&2
    exit 1
fi
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >&2 <<PLAN
On $card, results in $out:
  1 the tests marked gpu                                                    45 s
  2 the tiny recipe in bf16 with DoRA: train, export, evaluate              90 s
  3 bridge step at 2B: sdpa and FlexAttention, with checkpointing          125 s
  4 contrastive step at 2B: full fine-tuning, LoRA and DoRA                 85 s
  5 the plain bridge step and ours, at growing batches                     100 s
  6 embedding 512 photographs: ours, SentenceTransformer, the model alone   90 s
PLAN

measure() { # NAME SECONDS COMMAND...: run a command for at most SECONDS; its output is NAME.json, its log NAME.log
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log"
    status=$?
    echo "$name: $([ $status = 0 ] && echo done || echo "failed with status $status, see $name.log") in $((SECONDS - started)) s" | tee -a "$out/summary.txt" >&2
    [ $status = 0 ] || { cat "$out/$name.json" >>"$out/$name.log" && rm "$out/$name.json"; tail -n 5 "$out/$name.log" >&2; }
    return $status
}

step() { # NAME SECONDS STAGE OPTIONS...: a step of one side at 2B, on images of 448 x 448 pixels
    local name=$1 limit=$2 stage=$3
    shift 3
    measure "$name" "$limit" $python benchmarks/train_step.py --model qwen2-vl-2b --stage "$stage" --image-sides 16 16 \
        --steps 1 --passes 2 --json "$@"
}

tiny() { # the three stages, and recall@1 of the exported model on scenes that it was not trained on
    cat >"$work/scenes.py" <<'SCENES'
import sys
from pathlib import Path
from cocoa_embed.demo.scenes import write_image_folder
folder = Path(sys.argv[1])
write_image_folder(folder / "train", "train", 1000, seed=0)
write_image_folder(folder / "test", "held-out", 200, seed=0)
SCENES
    $python "$work/scenes.py" "$work/scenes"
    local adapter="{kind: dora, dropout: 0.0, r: 16, alpha: 64}"
    local cli="$python -m cocoa_embed.cli"
    $cli train tiny "data.folder=$work/scenes/train" mixed_precision=bf16 "warmup.adapter=$adapter" \
        "bridge.adapter=$adapter" "contrastive.adapter=$adapter" warmup.steps=40 bridge.steps=60 \
        bridge.probe_rows=32 contrastive.steps=40 contrastive.batch_size=64 --out "$work/run" >&2 &&
        $cli export "$work/run/contrastive" "$work/model" >&2 &&
        $cli eval pairs "$work/scenes/test" --model "$work/model" --json
}

measure gpu-tests 60 $python -m pytest -q -m gpu -p no:cacheprovider $(grep -rl --include="*.py" "mark.gpu" tests)
export -f tiny
export work python
measure tiny-recipe 120 bash -c tiny
step bridge-sdpa 50 bridge --side ours --attention sdpa --batch-size 16
step bridge-flex 90 bridge --side ours --attention flex_attention --batch-size 16
step bridge-sdpa-checkpointing 50 bridge --side ours --attention sdpa --batch-size 16 --gradient-checkpointing
pairs=(--side ours --batch-size 16 --chunk 8)
step contrastive-full 50 contrastive "${pairs[@]}"
step contrastive-lora 50 contrastive "${pairs[@]}" --gradient-checkpointing --adapter lora
step contrastive-dora 50 contrastive "${pairs[@]}" --gradient-checkpointing --adapter dora
for side in plain ours; do
    step "bridge-$side-growing" 60 bridge --side $side --attention sdpa --batch-size 8 --grow
done
cat >"$work/photographs.py" <<'PHOTOGRAPHS'
import sys
from pathlib import Path
import numpy as np
from PIL import Image
folder, generator = Path(sys.argv[1]), np.random.default_rng(0)
folder.mkdir()
for number in range(512):  # noise of several scales compresses about as a photograph does
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.int16) + generator.integers(-12, 13, (480, 640, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)
PHOTOGRAPHS
$python "$work/photographs.py" "$work/photographs"
measure encode 100 $python benchmarks/encode.py "$work/photographs" --size 2b --max-pixels 200704 --repeat 2 --json
echo "summary in $out/summary.txt" >&2
