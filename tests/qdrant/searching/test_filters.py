import json
import re
import unicodedata
from datetime import datetime, timezone
from typing import Any, Literal

import pytest
import qdrant_edge as edge
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qdrant_client import models
from qdrant_client.local.payload_filters import check_filter

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.searching import conditions as tree
from cocoa_embed.integrations.qdrant.stores.base import PAYLOAD_INDEXES
from cocoa_embed.integrations.qdrant.stores.client_filters import read_filter
from cocoa_embed.integrations.qdrant.stores.edge_filters import to_edge_filter

Payload = dict[str, Any]

DAY = 24 * 60 * 60
NEW_YEAR = datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp()
BEACH: Payload = {
    "path": "/photos/Holiday Beach/a.jpg",
    "paths": ["/photos/Holiday Beach/a.jpg", "/copies/a.jpg"],
    "mime": "image/jpeg",
    "width": 1000,
    "mtime": NEW_YEAR + 0.5,
    "caption": "A dog on the Beach, at sunset",
    "place": {"lon": 13.5, "lat": 52.4},
    "metadata": {
        **{"author": "Ann", "year": 1900, "score": 0.5, "ok": True, "tags": ["a", "b"], "date": "2025-12-31"},
        **{"a.b": "dotted", "sp ace": "blank", "größe": 7, "exif": {"iso": [1, 2]}},
    },
}
STREET: Payload = {
    "path": "/photos/b.png",
    "mime": "image/png",
    "width": 640,
    "mtime": NEW_YEAR - 1,
    "caption": "beaches | and = more",
    "metadata": {
        **{"author": ["Bob", "Ann"], "year": "1900", "score": 1.0, "ok": "true", "date": "2026-01-01T12:00:00+01:00"},
        **{"width": 5, "rows": [{"k": 1}, {"k": 2}], "big": 2**60 + 1, "code": "123456789012345678901234"},
    },
}
PLAIN: Payload = {
    "path": "/photos/c\\udcff.gif",
    "mime": "image/gif",
    "width": 1,
    "mtime": NEW_YEAR + DAY,
    "caption": None,
    "metadata": {"author": "", "year": 1900.5, "tags": []},
}
PAYLOADS = {"beach": BEACH, "street": STREET, "plain": PLAIN, "top": {"author": "Ann", "year": 1900.0}, "none": {}}
EXPECTED = {
    " mime = image/png|image/gif ": "street plain",
    "path=/photos/c\udcff.gif": "plain",
    **dict.fromkeys(["paths=/copies/a.jpg", "path=/copies/a.jpg"], "beach"),
    **dict.fromkeys(["mime=png", "mime=.PNG", "mime='image/png'", "mime==IMAGE/PNG"], "street"),
    "mime≠jpg|gif": "street top none",
    **dict.fromkeys(["author='Ann'", "author=“Ann”", "author = 'x|y'|Ann"], "beach street top"),
    **dict.fromkeys(["width≥640", "width ≥ 640"], "beach street"),
    "path~holiday": "beach",
    "width>=640": "beach street",
    "width=1e3|1": "beach plain",
    **dict.fromkeys(["mtime>2026", "mtime>=2026"], "beach plain"),
    "mtime<=2026-01-01": "beach street",
    "mtime<2026": "street",
    "mtime=2025|2026-01-02": "street plain",
    "mtime!=2026-01": "street top none",
    "mtime<=2026-01-01T00:00:00.500Z": "beach street",
    f"mtime={NEW_YEAR - 1}|2026-01-01T01:00:00.500+01:00": "beach street",
    'caption~"sunset, at DOG"|beaches': "beach street",
    "caption!~beach": "street plain top none",
    'caption="beaches | and = more"': "street",
    "!caption": "plain top none",
    "author=Ann": "beach street top",
    "author!=Ann": "plain none",
    "year=1900": "beach street top",
    'year="1900"': "street",
    "year>1900": "plain",
    "ok=true": "beach street",
    "tags": "beach",
    **dict.fromkeys(["date<2026-01-01", "date<2026", "date<=2025-12-31", "date<=2025"], "beach"),
    "date>2026": "street",
    "date=2025-12-31|2026-01": "beach street",
    "date!=2025-12": "street plain top none",
    "date=2026-01-01T11:00Z": "street",
    'date="2025-12"': "",
    '"a.b"=dotted': "beach",
    "sp ace=blank": "beach",
    "exif.iso=2": "beach",
    "rows[].k=2": "street",
    f"big={2**60}": "",
    "code=123456789012345678901234": "street",
}
WRONG = {
    "!mime=x": "write KEY=VALUE",
    "mime=a||b": "a value is missing",
    'mime="a"b': "not a text in double quotes",
    **dict.fromkeys(["a..b=1", "a[x]=1", '""=1'], "is not a key"),
    "author:Ann": 'did you mean author=Ann? Put a key of this name in quotes: "author:Ann"',
    "mime: image/png": "did you mean mime=image/png?",
    "width 1000": "did you mean width=1000?",
    **dict.fromkeys(["author=Ann and width>5", "author=Ann, width>5", "author=Ann && year=5"], "each filter is one"),
    "mime=image/*": "'image/*' is not a pattern; search for words with ~",
    "path=/photos/": "path is compared as a whole, but '/photos/' is a folder",
    "relative_path=photos/|a.png": "relative_path is compared as a whole, but 'photos/' is a folder",
    "path=photos/b.png": "path holds absolute paths, and 'photos/b.png' is not one",
    "width=>1000": "KEY>=VALUE",
    'width="640"': "width is a number, but '640' is not",
    "width<1e999": "width is a number, but '1e999' is not",
    **dict.fromkeys(["year<old", "mtime=2026-13-01", "mtime=9999"], "is not a number or a date"),
    "path<b": "path is a text, which has no order",
    "width~6": "width is a number and has no words",
    "caption~!!": "there is no word in",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """An Edge shard without payload indexes, and one with those of the indexer."""
    config = edge.EdgeConfig(vectors=edge.EdgeVectorParams(size=1, distance=edge.Distance.Cosine))
    plain, indexed = (edge.EdgeShard.create(str(tmp_path_factory.mktemp("edge")), config) for _ in range(2))
    for field, kind in PAYLOAD_INDEXES.items():
        schema = getattr(edge.PayloadSchemaType, kind.capitalize())
        indexed.update(edge.UpdateOperation.create_field_index(field, schema))
    return [plain, indexed]


def found_by_edge(shard: Any, query_filter: models.Filter, payloads: list[Payload]) -> set[int]:  # noqa: ANN401
    points = [edge.Point(number, [1.0], payload) for number, payload in enumerate(payloads)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    records, _ = shard.scroll(edge.ScrollRequest(limit=1000, filter=to_edge_filter(query_filter)))
    return {int(record.id) for record in records if int(record.id) < len(payloads)}


def found(query_filter: models.Filter | None, payloads: list[Payload]) -> set[int]:
    """Return the payloads that qdrant-client's local mode finds."""
    return {number for number, payload in enumerate(payloads) if check_filter(query_filter, payload, number, {})}


def found_by_each(shards: list[Any], query_filter: models.Filter, payloads: list[Payload]) -> list[set[int]]:
    return [found(query_filter, payloads), *(found_by_edge(shard, query_filter, payloads) for shard in shards)]


def test_every_backend_finds_what_a_filter_says(shards: list[Any]) -> None:
    payloads = list(PAYLOADS.values())
    for text, names in EXPECTED.items():
        expected = {list(PAYLOADS).index(name) for name in names.split()}
        query_filter = read_filter(text)
        assert found_by_each(shards, query_filter, payloads) == [expected] * 3, text
        assert models.Filter.model_validate_json(query_filter.model_dump_json()) == query_filter, "as for a server"
    assert read_filter([]) is read_filter(None) is None
    assert found(read_filter(["width>1", "author=Ann", "mime!=image/png"]), payloads) == {0}


SCALARS: list[Any] = ["", "1", "Ann", "a red kite", "Kite, red!", 0, 1, 1.0, 0.5, 640, 2**53 + 1, True, False]
SCALARS += ["2026-01-01", "2026-01-01T12:00:00+01:00", "2026-01-01T11:00:00Z"]
PATHS = st.sampled_from(
    ["width", "mtime", "caption", "a", "metadata.a", 'metadata."b c"', "metadata.d.a", "d[].a", "a[1]"]
)
VALUES = st.one_of(st.none(), st.sampled_from(SCALARS), st.lists(st.sampled_from(SCALARS), max_size=2))
COLUMNS = st.dictionaries(st.sampled_from(["a", "b c"]), VALUES)
OBJECTS = st.one_of(COLUMNS, st.lists(COLUMNS, max_size=2))
STORED = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(("width", "mtime", "caption", "a"), VALUES), "d": OBJECTS, "metadata": COLUMNS}
)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_may_be_composed_or_not(shards: list[Any], form: Literal["NFC", "NFD"]) -> None:
    whole = "Zürich, près du café"
    spelled = [unicodedata.normalize(each, whole) for each in ("NFC", "NFD")]
    stored: list[Payload] = [{"path": f"/{text}", "caption": text, "metadata": {"place": text}} for text in spelled]
    for text in (f'place="{whole}"', f'path="/{whole}"|/x', "caption~CAFÉ près", "place~zürich"):
        query_filter = read_filter(unicodedata.normalize(form, text))
        assert found_by_each(shards, query_filter, stored) == [{0, 1}] * 3, text
    assert found(read_filter(unicodedata.normalize(form, f'place!="{whole}"')), stored) == set()


