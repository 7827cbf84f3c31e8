from cocoa_embed.serve.facets import MAX_VALUES, make_facets


def test_values_decide_the_kind_and_are_written_as_filters_write_them() -> None:
    payloads = [
        {"width": 10 * number, "caption": "one caption", "tags": ["a", "b"], "metadata": {
            "is_new": number > 1, "title": f"title {number}", "a.b": "x", "rating": number + 0.5, "note": "long " * 20,
            "author": f"author {number // 3}", "nothing": None, "nested": {"x": 1}, 'a"b': "x", "a\\b": "x", "": "x",
        }}
        for number in range(90)
    ]  # fmt: skip
    facets = {facet.pop("key"): facet for facet in make_facets(payloads)}
    assert facets["width"] == {"kind": "number", "min": 0, "max": 890}
    assert facets["rating"] == {"kind": "number", "min": 0.5, "max": 89.5}
    assert facets["is_new"] == {"kind": "keyword", "values": [["true", 88], ["false", 2]]}
    assert facets["tags"]["values"] == [["a", 90], ["b", 90]]
    assert facets['"a.b"']["values"] == [["x", 90]]
    assert {facets[key]["kind"] for key in ("caption", "title", "note")} == {"text"}
    assert len(facets["author"]["values"]) == MAX_VALUES < 30
    unnameable = {'"a"b"', '"a\\b"', '""'}
    assert not facets.keys() & {"nothing", "nested", "metadata", *unnameable}


def test_keys_of_most_points_come_first() -> None:
    assert [facet["key"] for facet in make_facets([{"b": 1}, {"a": [1, 2, 3], "b": 1}])] == ["b", "a"]
    assert make_facets([]) == []


def test_a_column_with_the_name_of_a_field_is_offered_as_a_filter_names_it() -> None:
    columns = {"path": "x", "sha256": "y", "revision": 5, "width": 7, "author": "Ann"}
    facets = {facet["key"]: facet for facet in make_facets([{"path": "/a.png", "width": 640, "metadata": columns}])}
    assert facets.keys() == {"author", "width", *(f"metadata.{key}" for key in ("path", "sha256", "revision", "width"))}
    assert facets["metadata.path"]["values"] == [["x", 1]]
    assert (facets["width"]["max"], facets["metadata.width"]["max"]) == (640, 7)
