"""Faults of local input are found, all in one message, before torch is imported; so is what ``--help`` prints."""

import json
from pathlib import Path

import pytest
from command_line import modules_of_command
from table_files import write_images, write_table

HEAVY = {"torch", "transformers", "qdrant_client", "sentence_transformers", "accelerate", "datasets", "scipy"}
HEAVY |= {"matplotlib", "pandas"}

ON_HUB = ("--model", "owner/name")
TOO_LONG = "a" * 300
"""No file system takes it as a name."""
FAULTY_SEARCH = "search red --model ./mdl --image gone.png --html nodir/x.html --filter".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of faulty input, and of an image folder whose columns have other names."""
    folder = tmp_path_factory.mktemp("faults")
    for name in ("empty", "foreign"):
        (folder / name).mkdir()
    (folder / "foreign" / "thesis.txt").touch()
    write_images(folder / "photos", "a")
    write_table(folder / "photos" / "metadata.jsonl", [{"file_name": "a.png", "title": "a"}])
    (folder / "rows.csv").touch()
    recipe = {"name": "r", "backbone": "scene-captioner", "contrastive": {"steps": 1, "batch_size": 2}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.mark.parametrize(
    ("arguments", "status", "faults"),
    [
        (["index", "empty", *ON_HUB], 1, ["there are no images in empty; name a folder that holds some"]),
        (["index", "photoz", "empty/x*.png", "--model", "./mdl", "--collection", "a/b", "--thumbnails", TOO_LONG], 2,
         ["'a/b'", "photoz", "x*.png", "mdl", "File name too long"]),
        ([*FAULTY_SEARCH, "width 1000"], 2, ["index", "mdl", "=1000", "nodir", "gone"]),
        (["eval", "pairs", "photoz", *ON_HUB, "--model", "nowhere", "--out", "rows.csv"], 1,
         ["photoz does not exist", "nowhere: there is no such model folder", "rows.csv cannot be made"]),
        (["train", "recipe.yaml", "data.folder=photos", "--out", "foreign"], 1,
         ["foreign holds something else", "metadata.jsonl has no column 'text' (known: file_name, title)"]),
        (["train", "recipe.yaml"], 2, ["stage contrastive, data: no data; give one of data.folder"]),
        (["export", "photos", "foreign"], 1, ["photos is not a checkpoint", "foreign holds something else"]),
        (["index", "photos", "--path", "foreign", "--thumbnails", "foreign", *ON_HUB], 1,
         ["foreign holds something else, not an index", "foreign holds something else (it has no"]),
        (["index", "photos", "--devices", ",", *ON_HUB], 2, ["--devices , names no available device"]),
        (["embed", "photos", "--out", TOO_LONG, "--model", "nowhere"], 1, ["nowhere: there is no such model folder"]),
        (["search", "--like", "a", "--edge", "foreign"], 1, ["foreign holds something else, not an index"]),
        (["search", "--like", "a", "--diversity", "5"], 2, ["there is no index in cocoa-index", "diversity is 5.0"]),
        (["search", "--like", "a", "--diversity", "1", "--group-by", "k", "--path", "empty"], 2,
         ["diversity cannot be combined with any_orientation or group_by"]),
        (["forget", "photos", "--path", TOO_LONG], 1, ["there is no index in aaa"]),
        (["embed", "photoz", "--model", "nowhere", "--out", "rows.csv", "--shard", "3/2"], 2,
         ["--shard 3/2", "photoz does not exist", "nowhere: there is no such model folder", "rows.csv is a file"]),
        (["load", "photos", "--path", "foreign"], 1,
         ["foreign holds something else, not an index", "photos has no cocoa-embed.json"]),
        (["report", "photos"], 2, ["photos is not a training run: it has no run.json"]),
        (["train", "recipe.yaml", "contrastive.stepz=3"], 2, ["unknown key 'contrastive.stepz'"]),
        (["eval", "mmeb", "empty", "--images", "photoz", "--model", "nowhere", "--subset", "Xyz"], 2,
         ["Xyz", "nowhere: there is no such model folder"]),
        (["diagnose", "photos", "--data", "photoz"], 1, ["photos is not a checkpoint", "photoz does not exist"]),
    ],
)  # fmt: skip
def test_local_faults_are_all_named_before_torch_is_imported(
    folder: Path, arguments: list[str], status: int, faults: list[str]
) -> None:
    done, modules = modules_of_command(arguments, folder)
    assert done.status == status, done
    assert not HEAVY & modules
    for line, fault in zip(done.err.splitlines(), faults, strict=True):
        assert fault in line


@pytest.mark.parametrize("command", ["", "index", "eval mmeb", "train"])
def test_help_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    done, modules = modules_of_command([*command.split(), "--help"], tmp_path)
    assert (done.status, "--help" in done.out) == (0, True), done.err
    assert not (HEAVY | {"PIL", "numpy", "pandas", "pyarrow", "jinja2", "datasets", "matplotlib"}) & modules
