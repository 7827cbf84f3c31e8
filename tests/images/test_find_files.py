import os
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize
from unittest.mock import Mock

import pytest

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.images.find_files import find_images, read_file_list, search_folder
from cocoa_embed.images.passed_over import CACHE_MARKERS, THUMBNAILS_MARKER, PassedOver


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


LINKS = {
    "a-link": "elsewhere",
    "photos/round": "..",
    "photos/self": ".",
    "photos/sub/again": "../sub",
    "photos/a-link": "../elsewhere",
    "photos/z-link": "../elsewhere",
    "photos/sub/link.png": "../../elsewhere/c.png",
    "photos/itself.png": "itself.png",
    "photos/gone.png": "nowhere",
}
IN_PHOTOS = "photos/a.png photos/gone.png photos/itself.png photos/sub/b.png photos/sub/link.png"


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        ("photos", f"photos/a-link/c.png photos/a-link/deep/d.png {IN_PHOTOS}"),
        (".", f"elsewhere/c.png elsewhere/deep/d.png {IN_PHOTOS}"),
        ("photos elsewhere", f"elsewhere/c.png elsewhere/deep/d.png {IN_PHOTOS}"),
        ("photos/z-link", "photos/z-link/c.png photos/z-link/deep/d.png"),
    ],
)
def test_links_are_followed_loops_end_and_a_path_without_links_is_preferred(
    tmp_path: Path, searched: str, expected: str
) -> None:
    make(tmp_path, "photos/a.png", "photos/sub/b.png", "elsewhere/c.png", "elsewhere/deep/d.png")
    for link, target in LINKS.items():
        (tmp_path / link).symlink_to(target)
    assert names(find_images(tmp_path / folder for folder in searched.split()), tmp_path) == expected.split()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "nowhere does not exist; name a folder"),
        ("n" * 5000, "does not exist"),
        ("nul\0", "does not exist"),
        ("*.png", "does not exist, and nothing matches it as a pattern"),
        ("b*/*.jpg", "nothing matches it as a pattern"),
        ("a.txt/*", "nothing matches it as a pattern"),
        ("a.txt", r"a\.txt is UTF-16; save the list of files as UTF-8"),
    ],
)
def test_a_path_that_leads_to_nothing_is_named(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "a.txt").write_text("a.jpg", encoding="utf-16")
    with pytest.raises(CocoaError, match=reason):
        find_images([tmp_path / path])
    with pytest.raises(CocoaError, match=r"gone\.txt cannot be read \(No such file"):
        read_file_list(tmp_path / "gone.txt")


@pytest.mark.parametrize("pattern", ["", "**/*.png"])
def test_folders_that_cannot_be_listed_or_vanish_are_reported_and_the_others_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    make(tmp_path, "a/1.png", "locked/2.png", "vanishing/3.png", "z/4.png", "z/locked too/5.png")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if "locked" in os.path.basename(path):  # to root, every folder can be listed
            raise PermissionError(13, "Permission denied", path)
        if os.path.basename(path) == "a" and (tmp_path / "vanishing").exists():
            (tmp_path / "vanishing").rename(f"{tmp_path} gone")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    reported: dict[Path, str] = {}
    found = find_images([tmp_path / pattern], on_error=reported.__setitem__)
    assert names(found, tmp_path) == ["a/1.png", "z/4.png"]
    if not pattern:
        assert reported.pop(tmp_path / "vanishing") == "cannot be listed (No such file or directory)"
    locked = tmp_path / "locked", tmp_path / "z" / "locked too"
    assert reported == dict.fromkeys(locked, "cannot be listed (Permission denied)")
    with pytest.raises(CocoaError, match=r"locked cannot be listed \(Permission denied\)$"):
        find_images([tmp_path / "locked"])


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
    listed = list(read_file_list(tmp_path / "lists" / "photos.txt"))
    expected = ("a.jpg", "../b c.png", "missing.jpg", tmp_path / "folder", "../#e.png")
    assert listed == [tmp_path / "lists" / name for name in expected]
    assert find_images([tmp_path / "lists" / "photos.txt"]) == sorted(listed)


def test_a_list_with_nul_has_names_with_newlines(tmp_path: Path) -> None:
    make(tmp_path, "two\nlines.png", "#1.png")
    (tmp_path / "photos.TXT").write_bytes(b"two\nlines.png\0#1.png\0caf\xe9.png\0")
    found = find_images([tmp_path / "photos.TXT"])
    assert [os.fsencode(path.name) for path in found] == [b"#1.png", b"caf\xe9.png", b"two\nlines.png"]


def test_images_are_relative_to_the_folder_that_was_searched(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.png", "photos/sub/b.png", "list.txt", "photos[1]/c.png")
    for path, folder in {
        "photos": "photos",
        "photos/a.png": "photos",
        "photos/**/*.png": "photos",
        "photos[1]/*.png": "photos[1]",
        "list.txt": "",
    }.items():
        assert search_folder(tmp_path / path) == tmp_path / folder
    assert search_folder("*.png") == Path()


def test_files_are_not_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{folder}/{number}.png" for folder in "abc" for number in range(50)))
    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, Mock(wraps=getattr(os, name)))
    assert len(find_images([tmp_path])) == 150
    assert os.stat.call_count + os.lstat.call_count < 15


