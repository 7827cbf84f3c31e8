import shutil
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import qdrant_edge as edge
from qdrant_client import QdrantClient, models

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.filters import PAYLOAD_KEYS, parse_filters, payload_path
from cocoa_embed.integrations.qdrant.stores.base import PAYLOAD_INDEXES
from cocoa_embed.integrations.qdrant.stores.edge_filters import to_edge_filter

DAY = 24 * 60 * 60
NEW_YEAR = datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp()
PAYLOADS: dict[str, dict[str, Any]] = {
    "beach": {
        "path": "/photos/Holiday Beach/a.jpg",
        "paths": ["/photos/Holiday Beach/a.jpg", "/copies/a.jpg"],
        "mime": "image/jpeg",
        "width": 1000,
        "height": 800,
        "bytes": 123_456,
        "mtime": NEW_YEAR + 0.5,
        "caption": "A dog on the Beach, at sunset",
        "metadata": {
            "author": "Ann",
            "year": 1900,
            "score": 0.5,
            "ok": True,
            "tags": ["a", "b"],
            "date": "2025-12-31",
            "a.b": "dotted",
            "sp ace": "blank",
            "größe": 7,
            "deep": {"x": [1, 2]},
        },
    },
    "street": {
        "path": "/photos/b.png",
        "paths": ["/photos/b.png"],
        "mime": "image/png",
        "width": 640,
        "height": 480,
        "bytes": 1,
        "mtime": NEW_YEAR - 1,
        "caption": "beaches | and = more",
        "metadata": {
            "author": ["Bob", "Ann"],
            "year": "1900",
            "score": 1.0,
            "ok": "true",
            "tags": ["c"],
            "date": "2026-01-01T12:00:00+01:00",
            "width": 5,
            "rows": [{"k": 1}, {"k": 2}],
            "big": 2**60 + 1,
            "code": "123456789012345678901234",
        },
    },
    "plain": {
        "path": "/photos/c\\udcff.gif",
        "paths": ["/photos/c\\udcff.gif"],
        "mime": "image/gif",
        "width": 1,
        "height": 1,
        "bytes": 0,
        "mtime": NEW_YEAR + DAY,
        "caption": None,
        "metadata": {"author": "", "year": 1900.5, "ok": False, "tags": [], "score": None},
    },
    "foreign": {},
}
EXPECTED = {
    "mime=image/png": "street",
    "mime!=image/png": "beach plain foreign",
    "mime=image/png|image/gif": "street plain",
    "mime!=image/png|image/gif": "beach foreign",
    "mime = image/png": "street",
    "mime=Image/PNG": "",
    "path=/photos/b.png": "street",
    "path=/photos/c\udcff.gif": "plain",
    "paths=/copies/a.jpg": "beach",
    "path~holiday": "beach",
    "width>=1000": "beach",
    "width>640": "beach",
    "width<640": "plain",
    "width<=640": "street plain",
    "width=640": "street",
    "width=640.0": "street",
    "width=1e3|1": "beach plain",
    "width!=640": "beach plain foreign",
    "metadata.width=5": "street",
    "mtime<2026-01-01": "street",
    "mtime>=2026-01-01": "beach plain",
    "mtime=2026-01-01": "beach",
    "mtime=2026-01-02": "plain",
    "mtime!=2026-01-01": "street plain foreign",
    "mtime=2026-01-01|2026-01-02": "beach plain",
    "mtime<2026-01-01T01:00:00+01:00": "street",
    "mtime<=2026-01-01T00:00:00.5Z": "beach street",
    "mtime<=2026-01-01 00:00:00.4": "street",
    f"mtime={NEW_YEAR - 1}": "street",
    f"mtime>{NEW_YEAR}": "beach plain",
    "caption~beach": "beach",
    "caption~BEACH dog": "beach",
    'caption~"sunset, at dog"': "beach",
    "caption~each": "",
    "caption~cat|beaches": "street",
    "caption!~beach": "street plain foreign",
    'caption="beaches | and = more"': "street",
    "caption": "beach street",
    "!caption": "plain foreign",
    "author=Ann": "beach street",
    "author!=Ann": "plain foreign",
    "author=Bob|Zoe": "street",
    'author=""': "plain",
    "author": "beach street plain",
    "metadata.author=Ann": "beach street",
    "year=1900": "beach street",
    'year="1900"': "street",
    "year>1900": "plain",
    "year>=1900": "beach plain",
    "score=1": "street",
    "score=0.5|1": "beach street",
    "score": "beach street",
    "!score": "plain foreign",
    "ok=true": "beach street",
    'ok="true"': "street",
    "ok=false": "plain",
    "tags=a": "beach",
    "tags=a|c": "beach street",
    "tags!=a": "street plain foreign",
    "tags": "beach street",
    "!tags": "plain foreign",
    "date<2026-01-01": "beach",
    "date>=2026-01-01T11:00Z": "street",
    '"a.b"=dotted': "beach",
    "sp ace=blank": "beach",
    '"sp ace"=blank': "beach",
    "größe=7": "beach",
    "deep.x=2": "beach",
    "rows[].k=2": "street",
    "rows[0].k=2": "",
    f"big={2**60 + 1}": "street",
    f"big={2**60}": "",
    "code=123456789012345678901234": "street",
    "unknown": "",
    "!unknown": "beach street plain foreign",
}
WRONG = {
    "": "is no filter; write KEY=VALUE",
    "=": "is no filter",
    "=x": "is no filter",
    "!": "is no filter",
    "!mime=x": "is no filter",
    "mime=": "a value is missing",
    "mime=a||b": "a value is missing",
    "mime=a|": "a value is missing",
    'mime="a': "no text in double quotes",
    'mime="a"b': "no text in double quotes",
    "a..b=1": "is no key",
    ".a=1": "is no key",
    "a.=1": "is no key",
    "a[x]=1": "is no key",
    '""=1': "is no key",
    'a"b=1': "is no (key|filter)",
    "width=wide": "'wide' is no number",
    "width=true": "'true' is no number",
    'width="640"': "'640' is no number",
    "width<1e999": "is no number",
    "year<old": "is no number and no date such as 2026-01-31",
    "mtime<yesterday": "no number of seconds for mtime, and no date such as",
    "mtime=2026-13-01": "no number of seconds for mtime, and no date such as",
    "path<b": "path is a text; compare it by = or != or ~",
    "width~6": "width is a number; compare it by",
    "caption~!!": "there is no word in",
}


