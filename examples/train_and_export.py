"""Train a model on a folder of captioned images and export it.

    python examples/train_and_export.py path/to/images my-model [key.sub=value ...]

The folder holds images and a metadata.jsonl with file_name and text in each line. The recipe is the demo's; further
arguments override its settings (bridge.steps=500).
"""

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import refuse_foreign_folder
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train import Recipe, run


def main(folder: str, out: str, *overrides: str) -> None:
    refuse_foreign_folder(Path(out), marker=TRAINING_FILE)  # before the training
    recipe = Recipe.load("tiny", [f"data.folder={folder}", "contrastive.data.limit=null", *overrides])
    stages = run(recipe, Path("runs") / Path(out).name)
    for stage in stages:
        print(f"{stage.stage}: {stage.steps} steps in {stage.seconds:.0f} s, loss {stage.final['loss']:.3f}")
    export_model(stages[-1].folder, out)
    dimension = SentenceTransformer(out).get_embedding_dimension()
    print(f"{out} embeds texts and images in {dimension} dimensions; try it:")
    print(f"  cocoa-embed index {folder} --model {out} && cocoa-embed search 'a text' --model {out}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except CocoaError as error:
        sys.exit(str(error))