SYSTEM_FILES = (
    *("@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", ".Trash-1000/files/a.jpg", ".Trashes/501/a.jpg", "$Recycle.Bin/S-1/a.jpg"),
    *("#recycle/a.jpg", "@Recycle/a.jpg", ".@__thumb/a.jpg", ".thumbnails/a.png", "__MACOSX/a.jpg", ".git/a.png"),
    *("System Volume Information/a.jpg", "lost+found/#1.jpg", "FOUND.000/a.jpg", ".Spotlight-V100/a.png"),
    *("My Previews.lrdata/a.jpg", "P.photoslibrary/resources/derivatives/a.jpg", "deep/er/@eaDir/a.jpg"),
)


def test_system_folders_are_passed_over_unless_they_are_named(tmp_path: Path) -> None:
    kept = ["P.photoslibrary/originals/a.jpg", "a.jpg", "deep/er/a.jpg", "git/a.jpg", "resources/a.jpg", "trash/a.jpg"]
    make(tmp_path, *kept, *SYSTEM_FILES)
    for path in (tmp_path, tmp_path / "**", tmp_path / "**" / "*.jpg"):
        passed_over = PassedOver()
        assert names(find_images([path], passed_over=passed_over), tmp_path) == kept
        if path == tmp_path:
            assert passed_over.counts == {"system folder": len(SYSTEM_FILES)}
    for file in SYSTEM_FILES:
        assert find_images([tmp_path / Path(file).parts[0]]), file
        assert names(find_images([(tmp_path / file).parent / "*.*"]), tmp_path) == [file]


def test_companions_are_recognised_by_their_bytes_and_deleted_files_by_their_names(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "sub/._empty.jpg", ".trashed-1700000000-b.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (tmp_path / "._photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "list.txt").write_text("._a.jpg\na.jpg\n")
    passed_over = PassedOver()
    found = find_images([tmp_path], passed_over=passed_over)
    assert names(found, tmp_path) == ["._photo.jpg", "a.jpg", "sub/._empty.jpg"]
    assert passed_over.counts == {"companion of another file": 1, "deleted file": 1}
    assert names(find_images([tmp_path / "list.txt"]), tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("marker", sorted(CACHE_MARKERS))
def test_a_folder_that_is_marked_as_a_cache_is_passed_over_unless_it_is_named(tmp_path: Path, marker: str) -> None:
    make(tmp_path, "a.jpg", f"small/{marker}", "small/b.jpg", "small/deep/c.jpg")
    (tmp_path / "link").symlink_to("small")
    assert names(find_images([tmp_path]), tmp_path) == ["a.jpg"]
    assert names(find_images([tmp_path / "**" / "*.jpg"]), tmp_path) == ["a.jpg"]
    if marker == THUMBNAILS_MARKER:  # ours are copies of what is indexed
        assert find_images([tmp_path / "small"]) == []
        return
    assert names(find_images([tmp_path / "small" / "*.jpg"]), tmp_path) == ["small/b.jpg"]
    assert names(find_images([tmp_path / "small"]), tmp_path) == ["small/b.jpg", "small/deep/c.jpg"]


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        (["*.PNG"], "a/b.png a/drafts/d.png e.png Café.png"),
        (["drafts/"], "a/drafts/c.jpg a/drafts/d.png"),
        (["/e.png", "a/*/c.jpg"], "e.png a/drafts/c.jpg"),
        (["a/**"], "a/b.png a/drafts/c.jpg a/drafts/d.png"),
        (["#x.jpg", normalize("NFD", "café.*")], "#x.jpg Café.png"),
        (["*", "!*.png"], "#x.jpg a/b.png a/drafts/c.jpg a/drafts/d.png"),
        (["nothing"], ""),
    ],
)
def test_excluded_files_and_folders_are_those_of_a_gitignore_file(
    tmp_path: Path, patterns: list[str], excluded: str
) -> None:
    files = {"a/b.png", "a/drafts/c.jpg", "a/drafts/d.png", "e.png", normalize("NFC", "Café.png"), "#x.jpg"}
    make(tmp_path, *files)
    passed_over = PassedOver(patterns)
    assert {*names(find_images([tmp_path], passed_over=passed_over), tmp_path)} == files - {*excluded.split()}
    assert passed_over.unused == (["nothing"] if patterns == ["nothing"] else [])
    by_pattern = find_images([tmp_path / "**" / "*.*"], passed_over=PassedOver(patterns))
    assert by_pattern == find_images([tmp_path], passed_over=PassedOver(patterns))


@pytest.mark.parametrize("pattern", ["", "/", "!", "\\", " "])
def test_a_pattern_that_excludes_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"is not a pattern to exclude; give \*\.gif"):
        PassedOver([pattern])


def test_a_list_and_a_name_match_files_however_their_accents_are_composed(tmp_path: Path) -> None:
    make(tmp_path, normalize("NFD", "é/Café.png"))
    (tmp_path / "list.txt").write_text(normalize("NFC", "é/Café.png"))
    expected = [tmp_path / normalize("NFD", "é/Café.png")]
    assert find_images([tmp_path / "list.txt"]) == expected
    assert find_images([tmp_path / normalize("NFC", "é")]) == expected
