import io
from itertools import combinations

import pytest
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from mmtune import ConfigError, DatasetError, RetrievalDataset

pytestmark = pytest.mark.filterwarnings("ignore:.* queries are left to train on", "ignore:num_negatives=2 is not used")


def page(number: int) -> dict:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def tables(
    content: list[int],
    texts: list[str],
    qrels: list[tuple[int, int]],
    negatives: list[list[int]] | None = None,
    groups: list | None = None,
) -> RetrievalDataset:
    """Document k is ``d<k>`` with page ``content[k]``; query k is ``q<k>``."""
    columns = {"document_id": [f"d{k}" for k in range(len(content))], "image": [page(number) for number in content]}
    if groups is not None:
        columns["source"] = groups
    judged = {
        "query_id": [f"q{query}" for query, _ in qrels],
        "document_id": [f"d{document}" for _, document in qrels],
        "score": [1 + k % 3 for k in range(len(qrels))],
    }
    listed = None
    if negatives is not None:
        listed = Dataset.from_dict(
            {
                "query_id": [f"q{k}" for k in range(len(negatives))],
                "document_ids": [[f"d{document}" for document in row] for row in negatives],
            }
        )
    return RetrievalDataset(
        Dataset.from_dict(columns).cast_column("image", Image()),
        Dataset.from_dict({"query_id": [f"q{k}" for k in range(len(texts))], "text": texts}),
        Dataset.from_dict(judged),
        listed,
    )


def independent(count: int, **options) -> RetrievalDataset:
    """``count`` queries that share nothing."""
    numbers = list(range(count))
    return tables(numbers, [f"ask {k}" for k in numbers], [(k, k) for k in numbers], **options)


def query_ids(dataset: RetrievalDataset) -> set[str]:
    return set(dataset.queries["query_id"])


def tied_sets(content, texts, qrels, groups) -> list[set[int]]:
    """By brute force: queries that share a page, a text or a group, and whatever these share."""
    marks = {
        query: {("text", texts[query])}
        | {("page", content[d]) for q, d in qrels if q == query}
        | {("group", groups[d]) for q, d in qrels if q == query and groups is not None and groups[d] is not None}
        for query in {query for query, _ in qrels}
    }
    sets: list[tuple[set[int], set]] = []
    for query, mark in marks.items():
        touching = [one for one in sets if one[1] & mark]
        sets = [one for one in sets if one not in touching]
        queries, merged = {query}, set(mark)
        for one in touching:
            queries |= one[0]
            merged |= one[1]
        sets.append((queries, merged))
    return [queries for queries, _ in sets]


def best_size(sizes: list[int], limit: int) -> int:
    """The most queries that whole sets can give without passing the limit or taking all of them."""
    sums = {sum(chosen) for k in range(1, len(sizes)) for chosen in combinations(sizes, k)}
    return max((total for total in sums if total <= limit), default=0)


@st.composite
def small_data(draw) -> tuple:
    content = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    texts = [draw(st.sampled_from(["same", f"ask {k}", f"ask {k}"])) for k in range(draw(st.integers(1, 8)))]
    pair = st.tuples(st.integers(0, len(texts) - 1), st.integers(0, len(content) - 1))
    qrels = draw(st.lists(pair, min_size=1, max_size=9, unique=True))
    group = st.sampled_from([None, "a", "b", "c", "d"])
    groups = draw(st.none() | st.lists(group, min_size=len(content), max_size=len(content)))
    row = st.lists(st.integers(0, len(content) - 1), max_size=3)
    negatives = draw(st.none() | st.lists(row, min_size=len(texts), max_size=len(texts)))
    return content, texts, qrels, negatives, groups


