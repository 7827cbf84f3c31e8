import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cocoa_embed.errors import CocoaError
from cocoa_embed.images.find_files import find_images, read_file_list, search_folder


def make(folder: Path, *names: str) -> None:
    """Make empty files, and the folders they are in."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(found: list[Path], folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in found]


def test_images_are_found_by_suffix_sorted_and_once(tmp_path: Path) -> None:
    make(tmp_path, "z.JPG", "a.png", "notes.doc", "b/c.WebP", "b/d.jpeg.part", "b-1.HEIC", "b/.hidden.avif", "heif")
    make(tmp_path, "x.png/inside.jpg", "none.txt")
    found = find_images([tmp_path / "none.txt", tmp_path, tmp_path / "a.png", tmp_path / "notes.doc", tmp_path / "b"])
    expected = ["a.png", "b/.hidden.avif", "b/c.WebP", "b-1.HEIC", "notes.doc", "x.png/inside.jpg", "z.JPG"]
    assert names(found, tmp_path) == expected
    assert found == sorted(found)


def test_the_working_folder_gives_the_names_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.png", "b/c.png")
    monkeypatch.chdir(tmp_path)
    assert find_images([".", "a.png", Path("b")]) == find_images(["*", "**/*.png"]) == [Path("a.png"), Path("b/c.png")]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.png", "photos/sub/b.png", "elsewhere/c.png", "elsewhere/deep/d.png")
    for link, target in {
        "photos/round": "..",
        "photos/self": ".",
        "photos/sub/again": "../sub",
        "photos/a link": "../elsewhere",
        "photos/z link": "../elsewhere",
        "photos/sub/link.png": "../../elsewhere/c.png",
        "photos/itself.png": "itself.png",
        "photos/gone.png": "nowhere",
    }.items():
        (tmp_path / link).symlink_to(target)
    assert names(find_images([tmp_path / "photos"]), tmp_path) == [
        "photos/a link/c.png",
        "photos/a link/deep/d.png",
        "photos/a.png",
        "photos/gone.png",
        "photos/itself.png",
        "photos/sub/b.png",
        "photos/sub/link.png",
    ]


def test_what_needs_no_link_to_be_reached_is_named_without_it(tmp_path: Path) -> None:
    make(tmp_path, "z/real/a.png", "other/b.png")
    (tmp_path / "a link").symlink_to("z/real")
    (tmp_path / "z" / "other").symlink_to("../other")
    assert names(find_images([tmp_path]), tmp_path) == ["other/b.png", "z/real/a.png"]
    assert names(find_images([tmp_path / "z", tmp_path / "other"]), tmp_path) == ["other/b.png", "z/real/a.png"]
    assert names(find_images([tmp_path / "a link"]), tmp_path) == ["a link/a.png"]


def test_names_that_are_no_utf_8_survive(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \n\xff.png")
    Path(odd).write_bytes(b"content")
    (found,) = find_images([tmp_path])
    assert str(found) == odd
    assert found.read_bytes() == b"content"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="nowhere does not exist; name a folder"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(CocoaError, match="does not exist"):
        find_images(["n" * 5000])
    with pytest.raises(CocoaError, match="does not exist"):
        find_images(["nul\0"])


def failing_scandir(monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
    """Let the folders of these names be unreadable, which they never are to root."""
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if os.path.basename(path) in failing:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_listed_is_reported_and_the_others_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/1.png", "locked/2.png", "z/3.png", "z/locked too/4.png")
    failing_scandir(monkeypatch, "locked", "locked too")
    told: list[tuple[Path, str]] = []
    for paths in ([tmp_path], [tmp_path / "**" / "*.png"]):
        told.clear()
        assert names(find_images(paths, on_error=lambda *error: told.append(error)), tmp_path) == ["a/1.png", "z/3.png"]
        assert sorted(told) == [
            (tmp_path / "locked", "cannot be listed (Permission denied)"),
            (tmp_path / "z" / "locked too", "cannot be listed (Permission denied)"),
        ]
    with pytest.raises(CocoaError, match=r"locked cannot be listed \(Permission denied\)$"):
        find_images([tmp_path])


def test_a_folder_that_vanishes_during_the_search_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def vanish(path: str) -> Iterator[os.DirEntry[str]]:
        entries = scandir(path)
        if path == str(tmp_path / "a"):
            (tmp_path / "b" / "2.png").unlink()
            (tmp_path / "b").rmdir()
        return entries

    monkeypatch.setattr(os, "scandir", vanish)
    told: list[tuple[Path, str]] = []
    assert names(find_images([tmp_path], on_error=lambda *error: told.append(error)), tmp_path) == ["a/1.png"]
    assert told == [(tmp_path / "b", "cannot be listed (No such file or directory)")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("?.jpg", ["a.jpg"]),
        ("[ab].*", ["a.jpg", "b.PNG"]),
        ("*", ["a.jpg", "b.PNG", "d/.i.jpg", "d/e.jpg", "d/f.png", "d/g/h.jpg"]),
        ("*.PNG", ["b.PNG"]),
        ("d/*", ["d/e.jpg", "d/f.png", "d/g/h.jpg"]),
        ("*/*.jpg", ["d/e.jpg"]),
        ("**/*.jpg", ["a.jpg", "d/e.jpg", "d/g/h.jpg"]),
        ("**/g", ["d/g/h.jpg"]),
        ("d/**", ["d/.i.jpg", "d/e.jpg", "d/f.png", "d/g/h.jpg"]),
        ("**/h.*", ["d/g/h.jpg"]),
        ("d/.*.jpg", ["d/.i.jpg"]),
        ("*.dat", ["c.dat"]),
        ("d/../*.jpg", ["d/../a.jpg"]),
    ],
)
def test_a_pattern_stands_for_what_matches_it(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    make(tmp_path, "a.jpg", "b.PNG", "c.dat", "d/e.jpg", "d/f.png", "d/g/h.jpg", "d/.i.jpg", "d/notes.doc")
    assert [str(path)[len(str(tmp_path)) + 1 :] for path in find_images([tmp_path / pattern])] == expected


def test_a_name_with_wildcards_stands_for_itself_first(tmp_path: Path) -> None:
    make(tmp_path, "a[1].jpg", "a1.jpg", "b[2]/c.jpg", "b[2]/d.png", "b2/e.jpg")
    assert names(find_images([tmp_path / "a[1].jpg"]), tmp_path) == ["a[1].jpg"]
    assert names(find_images([tmp_path / "a[12].jpg"]), tmp_path) == ["a1.jpg"]
    assert names(find_images([tmp_path / "b[2]" / "*.jpg"]), tmp_path) == ["b[2]/c.jpg"]


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    for pattern in ("*.png", "b*/*.jpg", "a.jpg/*"):
        with pytest.raises(CocoaError, match="does not exist, and nothing matches it as a pattern"):
            find_images([tmp_path / pattern])


def test_a_pattern_ends_among_loops_of_links(tmp_path: Path) -> None:
    make(tmp_path, "a/b.png", "a/c/d.png")
    for number in range(20):
        (tmp_path / "a" / f"loop{number}").symlink_to("..")
        (tmp_path / "a" / "c" / f"loop{number}").symlink_to("../..")
    assert names(find_images([tmp_path / "**" / "*.png"]), tmp_path) == ["a/b.png", "a/c/d.png"]


def test_a_list_names_files_from_its_own_folder_on(tmp_path: Path) -> None:
    make(tmp_path, "lists/a.jpg", "b c.png", "folder/not listed.gif", "#e.png")
    lines = ["a.jpg", "", "# a comment", "../b c.png\r", "missing.jpg", str(tmp_path / "folder"), "../#e.png", "  "]
    (tmp_path / "lists" / "photos.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    listed = read_file_list(tmp_path / "lists" / "photos.txt")
    folder = tmp_path / "lists"
    assert listed == [
        *(folder / name for name in ("a.jpg", "../b c.png", "missing.jpg")),
        tmp_path / "folder",
        folder / "../#e.png",
    ]
    found = find_images([tmp_path / "lists" / "photos.txt"])
    assert found == sorted(listed)


def test_a_list_with_nul_has_names_with_newlines(tmp_path: Path) -> None:
    make(tmp_path, "two\nlines.png", "#1.png")
    (tmp_path / "photos.TXT").write_bytes(b"two\nlines.png\0#1.png\0caf\xe9.png\0")
    found = find_images([tmp_path / "photos.TXT"])
    assert [os.fsencode(path.name) for path in found] == [b"#1.png", b"caf\xe9.png", b"two\nlines.png"]


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_text("a.jpg", encoding="utf-16")
    with pytest.raises(CocoaError, match=r"wide\.txt is UTF-16; a list of files is UTF-8"):
        find_images([tmp_path / "wide.txt"])
    with pytest.raises(CocoaError, match=r"gone\.txt cannot be read \(No such file"):
        read_file_list(tmp_path / "gone.txt")


def test_images_are_relative_to_the_folder_that_was_searched(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.png", "photos/sub/b.png", "list.txt", "photos[1]/c.png")
    assert search_folder(tmp_path / "photos") == tmp_path / "photos"
    assert search_folder(tmp_path / "photos" / "a.png") == tmp_path / "photos"
    assert search_folder(tmp_path / "photos" / "**" / "*.png") == tmp_path / "photos"
    assert search_folder(tmp_path / "photos[1]" / "*.png") == tmp_path / "photos[1]"
    assert search_folder(tmp_path / "list.txt") == tmp_path
    assert search_folder("*.png") == Path()


def test_files_are_not_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{folder}/{number}.png" for folder in "abc" for number in range(50)))
    looked_at: list[object] = []
    for name in ("stat", "lstat"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *a, original=original, **k: looked_at.append(path) or original(path, *a, **k)
        )
    assert len(find_images([tmp_path])) == 150
    assert len(looked_at) < 15