def point_id(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


@pytest.fixture(scope="module")
def client() -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    client.create_collection("c", vectors_config=models.VectorParams(size=1, distance=models.Distance.COSINE))
    points = [
        models.PointStruct(id=point_id(number), vector=[1.0], payload=payload)
        for number, payload in enumerate(PAYLOADS.values())
    ]
    client.upsert("c", points)
    yield client
    client.close()


def make_shard(folder: Path, payloads: list[dict[str, Any]], *, indexed: bool) -> Any:  # noqa: ANN401
    folder.mkdir()
    vectors = edge.EdgeVectorParams(size=1, distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=vectors))
    kinds = edge.PayloadSchemaType
    schemas = {"keyword": kinds.Keyword, "integer": kinds.Integer, "float": kinds.Float, "text": kinds.Text}
    for field, kind in PAYLOAD_INDEXES.items() if indexed else ():
        shard.update(edge.UpdateOperation.create_field_index(field, schemas[kind]))
    points = [edge.Point(point_id(number), [1.0], payload) for number, payload in enumerate(payloads)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    return shard


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "indexed"])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("edge") / "shard"
    shard = make_shard(folder, list(PAYLOADS.values()), indexed=request.param)
    yield shard
    shard.close()
    shutil.rmtree(folder)


def found_by_client(client: QdrantClient, query_filter: models.Filter) -> set[int]:
    records, _ = client.scroll("c", scroll_filter=query_filter, limit=1000)
    return {uuid.UUID(str(record.id)).int - 1 for record in records}


def found_by_edge(shard: Any, query_filter: models.Filter) -> set[int]:  # noqa: ANN401
    records, _ = shard.scroll(edge.ScrollRequest(limit=1000, filter=to_edge_filter(query_filter)))
    return {uuid.UUID(str(record.id)).int - 1 for record in records}


