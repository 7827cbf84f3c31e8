"""The command ``cocoa-embed eval``: standard output, files, messages and exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import write_checkpoint
from mmeb_layout import subset_rows, write_benchmark, write_subset
from PIL import Image
from scored_model import ScoredModel, mosaic
from tiny_backbones import tiny_clip_model

from cocoa_embed.cli import evaluate
from cocoa_embed.cli import main as cli
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation import embed
from cocoa_embed.model import loading
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import export_model

Command = Callable[..., tuple[int, str, str]]
ROWS = 8


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScoredModel]:
    """The models that can be loaded, by name."""
    found = {"ours": ScoredModel(0, noise=10.0), "theirs": ScoredModel(1, noise=400.0)}

    def load(name: str, device: str | None) -> Encoder:
        if name not in found:
            raise CocoaError(f"{name} cannot be loaded")
        return Encoder(found[name], name)

    monkeypatch.setattr("cocoa_embed.encode.load.load_encoder", load)
    monkeypatch.setattr(loading, "check_model", lambda name: None)
    return found


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def sentence(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code in (1, 2)
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("cocoa-embed: ")
    assert "Traceback" not in err
    return line


@pytest.fixture
def mmeb(tmp_path: Path, command: Command, models: dict[str, ScoredModel]) -> Command:
    data, images = write_benchmark(tmp_path, ROWS)
    return lambda *arguments: command("mmeb", data, "--images", images, "--model", "ours", *arguments)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    names = ("red", "green", "blue", "yellow")
    rows = [{"file_name": f"{number}.png", "text": f"{names[number % 4]} {number}"} for number in range(12)]
    for number, row in enumerate(rows):
        mosaic(number, names[number % 4]).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_mmeb_prints_json_and_tables_and_writes_three_files(mmeb: Command) -> None:
    code, out, err = mmeb("--json")
    assert code == 0
    document = json.loads(out)
    assert document["subsets"].keys() == {"ImageNet-1K", "OK-VQA", "MSCOCO_t2i", "RefCOCO-Matching"}
    assert {"classification", "VQA", "retrieval", "grounding", "IND", "OOD", "overall"} == document["averages"].keys()
    assert "ImageNet-1K: precision@1" in err
    assert "overall" in err
    assert "(4/36)" in err
    (folder,) = Path("cocoa-eval").iterdir()
    assert folder.name == f"ours-{document['fingerprint'][:8]}"
    assert json.loads((folder / "mmeb.json").read_text()) == document
    assert "| ours |" in (folder / "mmeb.md").read_text()
    assert "CoCoA (Qwen2-VL-2B)" in (folder / "mmeb.html").read_text()
    assert not list(folder.rglob("*.new"))
    (finished,) = (folder / "finished").glob("OK-VQA-*.json")
    ranks = json.loads(finished.read_text())["by_row"]["rank"]
    assert document["subsets"]["OK-VQA"]["precision@1"] == sum(rank == 1 for rank in ranks) / ROWS


def test_mmeb_takes_subsets_a_limit_and_a_folder(mmeb: Command, models: dict[str, ScoredModel]) -> None:
    arguments = ("--subset", "MSCOCO_t2i", "--subset", "OK-VQA", "--limit", 3, "--out", "results", "--json")
    code, out, _ = mmeb(*arguments)
    document = json.loads(out)
    assert code == 0
    assert [(name, each["rows"]) for name, each in document["subsets"].items()] == [("OK-VQA", 3), ("MSCOCO_t2i", 3)]
    assert all(each["partial"] for each in document["subsets"].values())
    calls = models["ours"].calls
    assert json.loads(mmeb(*arguments)[1]) == document
    assert models["ours"].calls == calls, "all results are cached"
    assert Path("results/mmeb.html").is_file()


def test_an_interrupted_run_keeps_finished_subsets(mmeb: Command, models: dict[str, ScoredModel]) -> None:
    class Interrupted(ScoredModel):
        def encode_document(self, *args: Any, **options: Any) -> np.ndarray:
            if len(self.queries) > ROWS:
                raise KeyboardInterrupt
            return super().encode_document(*args, **options)

    models["ours"] = Interrupted()
    line = sentence(mmeb("--out", "results"))
    assert "interrupted; 1 of 4 subsets are finished in results; the same command continues from there" in line
    written = json.loads(Path("results/mmeb.json").read_text())
    assert (list(written["subsets"]), written["not_run"]["OK-VQA"]) == (["ImageNet-1K"], "not finished")
    models["ours"] = ScoredModel()
    assert "ImageNet-1K: precision@1" in mmeb("--out", "results")[2]
    assert not [item for item in models["ours"].queries if "classification" in item["text"]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--subset", "MSCOCO-t2i"], 2, "no subset 'MSCOCO-t2i' (did you mean 'MSCOCO_t2i'?"),
        (["--images", "."], 1, "did you mean --images"),
    ],
)
def test_wrong_input_of_mmeb_is_one_sentence_before_the_model_is_loaded(
    mmeb: Command, models: dict[str, ScoredModel], arguments: list[str], code: int, message: str
) -> None:
    models.clear()
    result = mmeb(*arguments)
    assert (result[0], message in sentence(result)) == (code, True)
    assert not Path("cocoa-eval").exists()


def test_missing_images_and_repeated_targets_are_errors_or_skipped_and_merged(mmeb: Command, tmp_path: Path) -> None:
    rows = subset_rows(tmp_path / "eval_images", "MSCOCO_t2i", ROWS)
    rows[0]["tgt_img_path"][2] = rows[0]["tgt_img_path"][1]
    write_subset(tmp_path / "MMEB-eval", "MSCOCO_t2i", rows)
    (tmp_path / "eval_images/OK-VQA/0001.png").unlink()
    assert "OK-VQA/0001.png" in sentence(mmeb("--subset", "OK-VQA"))
    assert "row 1: candidates 2 and 3 are the same target" in sentence(mmeb("--subset", "MSCOCO_t2i"))
    _, out, _ = mmeb("--missing-images", "skip", "--repeated-targets", "merge", "--json")
    subsets = json.loads(out)["subsets"]
    assert (subsets["OK-VQA"]["rows_without_image"], subsets["MSCOCO_t2i"]["rows_merged"]) == (2, 1)


def test_a_missing_extra_is_named_with_the_command(mmeb: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "[eval]'" in sentence(mmeb())


def test_pairs_prints_json_and_writes_files_with_out(
    command: Command, models: dict[str, ScoredModel], scenes: Path
) -> None:
    code, out, err = command("pairs", scenes, "--model", "ours", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["subsets"].keys() == {"text_to_image", "image_to_text"}
    assert {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"} <= document["subsets"]["text_to_image"].keys()
    assert err.count("recall@1 ") == err.count("ours") == err.count("chance") == 2
    assert sorted(path.name for path in Path().iterdir()) == ["scenes"]
    code, out, err = command("pairs", scenes, "--model", "ours", "--model", "theirs", "--out", "results", "--seed", 5)
    assert (code, out) == (0, "")
    assert err.count(": difference") == 2
    written = json.loads(Path("results/pairs.json").read_text())
    assert written["subsets"] == document["subsets"]
    assert (written["seed"], written["other"]["model"]) == (5, "theirs")
    assert "ours minus theirs" in Path("results/pairs.md").read_text()
    assert "ours minus theirs" in Path("results/pairs.html").read_text()


def test_pairs_of_a_table_with_named_columns(
    command: Command, models: dict[str, ScoredModel], scenes: Path, tmp_path: Path
) -> None:
    rows = map(json.loads, (scenes / "metadata.jsonl").read_text().splitlines())
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(json.dumps({"says": row["text"], "shows": row["file_name"]}) for row in rows))
    named = ("--query-text", "says", "--positive-image", "shows", "--images", scenes)
    document = json.loads(command("pairs", table, "--model", "ours", "--json", *named)[1])
    expected = json.loads(command("pairs", scenes, "--model", "ours", "--json")[1])
    columns = {"query_text": "says", "query_image": None, "positive_text": None, "positive_image": "shows"}
    assert document.pop("data") == {"path": str(table), "images": str(scenes), "columns": columns}
    assert expected.pop("data") == {"path": str(scenes), "images": None, "columns": dict.fromkeys(columns)}
    assert document == expected


def test_a_model_of_another_architecture_is_scored_too(command: Command, scenes: Path) -> None:
    model = tiny_clip_model(scenes.parent / "weights")
    model.save(str(scenes.parent / "clip"))
    code, out, _ = command("pairs", scenes, "--model", "clip", "--json")
    assert code == 0
    rows = [json.loads(line) for line in (scenes / "metadata.jsonl").read_text().splitlines()]
    texts = model.encode_query([{"text": row["text"]} for row in rows], normalize_embeddings=True)
    pictures = [{"image": Image.open(scenes / row["file_name"])} for row in rows]
    similarities = texts.astype(float) @ model.encode_document(pictures, normalize_embeddings=True).astype(float).T
    first = float((similarities.argmax(axis=1) == np.arange(len(rows))).mean())
    assert json.loads(out)["subsets"]["text_to_image"]["hit@1"] == pytest.approx(first)


def test_the_first_models_scores_are_shown_and_kept_if_the_second_model_fails(
    command: Command, models: dict[str, ScoredModel], scenes: Path
) -> None:
    alone = json.loads(command("pairs", scenes, "--model", "ours", "--json")[1])
    result = command("pairs", scenes, "--model", "ours", "--model", "broken", "--out", "results", "--json")
    assert "broken cannot be loaded" in sentence(result)
    assert result[2].count("chance") == 2
    assert json.loads(Path("results/pairs.json").read_text()) == alone


def test_all_local_faults_are_in_one_message_before_a_model_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoa_embed.encode.load.load_encoder", lambda *_: pytest.fail("a model was loaded"))
    Path("taken").write_text("a file")
    for arguments in (("pairs", "photoz", "--model", "owner/name"), ("mmeb", "photoz", "--images", "photoz")):
        code, out, err = command(*arguments, "--model", "nowhere", "--out", "taken")
        assert (code, out) == (1, "")
        data, model, folder = err.splitlines()[-3:]
        assert data.startswith("cocoa-embed: photoz does not exist")
        assert model.startswith("nowhere: there is no such model folder")
        assert folder.startswith("taken cannot be made")


def test_wrong_input_of_pairs_is_one_sentence(command: Command, models: dict[str, ScoredModel], scenes: Path) -> None:
    three = ("--model", "ours", "--model", "ours", "--model", "ours")
    result = command("pairs", scenes, *three)
    assert (result[0], "--model was given 3 times" in sentence(result)) == (2, True)
    assert "nowhere does not exist" in sentence(command("pairs", "nowhere", "--model", "ours"))
    (scenes / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}\n')
    assert "1 pairs hold only one query or one document" in sentence(command("pairs", scenes, "--model", "ours"))


@pytest.mark.parametrize("arguments", [["mmeb"], ["mmeb", "x", "--model", "m"], ["pairs", "x"], ["nonsense"]])
def test_wrong_usage_exits_with_2(command: Command, arguments: list[str]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


def test_help_imports_nothing_heavy_and_has_the_librarys_default() -> None:
    heavy = "{'torch', 'transformers', 'PIL', 'numpy', 'pandas', 'pyarrow', 'jinja2'}"
    code = (
        "import sys\nfrom cocoa_embed.cli.main import main\n"
        "for words in (['--help'], ['eval', '--help'], ['eval', 'mmeb', '--help']):\n"
        "    try: main(words)\n    except SystemExit as end: assert not end.code\n"
        f"assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--missing-images" in done.stdout
    assert evaluate.BATCH_TOKENS == embed.BATCH_TOKENS


def test_local_faults_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom cocoa_embed.cli.main import main\n"
        "for words in (['pairs', 'photoz'], ['mmeb', 'photoz', '--images', 'photoz']):\n"
        "    try: main(['eval', *words, '--model', 'owner/name'])\n    except SystemExit as end: assert end.code == 1\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("photoz does not exist") == 2


def test_scores_of_an_exported_model_are_cached(command: Command, tiny_backbone: Backbone, tmp_path: Path) -> None:
    export_model(write_checkpoint(tiny_backbone, tmp_path / "checkpoint"), tmp_path / "exported")
    write_benchmark(tmp_path, 3)
    arguments = ("mmeb", "MMEB-eval", "--images", "eval_images", "--model", "exported", "--device", "cpu", "--json")
    code, out, err = command(*arguments)
    assert code == 0, err
    document = json.loads(out)
    assert all(each["rows"] == 3 for each in document["subsets"].values())
    assert len(bytes.fromhex(document["fingerprint"])) == 32
    again = command(*arguments)
    assert json.loads(again[1]) == document
    assert again[2].count("(cached)") == 4
