import json
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest

from cocoa_embed import errors
from cocoa_embed.errors import CocoaError, ImageError, MissingExtraError, did_you_mean, require

EDITABLE = {"dir_info": {"editable": True}}


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'cocoa-embed[train]'"),
        ({"url": "file:///src/my%20clone", **EDITABLE}, "pip install -e '/src/my clone[train]'"),
        (
            {"url": "https://host/cocoa.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'cocoa-embed[train] @ git+https://host/cocoa.git'",
        ),
        ({"url": Path.cwd().as_uri(), **EDITABLE}, "pip install -e '.[train]'"),
    ],
)
def test_a_missing_extra_names_the_command_for_the_place_that_the_project_came_from(
    origin: dict | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = Mock(read_text={"direct_url.json": origin and json.dumps(origin)}.__getitem__)
    monkeypatch.setattr(errors, "distribution", lambda _: distribution)
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_module", "train")
    assert str(caught.value) == f"no_such_module is not installed; run: {command}"


def test_an_unknown_name_is_answered_with_the_closest_known_one() -> None:
    known = ["cifar-1", "other"]
    assert did_you_mean("CIFAR_1", known) == "(did you mean 'cifar-1'? known: cifar-1, other)"
    assert did_you_mean("zzz", known) == "(known: cifar-1, other)"


@pytest.mark.parametrize("error", [ImageError("red.png", "does not exist"), CocoaError("no")])
def test_an_error_crosses_processes(error: CocoaError) -> None:
    """A pool of processes waits for ever for an error that cannot be unpickled."""
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