def ranges(limits: list[Any]) -> st.SearchStrategy[tree.Condition]:
    bounds = st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), st.sampled_from(limits), min_size=1)
    return st.builds(tree.Range, PATHS, bounds)


def groups(parts: st.SearchStrategy[tree.Condition]) -> st.SearchStrategy[tree.Condition]:
    several = st.lists(parts, min_size=1, max_size=3).map(tuple)
    return st.one_of(st.builds(tree.And, several), st.builds(tree.Or, several), st.builds(tree.Not, parts))


LEAVES = st.one_of(
    st.builds(tree.OneOf, PATHS, st.lists(st.sampled_from(SCALARS), min_size=1, max_size=3).map(tuple)),
    ranges([0, 0.5, 1, 640]),
    ranges([datetime(2026, 1, 1, hour, tzinfo=timezone.utc) for hour in (0, 11, 12)]),
    st.builds(tree.HasWords, PATHS, st.sampled_from(["ann", "Kite RED", "1"])),
    st.builds(tree.Exists, PATHS),
)


@given(st.recursive(LEAVES, groups, max_leaves=6), st.lists(STORED, min_size=4, max_size=4))
@settings(max_examples=100)
def test_backends_agree_on_any_condition(shards: list[Any], condition: tree.Condition, payloads: list[Payload]) -> None:
    query_filter = read_filter(condition)
    assert query_filter is not None
    assert found_by_edge(shards[0], query_filter, payloads) == found(query_filter, payloads)


