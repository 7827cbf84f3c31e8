import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import contents
from interrupted import AtStep, Killed, die
from safetensors import safe_open
from tiny_backbones import LoadTiny
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from cocoa_embed.cli.main import main
from cocoa_embed.demo.pretrain import run
from cocoa_embed.demo.pretrain.__main__ import app
from cocoa_embed.demo.pretrain.data import CaptionCollator, CaptionedScenes
from cocoa_embed.demo.pretrain.model import embed_language_model
from cocoa_embed.demo.pretrain.run import frozen_language_model, pretrain
from cocoa_embed.demo.pretrain.settings import PretrainSettings, read_settings
from cocoa_embed.demo.pretrain.tokenizer import build_tokenizer
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.backbone import load_backbone

SIZES = {"width": 32, "inner_width": 48, "layers": 2, "heads": 2, "key_value_heads": 1, "vocabulary": 512}
SIZES |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2, "image_size": 56}
TINY = [f"model.{name}={value}" for name, value in SIZES.items()]
TINY += [f"{stage}.batch_size=4" for stage in ("vision", "language", "connector", "all")]
TINY += ["language.steps=0", "logging_steps=1", "measure_steps=2", "vision.word_images=2"]


@pytest.fixture(scope="session")
def held_out_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "held-out"
    write_image_folder(folder, "held-out", 6, seed=0)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tokenizer = build_tokenizer(0)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**config, vocab_size=len(tokenizer), tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny(data: object, *overrides: str, **given: object) -> PretrainSettings:
    return read_settings([*TINY, *overrides], data=str(data), **given)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_scenes_lower_the_loss_and_make_a_backbone_in_bfloat16(tmp_path: Path) -> None:
    pretrain(tiny("scenes", "all.steps=25", "all.learning_rate=2e-2", "measure_steps=99"), tmp_path)
    first, *_, last = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert last < first - 0.5
    backbone = load_backbone(str(tmp_path), max_length=64, bidirectional=False)
    with torch.no_grad():
        batch = CaptionCollator(backbone.processor)([*islice(CaptionedScenes(9), 16)])
        assert backbone.model(**batch).loss.item() < first - 0.5
    with safe_open(tmp_path / "model.safetensors", framework="pt") as saved:
        assert {saved.get_tensor(name).dtype for name in saved.keys()} == {torch.bfloat16}


Killing = Callable[[str, int], None]


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Killing:
    """Kill the next run at the end of a step of a stage."""
    real = run.train

    def at(stage: str, step: int) -> None:
        def train(trainer: run.PretrainTrainer, folder: Path, name: str) -> None:
            if name == stage:
                trainer.add_callback(AtStep(step, die))
            real(trainer, folder, name)

        monkeypatch.setattr(run, "train", train)

    return at


RESUMED = ("vision.steps=4", "all.steps=5", "all.muon_learning_rate=1e-3")