@given(data=small_data(), eval_queries=st.integers(1, 9), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition_that_shares_nothing(data, eval_queries, seed):
    content, texts, qrels, _, groups = data
    dataset = tables(*data)
    group_column = None if groups is None else "source"
    sets = tied_sets(content, texts, qrels, groups)
    expected = best_size([len(one) for one in sets], eval_queries)
    if not expected:
        with pytest.raises(DatasetError, match=r"No split of \d+ queries"):
            dataset.split(eval_queries, seed=seed, group_column=group_column)
        return
    train, evaluation = dataset.split(eval_queries, seed=seed, group_column=group_column)
    assert len(evaluation) == expected
    assert query_ids(train) | query_ids(evaluation) == query_ids(dataset)
    assert not query_ids(train) & query_ids(evaluation)
    sides = [
        {(int(row["query_id"][1:]), int(row["document_id"][1:])) for row in part.qrels} for part in (train, evaluation)
    ]
    assert sides[0] | sides[1] == set(qrels)
    relevant = [{document for _, document in side} for side in sides]
    asked = [{texts[query] for query, _ in side} for side in sides]
    assert not {content[d] for d in relevant[0]} & {content[d] for d in relevant[1]}
    assert not asked[0] & asked[1]
    if groups is not None:
        assert not ({groups[d] for d in relevant[0]} & {groups[d] for d in relevant[1]}) - {None}


@given(data=small_data(), eval_queries=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_both_sides_keep_what_their_queries_need(data, eval_queries):
    content, _, _, negatives, _ = data
    dataset = tables(*data)
    try:
        sides = dataset.split(eval_queries)
    except DatasetError:
        return
    held_out = {content[int(document[1:])] for document in sides[1].qrels["document_id"]}
    kept = [f"d{k}" for k, number in enumerate(content) if number not in held_out]
    assert sides[0].corpus["document_id"][:] == kept
    taken_out = 0
    for side in sides:
        pages = {row["document_id"]: row["image"]["bytes"] for row in side.corpus}
        assert all(pages[f"d{k}"] == page(content[k])["bytes"] for k in range(len(content)) if f"d{k}" in pages)
        assert set(side.qrels["document_id"]) <= set(pages)
        listed = {} if side.negatives is None else {row["query_id"]: row["document_ids"] for row in side.negatives}
        for query_id in query_ids(side):
            expected = [] if negatives is None else [f"d{k}" for k in negatives[int(query_id[1:])]]
            allowed = [name for name in expected if side is sides[1] or name in kept]
            assert listed.get(query_id, []) == allowed
            taken_out += len(expected) - len(allowed)
    assert sides[0].notes.held_out_negatives == taken_out
    used = set(sides[1].qrels["document_id"]) | {
        document for row in sides[1].negatives or [] for document in row["document_ids"]
    }
    assert set(sides[1].corpus["document_id"]) == used


@given(data=small_data(), eval_queries=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_a_side_knows_the_same_relevance_as_if_it_were_built_anew(data, eval_queries):
    try:
        sides = tables(*data).split(eval_queries)
    except DatasetError:
        return
    for side in sides:
        anew = RetrievalDataset(side.corpus, side.queries, side.qrels, side.negatives)
        for num_negatives in (0, 2):
            assert ids_of(side, num_negatives) == ids_of(anew, num_negatives)


def ids_of(dataset: RetrievalDataset, num_negatives: int) -> dict | str:
    try:
        return dataset.training_rows(num_negatives, on_short="drop").with_format(None)[:]
    except DatasetError as error:
        return str(error)


def test_scores_and_columns_follow_their_queries():
    dataset = RetrievalDataset(
        Dataset.from_dict({"document_id": ["a", "b"], "text": ["of a", "of b"], "source": ["x", "y"]}),
        Dataset.from_dict({"query_id": ["q", "r"], "text": ["ask q", "ask r"], "language": ["en", "de"]}),
        Dataset.from_dict({"query_id": ["q", "r"], "document_id": ["a", "b"], "score": [3, 2]}),
    )
    for side in dataset.split(1):
        expected = ("en", "a", 3) if query_ids(side) == {"q"} else ("de", "b", 2)
        assert (side.queries[0]["language"], side.qrels[0]["document_id"], side.qrels[0]["score"]) == expected


def test_a_split_depends_on_the_seed_alone():
    chosen = [frozenset(query_ids(independent(40).split(10, seed=seed)[1])) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) == 3


def test_a_split_is_random_and_not_the_first_rows():
    _, evaluation = independent(40).split(10)
    assert query_ids(evaluation) != {f"q{k}" for k in range(10)}


def test_as_many_as_allowed_where_sets_of_several_sizes_must_be_combined():
    # sets of 5, 5 and 3 queries: 8 can be had, and 9 cannot
    qrels = [(query, 0 if query < 5 else 1 if query < 10 else 2) for query in range(13)]
    dataset = tables([0, 1, 2], [f"ask {k}" for k in range(13)], qrels)
    for seed in range(6):
        assert len(dataset.split(9, seed=seed)[1]) == 8
        assert len(dataset.split(4, seed=seed)[1]) == 3


@pytest.mark.parametrize("eval_queries", [2, 3, 100])
def test_asking_for_all_or_more_leaves_something_to_train_on(eval_queries):
    train, evaluation = independent(3).split(eval_queries)
    assert (len(train), len(evaluation)) == (1, 2)


@pytest.mark.parametrize(
    ("dataset", "tie"),
    [
        (tables([0], ["x", "y"], [(0, 0), (1, 0)]), "the document 'd0'"),
        (tables([0, 0], ["x", "y"], [(0, 0), (1, 1)]), "the document 'd0'"),
        (tables([0, 1], ["x", "x"], [(0, 0), (1, 1)]), "the text 'x'"),
    ],
    ids=["page", "copy", "text"],
)
def test_an_impossible_split_names_what_ties(dataset, tie):
    with pytest.raises(DatasetError, match=rf"No split of 2 queries.*'q0', 'q1' and is tied by {tie}"):
        dataset.split(1)


def test_an_impossible_split_by_group_names_the_queries():
    dataset = independent(3, groups=["one", "one", "one"])
    with pytest.raises(DatasetError, match=r"No split of 3 queries.*'q0', 'q1', 'q2' and is tied by the group 'one'"):
        dataset.split(1, group_column="source")
    assert len(dataset.split(1)[1]) == 1


def test_one_query_can_not_be_split():
    with pytest.raises(DatasetError, match=r"No split of 1 queries"):
        independent(1).split(1)


@pytest.mark.parametrize("groups", [[1, 1, 2, 2], ["x", "x", None, None], [None] * 4, [True, True, False, False]])
def test_groups_can_be_of_any_simple_type(groups):
    train, evaluation = independent(4, groups=groups).split(2, group_column="source")
    assert (len(train), len(evaluation)) == (2, 2)
    if groups[0] is not None:
        assert query_ids(train) in ({"q0", "q1"}, {"q2", "q3"}) or groups[3] is None


def test_groups_that_are_lists_are_a_named_error():
    with pytest.raises(DatasetError, match=r"'source'.*list"):
        independent(2, groups=[["a"], ["b"]]).split(1, group_column="source")


def test_a_group_column_that_is_not_there_is_named():
    with pytest.raises(DatasetError, match=r"no column 'pdf'; it has \['document_id', 'image'\]"):
        independent(2).split(1, group_column="pdf")


@pytest.mark.parametrize("eval_queries", [0, -3])
def test_eval_queries_must_be_positive(eval_queries):
    with pytest.raises(ConfigError, match=rf"eval_queries={eval_queries}"):
        independent(3).split(eval_queries)


def test_generated_pages_split_into_sides_that_read_their_own_pages(pages):
    dataset = RetrievalDataset.from_id_rows(pages)
    bytes_by_id = {row["document_id"]: row["image"]["bytes"] for row in dataset.corpus}
    train, evaluation = dataset.split(6)
    assert (len(train), len(evaluation)) == (18, 6)
    for side in (train, evaluation):
        assert all(bytes_by_id[row["document_id"]] == row["image"]["bytes"] for row in side.corpus)
        assert len(side.training_rows(2)) == len(side)


def many(num_queries: int) -> RetrievalDataset:
    numbers = [str(k) for k in range(num_queries)]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": numbers, "text": [f"page {k}" for k in numbers], "pdf": ["a"] * num_queries}),
        Dataset.from_dict({"query_id": numbers, "text": [f"ask {k}" for k in numbers]}),
        Dataset.from_dict({"query_id": numbers, "document_id": numbers, "score": [1] * num_queries}),
    )


def test_a_training_side_smaller_than_the_evaluation_warns_with_a_number_that_would_do():
    with pytest.warns(
        UserWarning, match=r"^1 queries are left to train on, and 19 are .*of 20.*eval_queries=4 would do\.$"
    ):
        many(20).split(500)


def test_an_even_split_is_no_warning(recwarn):
    many(20).split(10)
    assert not recwarn.list


def test_where_one_group_ties_everything_no_number_is_named():
    with pytest.raises(DatasetError, match=r"tied into 1 sets.*the group 'a'\. Add data, or name a finer group_column"):
        many(6).split(2, group_column="pdf")


def test_the_error_names_the_number_of_queries_that_would_do():
    data = many(6)
    corpus = data.corpus.remove_columns("pdf").add_column("pdf", ["a"] * 3 + ["b"] * 3)
    grouped = RetrievalDataset(corpus, data.queries, data.qrels)
    with pytest.raises(DatasetError, match=r"Pass eval_queries=3 or more"):
        grouped.split(2, group_column="pdf")
    assert len(grouped.split(3, group_column="pdf")[1]) == 3


def of_files(*files: str, **options) -> RetrievalDataset:
    """A query for each page, of files with these names."""
    dataset = independent(len(files), groups=list(files), **options)
    numbered = dataset.corpus.add_column("page_number", list(range(len(files))))
    return RetrievalDataset(numbered, dataset.queries, dataset.qrels, dataset.negatives)


def test_pages_of_files_are_split_by_file_unless_another_column_is_named():
    dataset = of_files(*"aaabbbccc")
    train, evaluation = dataset.split(4)
    assert len(evaluation) == 3
    assert len(set(evaluation.corpus["source"])) == 1
    assert set(train.corpus["source"]) == set("abc") - set(evaluation.corpus["source"])
    by_page = dataset.split(4, group_column="document_id")
    assert len(by_page[1]) == 4
    with pytest.raises(DatasetError, match=r"the group 'a'.* 'document_id' splits by page"):
        of_files(*"aaa").split(1)
    plain = independent(9, groups=list("aaabbbccc"))
    assert len(plain.split(4)[1]) == 4, "a column of that name alone does not say that these are files"


@pytest.mark.parametrize("seed", range(5))
def test_three_sides_share_nothing(seed):
    negatives = [[(k + 1) % 30, (k + 2) % 30] for k in range(30)]
    dataset = of_files(*[str(k // 3) for k in range(30)], negatives=negatives)
    train, evaluation, test = dataset.split(6, test_queries=9, seed=seed)
    assert [len(side) for side in (train, evaluation, test)] == [15, 6, 9]
    files = [set(side.qrels["document_id"]) for side in (train, evaluation, test)]
    number = {name: int(name[1:]) // 3 for name in dataset.corpus["document_id"]}
    for one, other in combinations(files, 2):
        assert not {number[name] for name in one} & {number[name] for name in other}
    for side, later in ((train, files[1] | files[2]), (evaluation, files[2])):
        assert not set(side.corpus["document_id"]) & later
    with pytest.raises(DatasetError, match="No split"):
        dataset.split(1, test_queries=9)


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.5, "3", True])
def test_queries_of_a_third_side_are_a_whole_number(value):
    with pytest.raises(ConfigError, match="test_queries="):
        independent(6).split(1, test_queries=value)


@pytest.mark.parametrize("seed", range(5))
def test_each_language_gets_its_share(seed):
    dataset = of_files(*[str(k // 2) for k in range(120)])
    languages = ["en"] * 60 + ["de"] * 40 + [None] * 20
    queries = dataset.queries.add_column("language", languages)
    dataset = RetrievalDataset(dataset.corpus, queries, dataset.qrels)
    train, evaluation = dataset.split(24, seed=seed, stratify_column="language")
    held_out = evaluation.queries["language"][:]
    assert [held_out.count(value) for value in ("en", "de", None)] == [12, 8, 4]
    assert len(train) == 96
    drawn = {
        tuple(sorted(dataset.split(24, seed=other, stratify_column="language")[1].queries["text"])) for other in (1, 2)
    }
    assert len(drawn) == 2
    sides = dataset.split(12, test_queries=12, seed=seed, stratify_column="language")
    for side in sides[1:]:
        assert [side.queries["language"][:].count(value) for value in ("en", "de", None)] == [6, 4, 2]


def test_strata_that_do_not_fit_leave_the_size_as_it_is():
    dataset = independent(10)
    dataset = RetrievalDataset(dataset.corpus, dataset.queries.add_column("kind", list("abcdefghij")), dataset.qrels)
    assert len(dataset.split(3, stratify_column="kind")[1]) == 3
    with pytest.raises(DatasetError, match=r"stratify_column='language': the table of queries has no column"):
        dataset.split(3, stratify_column="language")


@given(
    groups=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=4),
    content=st.lists(st.integers(0, 7), min_size=10, max_size=10),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_near_copies_stay_on_one_side_with_the_copies_of_their_pages(groups, content, seed):
    dataset = tables(content, [f"ask {k}" for k in range(6)], [(k, k) for k in range(6)])
    together = [[f"d{k}" for k in group] for group in groups]
    marks = {k: {k, *(other for other in range(10) if content[other] == content[k])} for k in range(10)}
    for _ in range(10):
        for group in groups:
            joined = set().union(*(marks[k] for k in group))
            for k in joined:
                marks[k] = marks[k] | joined
    try:
        train, evaluation = dataset.split(3, seed=seed, together=together)
    except DatasetError as error:
        if "No split" not in str(error):
            raise
        return
    answers = {int(name[1:]) for name in evaluation.qrels["document_id"]}
    held_out = set().union(*(marks[k] for k in answers))
    assert {int(name[1:]) for name in train.corpus["document_id"]} == set(range(10)) - held_out


def test_three_sides_keep_near_copies_apart():
    dataset = independent(9)
    together = [["d0", "d1"], ["d1", "d2"], ["d3", "d4"]]
    for seed in range(5):
        sides = dataset.split(3, test_queries=3, seed=seed, together=together)
        for ids in ({"d0", "d1", "d2"}, {"d3", "d4"}):
            assert sum(bool(ids & set(side.qrels["document_id"])) for side in sides) == 1


@pytest.mark.parametrize(
    ("together", "error", "message"),
    [
        ([["d0", "d99"]], DatasetError, "'d99', which is the id of no document"),
        ([["d0", 5]], DatasetError, "'?5'?, which is the id of no document"),
        *[(value, ConfigError, "together=") for value in ("d0", ["d0", "d1"], [5], 5, None)],
    ],
)
def test_what_stays_together_is_named_by_lists_of_ids(together, error, message):
    with pytest.raises(error, match=message):
        independent(4).split(1, together=together)


def test_what_ties_near_copies_is_named():
    with pytest.raises(DatasetError, match="tied by the set of copies of 'd0'"):
        independent(3).split(1, together=[["d0", "d1", "d2"]])