@pytest.mark.parametrize("text", WRONG)
def test_malformed_filters_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text!a} is not a filter: ") + ".*" + re.escape(WRONG[text])):
        read_filter(["mime=a", text])


def test_filters_of_every_kind_are_taken_together() -> None:
    mime = models.FieldCondition(key="mime", match=models.MatchValue(value="image/png"))
    filters: list[Any] = ["width>1", models.Filter(must=[mime]), mime, tree.Exists("caption")]
    assert found(read_filter(filters), list(PAYLOADS.values())) == {1}
    assert read_filter(filters[1]) is read_filter([filters[1]]) is filters[1]


def test_anything_else_is_not_a_filter() -> None:
    for wrong, kind in (({"must": []}, "dict"), (5, "int"), (["a", 5], "list of int, str"), ([{}], "list of dict")):
        with pytest.raises(UsageError, match=f"query_filter is a {kind}; give conditions, as in"):
            read_filter(wrong)


NAMES = st.text(st.characters(exclude_characters='"\\', exclude_categories=("Cs", "Cc")), min_size=1)
COLUMN_VALUES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)


@given(NAMES, COLUMN_VALUES)
def test_any_column_is_found_by_its_value_alone(column: str, value: str | int | float | bool) -> None:
    assume(column not in tree.OWN_FIELDS and value not in ("", "other"))
    payloads: list[Payload] = [{"metadata": {column: stored}} for stored in (value, [None, value], "other")]
    written = json.dumps(value)
    assert found(read_filter(f'"{column}"={written}'), payloads) == {0, 1}
    assert found(read_filter(f'"{column}"={written}|"other"'), payloads) == {0, 1, 2}


