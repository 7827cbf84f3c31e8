#!/usr/bin/env bash
# Measure training and embedding on one NVIDIA card, with random weights and without a network, in at most nine minutes:
#
#     benchmarks/gpu.sh FOLDER
#
# FOLDER gets a JSON file of each measurement and a log of each part, the most informative first, so that a run that is
# stopped half-way is still of use. Each part has its own time limit, so that none takes the time of another. PYTHON names
# an interpreter other than python3. REHEARSE=1 runs every part on a CPU, at the smallest size, to see that it works.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:?usage: benchmarks/gpu.sh FOLDER}
rehearse=${REHEARSE:+--rehearse}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

card=$($python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
if [ -z "$card$rehearse" ]; then
    echo "gpu.sh: torch finds no NVIDIA card here; REHEARSE=1 tries every part on the CPU at the smallest size" >&2
    exit 1
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >&2 <<PLAN
On ${card:-a CPU, as a rehearsal}, results in $out, at most:
  a the tests marked gpu                                                                50 s
  b the tiny recipe in bf16 with DoRA: three stages, export, load and embed             90 s
  c bridge step at 2B: sdpa and FlexAttention, with and without checkpointing          100 s
  d contrastive step at 2B: the recipe, PEFT's DoRA, PEFT's LoRA, full fine-tuning      90 s
  e the plain step of each stage, at growing batches                                   100 s
  f embedding 512 photographs: ours, SentenceTransformer.encode, the model alone        75 s
  g the utilisation of every step, by a bf16 matrix product timed right after it        10 s
PLAN

measure() { # NAME SECONDS COMMAND...: run a command for at most SECONDS; its output is NAME.json, its log NAME.log
    local name=$1 limit=$2 started=$SECONDS status
    [ -z "$rehearse" ] || limit=600
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$work/printed" 2>"$out/$name.log"
    status=$?
    [ -s "$work/printed" ] && mv "$work/printed" "$out/$name.$([ $status = 0 ] && echo json || echo partial)"
    echo "$name: $([ $status = 0 ] && echo done || echo "failed with status $status, see $name.log") in $((SECONDS - started)) s" | tee -a "$out/summary.txt" >&2
    [ $status = 0 ] || failed=1
}

tests() { # their output is a log, not a measurement
    $python -m pytest -q -m gpu ${rehearse:+--collect-only} -p no:cacheprovider $(grep -rl --include="*.py" "mark.gpu" tests) >&2
}

tiny() { # the three stages, and recall@1 of the exported model on scenes that it was not trained on
    $python - "$work/scenes" <<'SCENES' || return
import sys
from pathlib import Path
from cocoa_embed.demo.scenes import write_image_folder
folder = Path(sys.argv[1])
write_image_folder(folder / "train", "train", 1000, seed=0)
write_image_folder(folder / "test", "held-out", 200, seed=0)
SCENES
    local adapter="{kind: dora, dropout: 0.0, r: 16, alpha: 64}" cli="$python -m cocoa_embed.cli" steps=40 rows=64
    [ -z "$rehearse" ] || steps=2 rows=8
    $cli train tiny "data.folder=$work/scenes/train" mixed_precision=bf16 "warmup.adapter=$adapter" \
        "bridge.adapter=$adapter" "contrastive.adapter=$adapter" warmup.steps=$steps bridge.steps=$steps \
        bridge.probe_rows=0 contrastive.steps=$steps contrastive.batch_size=$rows --out "$work/run" >&2 &&
        $cli export "$work/run/contrastive" "$work/model" >&2 &&
        $cli eval pairs "$work/scenes/test" --model "$work/model" --json
}

encode() { # noise at several scales compresses about as well as a photograph
    $python - "$work/photographs" "$1" <<'PHOTOGRAPHS' || return
import sys
from pathlib import Path
import numpy as np
from PIL import Image
folder, count, generator = Path(sys.argv[1]), int(sys.argv[2]), np.random.default_rng(0)
folder.mkdir()
for number in range(count):
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.int16) + generator.integers(-12, 13, (480, 640, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)
PHOTOGRAPHS
    $python benchmarks/encode.py "$work/photographs" --size "$2" --max-pixels "$3" --repeat 1 --json
}

utilisation() { # of all steps: FLOP/s over those of a matrix product after the same step
    $python - "$out" <<'UTILISATION'
import json, sys
from pathlib import Path
steps = {path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))}
keys = ("mfu", "matmul_flops_per_second", "seconds_per_step", "peak_memory_bytes")
sizes = [(f"{name} {size['batch_size_rows']}", size) for name, step in steps.items() for size in step.get("sizes", [step] if "mfu" in step else [])]
print(json.dumps({name: {key: size[key] for key in keys} for name, size in sizes}, indent=2))
UTILISATION
}

failed=0
export -f tests tiny encode utilisation
export work python rehearse out
measure gpu-tests 50 bash -c tests
measure tiny-recipe 90 bash -c tiny
measure bridge 100 $python benchmarks/card_steps.py bridge "$out" $rehearse
measure contrastive 90 $python benchmarks/card_steps.py contrastive "$out" $rehearse
measure plain 100 $python benchmarks/card_steps.py plain "$out" $rehearse
if [ -z "$rehearse" ]; then measure encode 75 bash -c "encode 512 2b 200704"; else measure encode 75 bash -c "encode 8 small 50176"; fi
measure utilisation 10 bash -c utilisation
echo "summary in $out/summary.txt" >&2
exit $failed
