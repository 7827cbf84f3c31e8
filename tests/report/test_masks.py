import numpy as np

from cocoa_embed.report.masks import SHOWN_WHOLE, Mask, Span


def mask(length_a: int = 3, length_b: int = 4) -> Mask:
    blocks = np.array(["A"] * length_a + ["EOS"] + ["B"] * length_b)
    allowed = (blocks[:, None] == blocks) | (blocks == "EOS")[:, None] | (blocks == "EOS")
    return Mask(allowed, [f"t{index}" for index in range(len(blocks))], blocks.tolist())


def test_the_runs_of_a_mask_cover_what_is_allowed_and_a_leak_is_a_run_of_its_own() -> None:
    sound = mask()
    assert sum(run.length for row in sound.rows() for run in row) == sound.allowed.sum()
    assert {run.value for row in sound.rows() for run in row} == {"a", "eos", "b"}
    assert (sound.attends("EOS", "B"), sound.attends("A", "B"), sound.is_causal) == (True, False, False)
    assert Mask(np.tril(sound.allowed), sound.labels, sound.blocks).is_causal
    sound.allowed[-1, 0] = True
    assert [[run for run in row if run.value == "leak"] for row in sound.rows()] == [*[[]] * 7, [Span("leak", 0, 1)]]


def test_a_long_mask_is_condensed_and_allows_the_same() -> None:
    long = mask(256, 60)
    images = Mask(long.allowed, ["<|image_pad|>"] * 256 + list(long.labels[256:]), long.blocks)
    short = images.condensed()
    assert len(short.labels) < SHOWN_WHOLE
    assert (short.labels[0], short.labels[-1]) == ("256 × <|image_pad|>", "… 48 more")
    assert {run.value for row in short.rows() for run in row} == {"a", "eos", "b"}
    images.allowed[300, 0] = True
    assert images.condensed().attends("B", "A"), "a single leak is not condensed away"