def numbers(names: str) -> set[int]:
    return {list(PAYLOADS).index(name) for name in names.split()}


@pytest.mark.parametrize("text", EXPECTED)
def test_a_filter_lets_through_what_it_says(client: QdrantClient, text: str) -> None:
    assert found_by_client(client, parse_filters([text])) == numbers(EXPECTED[text])


def test_a_filter_lets_through_the_same_in_edge_with_and_without_indexes(shard: Any) -> None:  # noqa: ANN401
    for text, names in EXPECTED.items():
        assert found_by_edge(shard, parse_filters([text])) == numbers(names), text


def test_a_filter_survives_its_way_to_a_server() -> None:
    for text in EXPECTED:
        query_filter = parse_filters([text])
        assert models.Filter.model_validate_json(query_filter.model_dump_json()) == query_filter


def test_all_filters_have_to_hold(client: QdrantClient) -> None:
    assert found_by_client(client, parse_filters([])) == numbers("beach street plain foreign")
    assert found_by_client(client, parse_filters(["width>1", "author=Ann", "mime!=image/png"])) == numbers("beach")
    assert found_by_client(client, parse_filters(["width>1", "width<1000"])) == numbers("street")
    assert found_by_client(client, parse_filters(["!author", "!caption"])) == numbers("foreign")


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_filter_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match=WRONG[text]) as told:
        parse_filters(["mime=a", text])
    assert text in str(told.value).replace("\\'", "'") or not text


def test_every_key_of_the_payload_means_itself_and_others_a_column() -> None:
    assert {payload_path(key, key) for key in PAYLOAD_KEYS} == PAYLOAD_KEYS
    assert payload_path("", "width2") == "metadata.width2"
    assert payload_path("", '"path[x]"') == 'metadata."path[x]"'
    assert payload_path("", "paths[0]") == "paths[0]"
    assert payload_path("", "metadata.path") == "metadata.path"


NAMES = st.text(st.characters(exclude_characters='"', exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip)
SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)


def as_value(scalar: str | int | float | bool) -> str:
    """Return a scalar as it is written in a filter."""
    if isinstance(scalar, str):
        return '"' + scalar.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").translate(CONTROLS) + '"'
    return str(scalar).lower() if isinstance(scalar, bool) else repr(scalar)


CONTROLS = {number: f"\\u{number:04x}" for number in range(32) if number != 10}


@given(column=NAMES, value=SCALARS)
def test_any_column_is_found_by_its_value_and_by_no_other(column: str, value: str | int | float | bool) -> None:
    assume(column not in PAYLOAD_KEYS)
    payloads = [{"metadata": {column: value}}, {"metadata": {column: [None, value]}}, {"metadata": {column: "other"}}]
    assume(value != "other")
    matching = evaluate(payloads, f'"{column}"={as_value(value)}')
    assert matching == {0, 1}
    assert evaluate(payloads, f'"{column}"!={as_value(value)}') == {2}
    assert evaluate(payloads, f'"{column}"={as_value(value)}|"other"') == {0, 1, 2}
    assert evaluate(payloads, f'"{column}"') == {0, 1, 2}
    assert evaluate(payloads, f'!"{column}"') == set()


@given(value=st.floats(-1e15, 1e15), bound=st.floats(-1e15, 1e15), is_whole=st.booleans())
def test_numbers_are_compared_as_python_compares_them(value: float, bound: float, is_whole: bool) -> None:
    stored: float | int = int(value) if is_whole else value
    payloads = [{"width": stored, "metadata": {"x": stored}}]
    wanted = {
        "<": stored < bound,
        "<=": stored <= bound,
        ">": stored > bound,
        ">=": stored >= bound,
        "=": stored == bound,
        "!=": stored != bound,
    }
    for key in ("width", "x"):
        for operator, holds in wanted.items():
            assert evaluate(payloads, f"{key}{operator}{bound!r}") == ({0} if holds else set())
        assert evaluate(payloads, f"{key}={stored!r}") == {0}