@pytest.fixture(scope="module")
def whole(scene_folder: Path, held_out_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    pretrain(tiny(scene_folder, *RESUMED, held_out=held_out_folder), out)
    return out


@pytest.mark.parametrize("stage", [pytest.param("vision", marks=pytest.mark.slow), "all"])
def test_a_killed_run_resumes_to_the_weights_and_the_log_of_an_uninterrupted_one(
    stage: str, whole: Path, scene_folder: Path, held_out_folder: Path, tmp_path: Path, killing: Killing
) -> None:
    settings = tiny(scene_folder, *RESUMED, held_out=held_out_folder)
    killing(stage, 3)
    with pytest.raises(Killed):
        pretrain(settings, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    killing("", 0)
    pretrain(settings, tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    keys = ("stage", "step", "loss", "eval_right", "eval_gap")
    lines = [[[line.get(key) for key in keys] for line in log_of(folder) if "train_loss" not in line]
             for folder in (tmp_path, whole)]  # fmt: skip
    assert lines[0] == lines[1]
    measured = [(stage, step) for stage, step, *_, gap in lines[0] if gap is not None]
    assert measured == [("vision", 2), ("vision", 4), ("all", 2), ("all", 4), ("all", 5)]


def test_a_finished_run_is_not_trained_again_even_if_its_last_files_were_not_removed(
    whole: Path, scene_folder: Path, held_out_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = contents(out)
    (out / "checkpoints" / "all").mkdir(parents=True)
    monkeypatch.setattr(run, "_run_stage", die)
    settings = tiny(scene_folder, *RESUMED, held_out=held_out_folder)
    pretrain(settings, out, resume=True)
    assert contents(out) == before
    assert not (out / "checkpoints").exists()
    with pytest.raises(Killed):
        pretrain(settings, out)


def test_a_run_whose_captions_have_changed_is_not_resumed(scene_folder: Path, tmp_path: Path, killing: Killing) -> None:
    data, out = Path(shutil.copytree(scene_folder, tmp_path / "scenes")), tmp_path / "out"
    killing("all", 1)
    with pytest.raises(Killed):
        pretrain(tiny(data, "vision.steps=0"), out)
    before = contents(out)
    (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().replace("circle", "blob"))
    with pytest.raises(UsageError, match=r"captions or the images of the run in .* have changed .* restore them"):
        pretrain(tiny(data, "vision.steps=0"), out, resume=True)
    assert contents(out) == before


def test_a_run_of_an_earlier_version_without_fingerprints_is_resumed(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(scene_folder)
    (tmp_path / run.MARKER).write_text(settings.model_dump_json())
    monkeypatch.setattr(run, "_run_stage", die)
    with pytest.raises(Killed):
        pretrain(settings, tmp_path, resume=True)


@pytest.mark.parametrize("held", ["data", "held_out", "language_model", "teacher"])
def test_a_folder_that_holds_what_the_run_reads_is_refused(held: str, scene_folder: Path, tmp_path: Path) -> None:
    (tmp_path / run.MARKER).touch()
    given = {"data": str(scene_folder), "held_out": None, "language_model": None, "teacher": None}
    settings = PretrainSettings.model_validate({**given, held: str(tmp_path / "mine")})
    with pytest.raises(UsageError, match="mine, which the run reads"):
        pretrain(settings, tmp_path)


def test_the_best_weights_by_the_held_out_loss_are_written_and_the_last_next_to_them(
    scene_folder: Path, held_out_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_all = [3.0, 9.0, 1.0, 9.0, 2.0, 9.0]  # right and wrong, of three measurements
    losses = iter([1.0, 9.0, 2.0, 9.0, *of_all])
    monkeypatch.setattr(run.PretrainTrainer, "_mean_loss", lambda *_: next(losses))
    states = {}

    def keep(trainer: run.PretrainTrainer, folder: Path, name: str) -> None:
        assert not (tmp_path / "out" / "last").exists()
        if name == "all":
            for step in (4, 6):
                trainer.add_callback(AtStep(step, lambda step=step: states.update({step: weight(trainer.model)})))
        real(trainer, folder, name)

    real = run.train
    monkeypatch.setattr(run, "train", keep)
    pretrain(tiny(scene_folder, "vision.steps=4", "all.steps=6", held_out=held_out_folder), tmp_path / "out")
    assert not [*losses], "the premise: each stage is measured"
    for folder, step in (("out", 4), ("out/last", 6)):
        assert torch.equal(weight(load_backbone(str(tmp_path / folder)).model), states[step].bfloat16().float())
    assert not torch.equal(states[4], states[6])


def weight(model: Any) -> torch.Tensor:  # noqa: ANN401
    return model.get_input_embeddings().weight.detach().clone()[:100]


def test_the_connector_stage_leaves_the_language_model_as_it_is(
    language_model: Path, scene_folder: Path, tmp_path: Path
) -> None:
    of_language = ("width", "inner", "layers", "heads", "key", "vocabulary")
    values = [each for each in TINY if not each.startswith(tuple(f"model.{name}" for name in of_language))]
    steps = ["vision.steps=0", "connector.steps=2", "all.steps=0"]
    settings = read_settings([*values, *steps], data=str(scene_folder), language_model=language_model)
    pretrain(settings, tmp_path)
    set_seed(settings.seed)
    before, after = embed_language_model(language_model, settings.model).model, load_backbone(str(tmp_path)).model
    changed = {
        name.split(".")[1]
        for name, value in after.named_parameters()
        if not torch.equal(value, before.get_parameter(name).bfloat16().float())
    }
    assert changed == {"visual"}


def test_the_language_stage_leaves_the_vision_encoder_as_it_is(scene_folder: Path, tmp_path: Path) -> None:
    pretrain(tiny(scene_folder, "vision.steps=1", "language.steps=2", "all.steps=0"), tmp_path / "two")
    pretrain(tiny(scene_folder, "vision.steps=1", "language.steps=0", "all.steps=0"), tmp_path / "one")
    both = [safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("one", "two")]
    changed = [name for name in both[0].keys() if not torch.equal(*(each.get_tensor(name) for each in both))]
    assert changed
    assert not any("visual" in name for name in changed)


def test_only_rows_of_new_tokens_learn_while_the_language_model_is_frozen(load_tiny: LoadTiny) -> None:
    model = load_tiny("sdpa").model
    embeddings = model.get_input_embeddings().weight
    ids = torch.tensor([[3, 5, 9]])
    with frozen_language_model(model, [5]) as undecayed:
        model(ids, labels=ids).loss.backward()
        assert embeddings.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [5]
        assert [model.get_parameter(name) is embeddings for name in undecayed] == [True]
        learning = [name for name, each in model.named_parameters() if each.requires_grad and name not in undecayed]
        assert {name.split(".")[1] for name in learning} == {"visual"}
    embeddings.grad = None
    model(ids, labels=ids).loss.backward()
    assert len(embeddings.grad.abs().sum(dim=1).nonzero()) > 1


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        (
            ["vision.steps=0", "all.steps=0"],
            {},
            r"No stage has steps; set one of vision\.steps, language\.steps, connector\.steps, all",
        ),
        (["vision.steps=0"], {"teacher": Path("t.pt2")}, "is for the vision stage, which has no steps"),
        (["connector.steps=1"], {}, "random without --language-model"),
        ([], {"held_out": Path("nowhere")}, "nowhere does not exist"),
        ([], {"teacher": Path("nowhere.pt2")}, "nowhere.pt2 is not a file of torch.export.save"),
        (["vision.word_images=99"], {}, "No word is in the captions of 99 images"),
    ],
)
def test_what_contradicts_itself_or_does_not_exist_is_reported_in_one_sentence_and_writes_nothing(
    overrides: list[str], options: dict[str, Any], reason: str, scene_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CocoaError, match=reason) as error:
        pretrain(tiny(scene_folder, *overrides, **options), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_to_hold_out_that_are_trained_on_are_refused(scene_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="24 of the 24 images to hold out"):
        pretrain(tiny(scene_folder, held_out=scene_folder), tmp_path / "out")


def test_a_folder_without_captions_is_refused(scene_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(scene_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("metadata.jsonl"))
    with pytest.raises(CocoaError, match=r"bare has no metadata\.jsonl"):
        pretrain(tiny(tmp_path / "bare"), tmp_path / "out")


def test_a_run_resumes_with_its_own_settings_alone_and_replaces_nothing_else(
    scene_folder: Path, tmp_path: Path, killing: Killing
) -> None:
    out = tmp_path / "out"
    killing("all", 1)
    with pytest.raises(Killed):
        pretrain(tiny(scene_folder, "vision.steps=0"), out)
    with pytest.raises(UsageError, match=r"had other values of vision and seed \(see pretraining\.json there\)"):
        pretrain(tiny(scene_folder, "seed=1"), out, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CocoaError, match="mine holds something else"):
        pretrain(tiny(scene_folder), tmp_path / "mine", resume=True)
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["all.step=3"], "unknown key 'all.step' (did you mean 'steps'? known:"),
        (["all.steps=few"], "all.steps = 'few': input should be a valid integer"),
        (["model.image_size=100"], "model: image_size 100 is not a multiple of 1 x patch_size x merge_size (28)"),
        (["model.width=100"], "model: width 100 is not a multiple of 2 x heads (6)"),
        (["--language-model", "lm", "model.width=64"], "model.width: --language-model has its own"),
        (["all=5"], "all = 5: input should be a valid dictionary"),
        (["data=photos"], "Override 'data=photos': give --data instead"),
        (["language_model=null"], "Override 'language_model=null': give --language-model instead"),
    ],
)
def test_the_command_exits_with_2_and_a_sentence_for_a_wrong_setting(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "out"), *words], app)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
