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


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.png", "photos/sub/b.png", "elsewhere/c.png", "elsewhere/deep/d.png")
    links = {"a-link": "../elsewhere", "self": ".", "z-link": "../elsewhere", "sub/link.png": "../a.png"}
    for link, target in {**links, "sub/again": "../sub", "itself.png": "itself.png", "gone.png": "nowhere"}.items():
        (tmp_path / "photos" / link).symlink_to(target)
    expected = "a-link/c.png a-link/deep/d.png a.png gone.png itself.png sub/b.png sub/link.png"
    assert names(find_images([tmp_path / "photos"]), tmp_path / "photos") == expected.split()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "nowhere does not exist; name a folder"),
        ("n" * 5000, "does not exist"),
        ("nul\0", "does not exist"),
        ("*.png", "does not exist, and nothing matches it as a pattern"),
        ("a.txt/*", "nothing matches it as a pattern"),
    ],
)
def test_a_path_that_leads_to_nothing_is_named(tmp_path: Path, path: str, reason: str) -> None:
    make(tmp_path, "a.txt")
    with pytest.raises(CocoaError, match=reason):
        find_images([tmp_path / path])
    with pytest.raises(CocoaError, match=r"gone\.txt cannot be read \(No such file"):
        read_file_list(tmp_path / "gone.txt")


def test_folders_that_cannot_be_listed_are_reported_and_the_others_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/1.png", "locked/2.png", "z/4.png", "z/locked too/5.png")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if "locked" in os.path.basename(path):  # to root, every folder can be listed
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    reported: dict[Path, str] = {}
    assert names(find_images([tmp_path], on_error=reported.__setitem__), tmp_path) == ["a/1.png", "z/4.png"]
    locked = tmp_path / "locked", tmp_path / "z" / "locked too"
    assert reported == dict.fromkeys(locked, "cannot be listed (Permission denied)")
    with pytest.raises(CocoaError, match=r"locked cannot be listed \(Permission denied\)$"):
        find_images([tmp_path / "locked"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("?.jpg", ["a.jpg"]),
        ("[ab].*", ["a.jpg", "b.PNG"]),
        ("*", ["a.jpg", "b.PNG", "d/.i.jpg", "d/e.jpg", "d/f.png", "d/g/h.jpg"]),
        ("*/*.jpg", ["d/e.jpg"]),
        ("**/*.jpg", ["a.jpg", "d/e.jpg", "d/g/h.jpg"]),
        ("**/g", ["d/g/h.jpg"]),
        ("d/**", ["d/.i.jpg", "d/e.jpg", "d/f.png", "d/g/h.jpg"]),
        ("d/.*.jpg", ["d/.i.jpg"]),
        ("*.dat", ["c.dat"]),
        ("d/../*.jpg", ["d/../a.jpg"]),
    ],
)
def test_a_pattern_stands_for_what_matches_it(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    make(tmp_path, "a.jpg", "b.PNG", "c.dat", "d/e.jpg", "d/f.png", "d/g/h.jpg", "d/.i.jpg", "d/notes.doc")
    assert [str(path)[len(str(tmp_path)) + 1 :] for path in find_images([tmp_path / pattern])] == expected


def test_a_name_with_wildcards_stands_for_itself_first_and_two_stars_end_among_loops(tmp_path: Path) -> None:
    make(tmp_path, "a[1].jpg", "a1.jpg", "b[2]/c.jpg", "b[2]/d.png", "b2/e.jpg")
    for number in range(20):
        (tmp_path / "b2" / f"loop{number}").symlink_to("..")
    assert names(find_images([tmp_path / "**" / "e.jpg"]), tmp_path) == ["b2/e.jpg"]
    assert names(find_images([tmp_path / "a[1].jpg"]), tmp_path) == ["a[1].jpg"]
    assert names(find_images([tmp_path / "a[12].jpg"]), tmp_path) == ["a1.jpg"]
    assert names(find_images([tmp_path / "b[2]" / "*.jpg"]), tmp_path) == ["b[2]/c.jpg"]


def test_a_list_names_files_from_its_own_folder_on_and_with_nul_names_with_newlines(tmp_path: Path) -> None:
    lines = ["a.jpg", "", "# a comment", "../b c.png\r", "missing.jpg", str(tmp_path / "folder"), "../#e.png", "  "]
    (tmp_path / "photos.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    listed = read_file_list(tmp_path / "photos.txt")
    expected = ("a.jpg", "../b c.png", "missing.jpg", "folder", "../#e.png")
    assert listed == [tmp_path / name for name in expected]
    assert find_images([tmp_path / "photos.txt"]) == sorted(listed)
    (tmp_path / "photos.TXT").write_bytes(b"two\nlines.png\0#1.png\0caf\xe9.png\0")
    found = find_images([tmp_path / "photos.TXT"])
    assert [os.fsencode(path.name) for path in found] == [b"#1.png", b"caf\xe9.png", b"two\nlines.png"]


def test_images_are_relative_to_the_folder_that_was_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.png", "sub/b.png", "list.txt", "photos[1]/c.png")
    monkeypatch.chdir(tmp_path)
    folders = {"sub": "sub", "a.png": "", "sub/**/*.png": "sub", "photos[1]/*.png": "photos[1]", "list.txt": ""}
    assert [search_folder(path) for path in folders] == list(map(Path, folders.values()))
    expected = [Path("a.png"), Path("photos[1]/c.png"), Path("sub/b.png")]
    assert find_images([".", "sub"]) == find_images(["**/*.png"]) == expected