@given(st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)), st.integers(-10, 10))
def test_a_time_of_a_file_is_compared_in_seconds_of_utc(moment: datetime, seconds: int) -> None:
    stamp = moment.replace(tzinfo=timezone.utc).timestamp()
    payloads = [{"mtime": stamp + seconds}]
    assert evaluate(payloads, f"mtime<{moment.isoformat()}") == ({0} if seconds < 0 else set())
    assert evaluate(payloads, f"mtime>={moment.isoformat(' ')}Z") == ({0} if seconds >= 0 else set())
    assert evaluate(payloads, f"mtime={moment.isoformat()}+00:00") == ({0} if seconds == 0 else set())


@given(st.text(max_size=30))
@settings(max_examples=300)
def test_any_text_is_a_filter_or_wrong_usage(text: str) -> None:
    try:
        query_filter = parse_filters([text])
    except UsageError:
        return
    query_filter.model_dump_json()
    evaluate([{}], text)


@given(st.text('ab.[]0"=!<>~| 1-', max_size=12))
@settings(max_examples=500)
def test_any_filter_that_is_read_is_one_for_every_home(text: str) -> None:
    try:
        query_filter = parse_filters([text])
    except UsageError:
        return
    evaluate([{"metadata": {"a": 1}}], text)
    to_edge_filter(query_filter)


def evaluate(payloads: list[dict[str, Any]], text: str) -> set[int]:
    """Return the payloads that a filter lets through, by qdrant-client's own evaluation."""
    from qdrant_client.local.payload_filters import check_filter

    query_filter = parse_filters([text])
    return {number for number, payload in enumerate(payloads) if check_filter(query_filter, payload, 0, {})}


def test_every_supported_condition_means_the_same_in_edge(client: QdrantClient, shard: Any) -> None:  # noqa: ANN401
    field = models.FieldCondition
    conditions: list[Any] = [
        field(key="metadata.ok", match=models.MatchValue(value=True)),
        field(key="metadata.ok", match=models.MatchValue(value=False)),
        field(key="width", match=models.MatchValue(value=1)),
        field(key="width", match=models.MatchAny(any=[1, 640])),
        field(key="mime", match=models.MatchExcept(**{"except": ["image/png"]})),
        field(key="caption", match=models.MatchTextAny(text_any="dog beaches")),
        field(key="metadata.date", range=models.DatetimeRange(gte=datetime(2026, 1, 1))),
        field(key="metadata.date", range=models.DatetimeRange(lt=datetime(2026, 1, 1, 11, 30, tzinfo=timezone.utc))),
        field(key="metadata.tags", values_count=models.ValuesCount(gte=2)),
        field(key="caption", is_null=True),
        field(key="metadata.tags", is_empty=True),
        models.IsNullCondition(is_null=models.PayloadField(key="caption")),
        models.HasIdCondition(has_id=[point_id(0), point_id(2), point_id(99), 7]),
        models.NestedCondition(
            nested=models.Nested(
                key="metadata.rows", filter=models.Filter(must=[field(key="k", match=models.MatchValue(value=2))])
            )
        ),
        models.Filter(
            should=[field(key="width", range=models.Range(lt=2)), field(key="bytes", range=models.Range(gt=9))]
        ),
    ]
    filters = [models.Filter(must=[condition]) for condition in conditions]
    filters += [models.Filter(must_not=condition) for condition in conditions]
    filters += [models.Filter(min_should=models.MinShould(conditions=conditions, min_count=count)) for count in (2, 5)]
    for query_filter in filters:
        assert found_by_edge(shard, query_filter) == found_by_client(client, query_filter), query_filter


def test_a_condition_that_edge_is_not_given_is_wrong_usage() -> None:
    center = models.GeoPoint(lon=0, lat=0)
    near = models.FieldCondition(key="place", geo_radius=models.GeoRadius(center=center, radius=1))
    with pytest.raises(UsageError, match="no GeoRadius here; use a Qdrant server"):
        to_edge_filter(models.Filter(must=[models.Filter(should=near)]))
    phrase = models.FieldCondition(key="a b", match=models.MatchPhrase(phrase="x"))
    with pytest.raises(UsageError, match="a filter is not one for Qdrant Edge"):
        to_edge_filter(models.Filter(must=phrase))
