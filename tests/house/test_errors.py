import json
import pickle
from pathlib import Path

import pytest

from cocoa_embed import errors
from cocoa_embed.errors import CocoaError, ImageError, MissingExtraError, did_you_mean, install_command, require


class Installed:
    """A distribution that remembers where it was installed from."""

    def __init__(self, origin: dict | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'cocoa-embed[train]'"),
        ({"url": "file:///src/my%20clone", "dir_info": {"editable": True}}, "pip install -e '/src/my clone[train]'"),
        ({"url": "file:///dist/cocoa.whl", "archive_info": {}}, "pip install '/dist/cocoa.whl[train]'"),
        (
            {"url": "https://host/cocoa.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'cocoa-embed[train] @ git+https://host/cocoa.git'",
        ),
    ],
)
def test_the_install_command_names_the_place_that_the_project_came_from(
    origin: dict | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "distribution", lambda _: Installed(origin))
    assert install_command("train") == command


def test_inside_its_clone_the_install_command_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    origin = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    monkeypatch.setattr(errors, "distribution", lambda _: Installed(origin))
    with pytest.raises(MissingExtraError, match=r"no_such_module is not installed; run: pip install -e '\.\[train\]'"):
        require("no_such_module", "train")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CIFAR_1", "(did you mean 'cifar-1'? known: cifar-1, other)"),
        ("zzz", "(known: cifar-1, other)"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_known_one(name: str, hint: str) -> None:
    assert did_you_mean(name, ["cifar-1", "other"]) == hint


def test_no_known_name_is_said_so() -> None:
    assert did_you_mean("x", []) == "(known: none)"


def test_an_error_crosses_processes() -> None:
    """A pool of processes waits for ever for an error that cannot be unpickled."""
    for error in (ImageError("red.png", "does not exist"), CocoaError("no")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
