from pathlib import Path

import pytest
import torch
from tiny_backbones import LoadTiny
from torch import Tensor, nn

from cocoa_embed.demo.pretrain.data import CaptionedImages, held_out_pairs
from cocoa_embed.demo.pretrain.settings import AugmentationSettings, VisionSettings
from cocoa_embed.demo.pretrain.teacher import Teacher, make_views, with_features
from cocoa_embed.demo.pretrain.vision import VisionCollator, VisionTraining, Words
from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.rows import Draw

SIDE, CHANNELS = 56, 6
TEXTS = [["a red dog", "A dog!"], ["a cat", "the cat"], ["two red cats", "red"]]
ROWS = torch.export.Dim("rows")


class Patches(nn.Module):
    """Maps pixels to the features of patches of 14 pixels: a grid of 4 x 4 at 56 x 56."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 14, 14)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels) * 10


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Patches(), tmp_path_factory.mktemp("teacher") / "teacher.pt2")


def export(module: nn.Module, file: Path, shape: tuple[int, ...] = (2, 3, SIDE, SIDE), fixed: bool = False) -> Path:
    torch.manual_seed(0)
    dynamic = None if fixed else ({0: ROWS},)
    torch.export.save(torch.export.export(module.eval(), (torch.rand(shape),), dynamic_shapes=dynamic), file)
    return file


@pytest.fixture
def images() -> CaptionedImages:
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(256, (3, 84, 70 + 14 * n), generator=generator).byte() for n in range(len(TEXTS))]
    return CaptionedImages(pixels, TEXTS, SIDE, AugmentationSettings(), seed=0)


def test_words_are_those_of_enough_images_whatever_their_case(images: CaptionedImages) -> None:
    words = Words(images.all_words(), images=2)
    assert [*words.places] == ["a", "red"]
    assert words([images.plain(row) for row in range(3)]).tolist() == [[1, 1], [1, 0], [0, 1]]
    with pytest.raises(CocoaError, match="No word is in the captions of 3 images"):
        Words(map(images.words, range(3)), images=3)


def test_components_are_those_of_the_features_uncorrelated_with_a_mean_variance_of_1(
    teacher_file: Path, images: CaptionedImages
) -> None:
    teacher = Teacher(teacher_file, images.images, SIDE, components=4)
    assert teacher.size == SIDE
    features = teacher(images.images)
    assert (features.shape, features.dtype) == ((3, 4, 4, 4), torch.float16)
    covariance = features.double().flatten(0, 2).T.cov()
    torch.testing.assert_close(covariance.diag().mean().item(), 1.0, rtol=1e-2, atol=0)
    assert covariance.fill_diagonal_(0).abs().max() < 1e-2
    program = torch.export.load(teacher_file).module()
    raw = program(teacher_pixels(images)).movedim(1, 3).double().flatten(0, 2)
    variances = raw.T.cov()
    ratio = torch.linalg.eigvalsh(variances).flip(0)[:4].sqrt()
    torch.testing.assert_close(features.double().flatten(0, 2).var(0), ratio / ratio.mean(), rtol=1e-2, atol=1e-3)


def teacher_pixels(images: CaptionedImages) -> Tensor:
    return torch.stack([images.plain(row)["image"] for row in range(len(images))]) / 255


def test_a_view_holds_the_teachers_features_of_its_own_image_and_after_all_views_both_are_mirrored(
    teacher_file: Path, images: CaptionedImages, tmp_path: Path
) -> None:
    teacher = Teacher(teacher_file, images.images, SIDE, components=4)
    views = make_views(images, teacher, VisionSettings(views=2), tmp_path / "views")
    for row in range(len(images)):
        first, second, mirrored, other, again = (views[Draw(row, epoch)] for epoch in range(5))
        assert torch.equal(first["features"], teacher([first["image"]])[0])
        assert not torch.equal(first["image"], second["image"])
        assert torch.equal(mirrored["image"].flip(2), first["image"])
        assert torch.equal(mirrored["features"].flip(1), first["features"])
        assert torch.equal(other["image"].flip(2), second["image"])
        assert torch.equal(first["image"], again["image"])
        assert first["words"] == "\n".join(TEXTS[row])
    stored = (tmp_path / "views" / "features.npy").stat().st_mtime_ns
    opened = make_views(images, teacher, VisionSettings(views=2), tmp_path / "views")
    assert torch.equal(opened[Draw(1, 1)]["image"], views[Draw(1, 1)]["image"])
    assert (tmp_path / "views" / "features.npy").stat().st_mtime_ns == stored, "views that are there are not made again"


def test_a_wrong_image_has_to_predict_the_features_of_the_right_one(
    teacher_file: Path, images: CaptionedImages
) -> None:
    teacher = Teacher(teacher_file, images.images, SIDE, components=4)
    pairs = with_features(held_out_pairs(images), teacher)
    for right, wrong in zip(pairs["right"], pairs["wrong"], strict=True):
        assert torch.equal(right["features"], teacher([right["image"]])[0])
        assert torch.equal(wrong["features"], right["features"])
        assert not torch.equal(wrong["image"], right["image"])


def test_the_loss_is_the_words_cross_entropy_and_the_features_squared_error_on_the_grid_of_the_teacher(
    load_tiny: LoadTiny, images: CaptionedImages
) -> None:
    backbone = load_tiny("sdpa")
    words = Words(map(images.words, range(3)), images=1)
    training = VisionTraining(backbone.model, len(words), channels=4, word_weight=0.5)
    for head in (training.words, training.features):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    features = torch.randn(3, 4, 4, 4)  # four times the tokens of an image
    rows = [{**images.plain(row), "features": features[row]} for row in range(3)]
    loss = training(**VisionCollator(backbone.processor, words)(rows))["loss"]
    expected = 0.5 * len(words) * torch.log(torch.tensor(2.0)) + features.square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert training.features.weight.grad.abs().max() > 0


class Flat(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))


class Grey(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels + 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", r"teacher\.pt2 is not a file of torch\.export\.save; it has to map pixels \[n, 3, S, S\]"),
        ("text", r"is not a file of torch\.export\.save"),
        ("archive", r"cannot be loaded as a teacher \(.*\); it has to map"),
        ("flat", r"returns \[3, 3\] for 3 images; it has to map"),
        ("grey", r"takes inputs of the shapes \[\[s\d+, 1, 56, 56\]\]; it has to map"),
        ("oblong", r"takes inputs of the shapes \[\[s\d+, 3, 56, 28\]\]"),
        ("fixed", r"takes inputs of the shapes \[\[2, 3, 56, 56\]\]; .* for any n"),
    ],
)
def test_a_teacher_of_another_form_is_refused(kind: str, reason: str, images: CaptionedImages, tmp_path: Path) -> None:
    file = tmp_path / "teacher.pt2"
    shapes = {"grey": (2, 1, SIDE, SIDE), "oblong": (2, 3, SIDE, SIDE // 2)}
    if kind == "text":
        file.write_text("not a program")
    elif kind == "archive":
        torch.save({}, file)
    elif kind != "missing":
        export(Flat() if kind == "flat" else Grey(), file, shapes.get(kind, (2, 3, SIDE, SIDE)), kind == "fixed")
    with pytest.raises(CocoaError, match=reason) as error:
        Teacher(file, images.images, SIDE, components=4)
    assert "\n" not in str(error.value)
