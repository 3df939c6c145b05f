"""A teacher's scores: made once, kept by id and content, and read as labels that the host's losses take."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, concatenate_datasets
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss

from mmtune import ConfigError, ConflictFreeBatchSampler, DatasetError, MissingDocumentError, RetrievalDataset, finetune
from mmtune.inference.teacher import TeacherScores, pair_key, score_rows


class Teacher(CrossEncoder):
    """Scores a page by its brightness and the length of the query, and stops working after some pairs."""

    def __init__(self, path, *, works_for=10**9):
        torch.manual_seed(0)
        super().__init__(path, num_labels=1, device="cpu")
        self.count = 0
        self.works_for = works_for

    def predict(self, inputs, **options):
        if self.count + len(inputs) > self.works_for:
            raise RuntimeError("the power went out")
        self.options = options
        self.count += len(inputs)
        return torch.tensor([self.score(query, page) for query, page in inputs])

    @staticmethod
    def score(query, page):
        return float(np.asarray(page).mean() / 10 - len(query))


@pytest.fixture
def teacher(text_encoder_path):
    return Teacher(text_encoder_path)


@pytest.fixture(scope="module")
def dataset(pages):
    return RetrievalDataset.from_id_rows(pages)


@pytest.fixture(scope="module")
def rows(dataset):
    return dataset.training_rows(2)


def scores_of(rows, teacher, **options):
    return score_rows(rows, teacher, **{"show_progress_bar": False, **options})


def by_id(scores):
    columns = (scores.table[name] for name in ("query_id", "document_id", "score"))
    return {(query_id, document_id): score for query_id, document_id, score in zip(*columns, strict=True)}


def pairs_in(rows):
    ids = rows.with_format(None)[:]
    columns = zip(ids["query_id"], ids["document_id"], ids["negative_document_ids"], strict=True)
    return {(query_id, document_id) for query_id, positive, more in columns for document_id in (positive, *more)}


# ---- scoring


def test_every_pair_of_the_rows_is_scored_once(rows, dataset, teacher, pages):
    scores = by_id(scores_of(rows, teacher, batch_size=5))
    assert set(scores) == pairs_in(rows)
    assert teacher.count == len(scores)
    text_by_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    page_by_id = dict(zip(pages["id"], pages["image"], strict=True))
    for (query_id, document_id), score in scores.items():
        assert score == pytest.approx(Teacher.score(text_by_id[query_id], page_by_id[document_id]))


def test_scores_are_those_before_the_activation(rows, teacher):
    scores_of(rows.select([0]), teacher)
    assert isinstance(teacher.options["activation_fn"], torch.nn.Identity)


def test_copies_of_a_page_and_equal_texts_are_scored_once(pages, teacher):
    rows = pages.cast_column("image", Image(decode=False)).to_list()
    copies = [{**row, "id": f"copy of {row['id']}", "negatives": []} for row in rows]
    for row, copy in zip(rows, copies, strict=True):
        copy["negatives"] = [f"copy of {document_id}" for document_id in row["negatives"] or []]
    both = RetrievalDataset.from_id_rows(Dataset.from_list([*rows, *copies], features=pages.features))
    scores = scores_of(both.training_rows(2), teacher)
    assert teacher.count == len(scores) / 2


def test_a_folder_keeps_the_scores(rows, teacher, tmp_path):
    scores = scores_of(rows, teacher, folder=tmp_path / "scores")
    counted = teacher.count
    assert by_id(scores_of(rows, teacher, folder=tmp_path / "scores")) == by_id(scores)
    assert teacher.count == counted
    assert by_id(TeacherScores.load(tmp_path / "scores")) == by_id(scores)
    assert not [path for path in (tmp_path / "scores").iterdir() if path.name.endswith(".partial")]


def test_an_interrupted_call_goes_on(text_encoder_path, tmp_path):
    # More pairs than a file holds: files of 1,020, which are whole batches.
    ids = [str(at) for at in range(400)]
    negatives = [[str((at + k) % 400) for k in (1, 2)] for at in range(400)]
    dataset = RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"page {at}" for at in ids]}),
        Dataset.from_dict({"query_id": ids, "text": [f"query {at}" for at in ids]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * 400}),
        Dataset.from_dict({"query_id": ids, "document_ids": negatives}),
    )
    rows = dataset.training_rows(2, documents="text")

    def teacher(**options):
        built = Teacher(text_encoder_path, **options)
        built.score = lambda query, page: float(sum(map(ord, f"{query}|{page}")))
        return built

    with pytest.raises(RuntimeError, match="the power went out"):
        scores_of(rows, teacher(works_for=1100), folder=tmp_path, batch_size=5)
    assert len(TeacherScores.load(tmp_path)) == 1020
    second = teacher()
    scores = scores_of(rows, second, folder=tmp_path)
    assert second.count == len(scores) - 1020 == 180
    assert by_id(scores) == by_id(scores_of(rows, teacher()))


def test_more_rows_score_only_what_is_new(dataset, teacher, tmp_path):
    few, more = dataset.training_rows(1), dataset.training_rows(3)
    scores_of(few, teacher, folder=tmp_path)
    scores = scores_of(more, teacher, folder=tmp_path)
    assert teacher.count == len(scores) == len(pairs_in(more))


def test_another_teacher_does_not_mix_in(rows, teacher, tmp_path):
    scores_of(rows, teacher, folder=tmp_path)
    with torch.no_grad():
        next(iter(teacher.parameters())).view(-1)[0] += 1
    with pytest.raises(ConfigError, match="holds scores of another teacher"):
        scores_of(rows, teacher, folder=tmp_path)


def test_a_changed_page_under_the_same_id_is_scored_anew(pages, rows, teacher, tmp_path):
    scores = by_id(scores_of(rows, teacher, folder=tmp_path))
    counted = teacher.count
    changed_rows = pages.cast_column("image", Image(decode=False)).to_list()
    document_id = rows.with_format(None)[0]["document_id"]
    at = list(pages["id"]).index(document_id)
    changed_rows[at]["image"] = {"bytes": changed_rows[at - 1]["image"]["bytes"] + b"!", "path": None}
    changed = RetrievalDataset.from_id_rows(Dataset.from_list(changed_rows, features=pages.features)).training_rows(2)
    again = by_id(scores_of(changed, teacher, folder=tmp_path))
    differing = {pair for pair in again if again[pair] != scores[pair]}
    assert {pair[1] for pair in differing} == {document_id}
    assert teacher.count - counted == len(differing)
    assert by_id(TeacherScores.load(tmp_path)) == again


def test_a_multimodal_reranker_scores_pages(rows, qwen3_vl_path):
    transformer = Transformer(qwen3_vl_path, transformer_task="any-to-any")
    ids = transformer.processor.tokenizer.convert_tokens_to_ids(["1", "0"])
    teacher = CrossEncoder(
        modules=[transformer, LogitScore(*ids)], prompts={"text_to_image": "Does it answer?"}, device="cpu"
    )
    some = rows.select(range(2))
    scores = by_id(scores_of(some, teacher, batch_size=1))
    read, ids = some[0], some.with_format(None)[0]
    expected = teacher.predict(
        [({"text": read["query"]}, read["image"])], prompt_name="text_to_image", activation_fn=torch.nn.Identity()
    )
    assert scores[ids["query_id"], ids["document_id"]] == pytest.approx(float(expected[0]), abs=1e-5)


# ---- labels


def assert_labels_fit(labelled, scores):
    score_by_pair = by_id(scores)
    ids, read = labelled.with_format(None)[:], labelled[:]
    for at, label in enumerate(read["label"]):
        documents = [ids["document_id"][at], *ids["negative_document_ids"][at]]
        assert label == [score_by_pair[ids["query_id"][at], document_id] for document_id in documents]


def test_labels_are_the_scores_of_the_row(rows, teacher):
    scores = scores_of(rows, teacher)
    labelled = scores.label_rows(rows)
    assert list(labelled[0]) == ["query", "image", "negative_0", "negative_1", "label"]
    assert_labels_fit(labelled, scores)
    assert list(rows[0]) == ["query", "image", "negative_0", "negative_1"]


def test_labels_survive_shuffling_and_workers(rows, teacher):
    scores = scores_of(rows, teacher)
    labelled = scores.label_rows(rows)
    assert_labels_fit(labelled.shuffle(seed=1).select(range(7)), scores)
    assert_labels_fit(labelled.train_test_split(5, seed=0)["test"], scores)
    assert_labels_fit(pickle.loads(pickle.dumps(labelled)), scores)
    assert_labels_fit(scores.label_rows(rows.shuffle(seed=2)), scores)


def test_labelling_copies_nothing(rows, teacher):
    labelled = scores_of(rows, teacher).label_rows(rows)
    assert labelled.data.table is rows.data.table
    assert labelled.column_names == rows.column_names


def test_reading_only_ids_gives_ids(rows, teacher):
    labelled = scores_of(rows, teacher).label_rows(rows)
    query_id = labelled.with_format(None)[3]["query_id"]
    kept = labelled.filter(lambda found: found == query_id, input_columns=["query_id"])
    assert len(kept) == 1


def test_rows_that_were_not_scored_are_refused(dataset, rows, teacher):
    scores = scores_of(rows.select(range(3)), teacher)
    with pytest.raises(MissingDocumentError, match="pairs of these rows have no score"):
        scores.label_rows(rows)


def test_ids_with_separators_are_told_apart():
    assert len({pair_key("a", "b:c"), pair_key("a:b", "c"), pair_key("", "a:b:c")}) == 3


def test_scaled_scores(rows, teacher):
    scores = scores_of(rows, teacher)
    assert by_id(scores.scaled(0.5)) == {pair: score / 2 for pair, score in by_id(scores).items()}


# ---- training


def by_formula(loss_class, student, teacher):
    """The losses as they stand in the papers, over scores of shape (rows, documents)."""
    if loss_class is MarginMSELoss:
        margins = [scores[:, :1] - scores[:, 1:] for scores in (student, teacher)]
        return ((margins[0] - margins[1]) ** 2).mean()
    targets = teacher.softmax(dim=1)
    return (targets * (targets.log() - student.log_softmax(dim=1))).sum(dim=1).mean()


@pytest.mark.parametrize("num_negatives", [1, 3])
@pytest.mark.parametrize("loss_class", [DistillKLDivLoss, MarginMSELoss])
def test_the_losses_of_the_host_take_the_labels(dataset, teacher, clip_path, loss_class, num_negatives):
    rows = dataset.training_rows(num_negatives).select(range(4))
    read = scores_of(rows, teacher).label_rows(rows)[:]
    labels = torch.tensor(read.pop("label"))
    assert labels.shape == (4, num_negatives + 1)
    model = SentenceTransformer(clip_path, device="cpu")
    query, *documents = (model.encode(column, convert_to_tensor=True) for column in read.values())
    found = loss_class(model).compute_loss_from_embeddings([query, *documents], labels)
    student = torch.stack([(query * document).sum(dim=1) for document in documents], dim=1)
    torch.testing.assert_close(found, by_formula(loss_class, student, labels))


@pytest.mark.parametrize("loss_class", [DistillKLDivLoss, MarginMSELoss])
def test_finetune_learns_from_a_teacher(dataset, teacher, clip_path, tmp_path, loss_class):
    rows = dataset.training_rows(2)
    labelled = scores_of(rows, teacher).scaled(0.1).label_rows(rows)
    result = finetune(
        clip_path,
        labelled,
        output_dir=tmp_path / "run",
        loss=loss_class,
        num_negatives=2,
        num_train_epochs=4,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    assert isinstance(result.trainer.train_sampler, ConflictFreeBatchSampler)
    losses = [log["loss"] for log in result.trainer.state.log_history if "loss" in log]
    assert min(losses[-2:]) < losses[0]


# ---- bad input


def test_what_is_no_teacher_is_refused(rows, clip_path):
    for wrong in ("my-reranker", SentenceTransformer(clip_path)):
        with pytest.raises(ConfigError, match=r"teacher=.* is no reranker"):
            score_rows(rows, wrong)


def test_rows_without_their_view_are_refused(rows, teacher):
    with pytest.raises(DatasetError, match="with their view, got columns"):
        score_rows(concatenate_datasets([rows.with_format(None)]), teacher)
    with pytest.raises(DatasetError, match="got list"):
        score_rows([], teacher)


def test_rows_without_negatives_are_refused(dataset, teacher):
    with pytest.raises(DatasetError, match="These rows have no negatives"):
        score_rows(dataset.training_rows(0), teacher)


def test_a_folder_of_something_else_is_refused(rows, teacher, tmp_path):
    (tmp_path / "page.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not empty and holds no scores"):
        score_rows(rows, teacher, folder=tmp_path)
    with pytest.raises(ConfigError, match="Pass the folder that was given to score_rows"):
        TeacherScores.load(tmp_path)


def test_a_wrong_batch_size_is_refused(rows, teacher):
    with pytest.raises(ConfigError, match="batch_size=0: expected a whole number"):
        score_rows(rows, teacher, batch_size=0)


def test_scores_that_are_no_numbers_are_refused(rows, teacher):
    teacher.score = lambda query, page: float("nan")
    with pytest.raises(ConfigError, match=r"scores query .* with document .* as nan"):
        scores_of(rows, teacher)


def test_scores_of_other_pages_under_the_same_ids_are_never_taken(dataset, rows, teacher, tmp_path):
    """As with layouts that number their rows: every such dataset has an id "0"."""
    corpus = dataset.corpus
    images = corpus["image"][:]
    columns = {"document_id": corpus["document_id"][:], "image": [*images[1:], images[0]]}
    shifted = Dataset.from_dict(columns).cast_column("image", Image(decode=False))
    other = RetrievalDataset(shifted, dataset.queries, dataset.qrels, dataset.negatives).training_rows(2)
    own = scores_of(rows, teacher, folder=tmp_path / "scores").label_rows(rows)[:]["label"]
    with pytest.raises(MissingDocumentError, match="their text or page has changed since"):
        TeacherScores.load(tmp_path / "scores").label_rows(other)
    changed = scores_of(other, teacher, folder=tmp_path / "scores").label_rows(other)[:]["label"]
    assert changed != own
    loaded = TeacherScores.load(tmp_path / "scores")
    assert loaded.label_rows(rows)[:]["label"] == own
    assert loaded.label_rows(other)[:]["label"] == changed
