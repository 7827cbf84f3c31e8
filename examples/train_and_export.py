"""Train a model on a folder of captioned images and export it.

    python examples/train_and_export.py path/to/images my-model

The folder holds images and a metadata.jsonl with file_name and text in each line.
"""

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

from cocoa_embed.export import export_model
from cocoa_embed.train import Recipe, run


def main(folder: str, out: str) -> None:
    recipe = Recipe.load("tiny", [f"data.folder={folder}", "contrastive.data.limit=null"])
    stages = run(recipe, Path("runs") / Path(out).name)
    for stage in stages:
        print(f"{stage.stage}: {stage.steps} steps in {stage.seconds:.0f} s, loss {stage.final['loss']:.3f}")
    export_model(stages[-1].folder, Path(out))
    print(SentenceTransformer(out).encode([{"text": "a text"}]).shape)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