@given(st.one_of(st.text(max_size=30), st.text('ab.[]0"=!<>~| 1-', max_size=12)))
@settings(max_examples=200)
def test_any_text_is_a_usage_error_or_a_filter(text: str) -> None:
    try:
        query_filter = read_filter(text)
    except UsageError:
        return
    found(query_filter, [{"metadata": {"a": 1}}])
    to_edge_filter(query_filter)


def test_edge_and_local_mode_agree_on_qdrant_filters(shards: list[Any]) -> None:
    payloads = list(PAYLOADS.values())
    field = models.FieldCondition
    center, corner = models.GeoPoint(lon=13.4, lat=52.5), models.GeoPoint(lon=14, lat=50)
    above_one = models.Filter(must=field(key="k", range=models.Range(gt=1)))
    conditions: list[Any] = [
        field(key="metadata.ok", match=models.MatchValue(value=False)),
        field(key="width", match=models.MatchAny(any=[1, 640])),
        field(key="mime", match=models.MatchExcept(**{"except": ["image/png"]})),
        field(key="caption", match=models.MatchTextAny(text_any="dog beaches")),
        field(key='metadata."sp ace"', match=models.MatchPhrase(phrase="blank")),
        field(key="metadata.date", range=models.DatetimeRange(gte=datetime(2026, 1, 1))),
        field(key="metadata.tags", values_count=models.ValuesCount(gte=2)),
        field(key="metadata.tags", is_empty=True),
        field(key="place", geo_radius=models.GeoRadius(center=center, radius=20_000)),
        field(key="place", geo_bounding_box=models.GeoBoundingBox(top_left=center, bottom_right=corner)),
        models.IsNullCondition(is_null=models.PayloadField(key="caption")),
        models.HasIdCondition(has_id=[0, 2, 99]),
        models.NestedCondition(nested=models.Nested(key="metadata.rows", filter=above_one)),
    ]
    filters = [models.Filter(**{clause: [condition]}) for condition in conditions for clause in ("must", "must_not")]
    filters.append(models.Filter(min_should=models.MinShould(conditions=conditions, min_count=5)))
    for query_filter in filters:
        first, *others = found_by_each(shards, query_filter, payloads)
        assert others == [first] * 2, query_filter
    line = models.GeoLineString(points=[models.GeoPoint(lon=n % 2, lat=n // 2) for n in (0, 1, 2, 0)])
    for lacking in (
        field(key="a b", match=models.MatchPhrase(phrase="x")),
        field(key="place", geo_polygon=models.GeoPolygon(exterior=line)),
    ):
        with pytest.raises(UsageError, match="the filter is not one for Qdrant Edge"):
            to_edge_filter(models.Filter(must=lacking))
