"""Mining of large corpora: neighbours in a file, several processes, kills, and folders that can't be written to."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder

from mmtune import ConfigError, DatasetError, RetrievalDataset, mine_hard_negatives
from mmtune.data import neighbors
from mmtune.inference import mining
from test_mining import ChosenScores, VectorsInTexts, mine_texts, of_files, text_dataset, vectors

# ---- neighbours in a file


@pytest.fixture
def file_of_pages():
    """Ten pages of a file, alike in the order of their numbers; the third is relevant."""
    return of_files(text_dataset(vectors(*range(10, 0, -1)), ["1"], [(0, 2)]), ["a.pdf"] * 10, list(range(1, 11)))


@pytest.mark.parametrize(
    ("reach", "expected"), [(0, ["d0", "d1", "d3", "d4"]), (1, ["d0", "d4", "d5", "d6"]), (2, ["d5", "d6", "d7", "d8"])]
)
def test_neighbors_of_a_relevant_page_are_no_negatives(file_of_pages, reach, expected):
    assert mine_texts(file_of_pages, VectorsInTexts(), relative_margin=None, neighbors=reach) == {"q0": expected}


def test_neighbors_take_no_room_of_the_ranking(file_of_pages):
    found = mine_texts(file_of_pages, VectorsInTexts(), relative_margin=None, num_negatives=2, range_max=2)
    assert found == {"q0": ["d0", "d4"]}


def test_what_was_left_out_is_counted(file_of_pages, caplog):
    options = {"documents": "text", "relative_margin": None, "show_progress_bar": False}
    with caplog.at_level(logging.INFO, logger=mining.__name__):
        mined = mine_hard_negatives(file_of_pages, VectorsInTexts(), **options)
    assert "Left out 2 candidates of 1 queries" in caplog.text
    assert mined.notes.neighbors_left_out == 2
    assert mine_hard_negatives(mined, VectorsInTexts(), neighbors=0, **options).notes.neighbors_left_out == 0


def test_a_copy_of_a_neighbor_elsewhere_is_no_negative():
    dataset = text_dataset(vectors(9, 8, 8, 1), ["1"], [(0, 0)])
    filed = of_files(dataset, ["a.pdf", "a.pdf", "b.pdf", "b.pdf"], [1, 2, 40, 41])
    assert mine_texts(filed, VectorsInTexts(), relative_margin=None) == {"q0": ["d3"]}


def test_other_documents_on_a_relevant_page_are_no_negatives():
    dataset = text_dataset(vectors(9, 8, 7), ["1"], [(0, 0)])
    filed = of_files(dataset, ["a.pdf"] * 3, [5, 5, 7])
    assert mine_texts(filed, VectorsInTexts(), relative_margin=None) == {"q0": ["d2"]}
    assert mine_texts(filed, VectorsInTexts(), relative_margin=None, neighbors=0) == {"q0": ["d1", "d2"]}


def test_a_distance_beyond_all_files_leaves_the_whole_file_out(file_of_pages):
    for reach in (np.int64(100), 10**30):
        assert mine_texts(file_of_pages, VectorsInTexts(), relative_margin=None, neighbors=reach) == {"q0": []}


def test_pages_of_shuffled_files_with_odd_names_are_known(file_of_pages):
    corpus = file_of_pages.corpus.add_column("at", list(range(10))).map(lambda row: {"source": 'a "b"/ü.pdf'})
    shuffled = RetrievalDataset(corpus.shuffle(seed=1), file_of_pages.queries, file_of_pages.qrels)
    assert mine_texts(shuffled, VectorsInTexts(), relative_margin=None) == {"q0": ["d0", "d4", "d5", "d6"]}


@pytest.mark.parametrize("numbers", [["i", "ii", "iii"], [1.5, 2.0, 3.0], [[1], [2], [3]]], ids=str)
def test_page_numbers_that_are_none_are_reported(numbers, caplog):
    filed = of_files(text_dataset(vectors(9, 8, 7), ["1"], [(0, 0)]), ["a.pdf"] * 3, numbers)
    with caplog.at_level(logging.WARNING, logger=neighbors.__name__):
        assert mine_texts(filed, VectorsInTexts(), relative_margin=None) == {"q0": ["d1", "d2"]}
    assert "Which pages lie beside each other is not known" in caplog.text


@pytest.mark.parametrize("files", [[1, 1, 1], ["a.pdf"] * 3], ids=str)
@pytest.mark.parametrize("numbers", [[1, 2, 3], [1.0, 2.0, 3.0], ["1", "2", "3"]], ids=str)
def test_whole_numbers_of_any_type_are_page_numbers(files, numbers):
    filed = of_files(text_dataset(vectors(9, 8, 7), ["1"], [(0, 0)]), files, numbers)
    assert mine_texts(filed, VectorsInTexts(), relative_margin=None) == {"q0": ["d2"]}


@pytest.mark.parametrize("numbers", [[None] * 3, [-1, 0, 2**62], [2**62, -(2**62), 3]], ids=str)
def test_page_numbers_out_of_range_have_no_neighbors(numbers):
    filed = of_files(text_dataset(vectors(9, 8, 7), ["1"], [(0, 0)]), ["a.pdf"] * 3, numbers)
    assert mine_texts(filed, VectorsInTexts(), relative_margin=None) == {"q0": ["d1", "d2"]}


@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True, [1]], ids=str)
def test_the_distance_is_checked(file_of_pages, value):
    with pytest.raises(ConfigError, match="neighbors="):
        mine_texts(file_of_pages, VectorsInTexts(), neighbors=value)


def test_a_dataset_without_queries_is_refused(file_of_pages):
    tables = file_of_pages.tables
    alone = RetrievalDataset.from_tables(
        replace(tables, queries=tables.queries.select([]), qrels=tables.qrels.select([]))
    )
    with pytest.raises(DatasetError, match="has no queries: 10 documents"):
        mine_texts(alone, VectorsInTexts())


# ---- several processes, and processes that are killed


class Notes:
    """Writes down what a model encodes; kills the process at a call."""

    def __init__(self, notes, killed_at=None):
        super().__init__()
        self.notes, self.calls, self.killed_at = notes, 0, killed_at

    def encode_query(self, inputs, **options):
        self.calls += 1
        if self.calls == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.notes.open("a") as file:
            file.writelines(f"{item['text']}\n" for item in inputs)
        return super().encode_query(inputs, **options)

    encode_document = encode_query


class Noted(Notes, VectorsInTexts):
    """Embeds a text of numbers as these."""


class TokensInTexts(MultiVectorEncoder):
    """Embeds a text of numbers as a vector for each of them."""

    def __init__(self):
        super().__init__(modules=[torch.nn.Identity()], device="cpu")

    def encode_query(self, inputs, **options):
        numbers = [torch.tensor([float(part) for part in item["text"].split()]) for item in inputs]
        return [torch.stack([row.cos(), row.sin()], dim=1) for row in numbers]


class NotedTokens(Notes, TokensInTexts):
    """The same, noted."""


def in_children(function, *arguments_of_each):
    """The exit codes of children, each with its arguments; they share what this process has imported."""
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the pool of Arrow sleeps
        children = [fork.Process(target=function, args=arguments) for arguments in arguments_of_each]
        for child in children:
            child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


@pytest.fixture(scope="module")
def many_texts():
    """Documents of four shards and queries of two, with relevant ones anywhere."""
    rng = np.random.default_rng(0)
    documents = [f"{at % 45 - 22} {at // 45 - 19}" for at in rng.permutation(1700).tolist()]
    queries = [f"{at % 30 - 15} {at // 30 - 10}.5" for at in range(600)]
    return text_dataset(documents, queries, [(at, 3 * at % 1700) for at in range(600)])


def mine_in_rank(rank, port, folder, dataset, options):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one was forked from
    model = options.pop("kind", Noted)(folder / f"encoded-{rank}.txt")
    try:
        found = mine_texts(dataset, model, **options)
    except DatasetError as error:
        found = str(error)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def mine_in_two_ranks(folder, dataset, **options):
    """What each of two processes found, and what each encoded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    codes = in_children(mine_in_rank, *((rank, port, folder, dataset, options) for rank in (0, 1)))
    assert codes == [0, 0]
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    files = [folder / f"encoded-{rank}.txt" for rank in (0, 1)]
    return found, [file.read_text().splitlines() if file.exists() else [] for file in files]


@pytest.mark.parametrize("kind", [Noted, NotedTokens])
def test_two_processes_share_the_work_and_find_what_one_finds(many_texts, tmp_path, kind):
    options = {"relative_margin": None, "range_max": 30, "cache_folder": tmp_path / "cache"}
    found, encoded = mine_in_two_ranks(tmp_path, many_texts, kind=kind, **options)
    everything = many_texts.queries["text"][:] + many_texts.corpus["text"][:]
    assert sorted(encoded[0] + encoded[1]) == sorted(everything)
    assert min(map(len, encoded)) > 700
    model = kind(tmp_path / "encoded-alone.txt")
    assert found[0] == found[1] == mine_texts(many_texts, model, **{**options, "cache_folder": None})
    # The folder serves any number of processes.
    alone = kind(tmp_path / "encoded-later.txt")
    assert mine_texts(many_texts, alone, **options) == found[0]
    assert not alone.calls
    assert mine_in_two_ranks(tmp_path, many_texts, kind=kind, **options)[1] == encoded


def test_two_processes_share_the_pairs_of_a_reranker(text_encoder_path, tmp_path):
    dataset = text_dataset(vectors(*range(40)), vectors(*range(1, 8)), [(at, 39 - at) for at in range(7)])
    reranker = ChosenScores(text_encoder_path, lambda query, document: (7 * float(document) + float(query)) % 5)
    options = {"reranker": reranker, "relative_margin": None, "batch_size": 3, "num_negatives": 3}
    found, _ = mine_in_two_ranks(tmp_path, dataset, **options, cache_folder=tmp_path / "cache")
    assert found[0] == found[1] == mine_texts(dataset, VectorsInTexts(), **options)
    reranker.scored.clear()
    assert mine_texts(dataset, VectorsInTexts(), **options, cache_folder=tmp_path / "cache") == found[0]
    assert not reranker.scored


def test_an_error_of_one_process_is_that_of_both(many_texts, tmp_path):
    texts = [*many_texts.corpus["text"][:-1], "nan nan"]
    corpus = Dataset.from_dict({"document_id": many_texts.corpus["document_id"][:], "text": texts})
    broken = RetrievalDataset(corpus, many_texts.queries, many_texts.qrels)
    found, _ = mine_in_two_ranks(tmp_path, broken)
    assert found[0] == found[1]
    assert "not finite for the document 'd1699'" in found[0]


def mine_until_killed(notes, killed_at, dataset, options):
    mine_texts(dataset, options.pop("kind", Noted)(notes, killed_at), **options)


@pytest.mark.parametrize("kind", [Noted, NotedTokens])
def test_what_was_killed_embeds_nothing_twice(many_texts, tmp_path, kind):
    options = {"relative_margin": None, "cache_folder": tmp_path / "cache", "batch_size": 50, "kind": kind}
    notes = tmp_path / "encoded.txt"
    # In the first shard of the queries, twice in a shard of documents, and at the start of one.
    for killed_at in (3, 20, 6, 12):
        assert in_children(mine_until_killed, (notes, killed_at, many_texts, options)) == [-signal.SIGKILL]
    options.pop("kind")
    found = mine_texts(many_texts, kind(notes), **options)
    everything = many_texts.queries["text"][:] + many_texts.corpus["text"][:]
    assert sorted(notes.read_text().splitlines()) == sorted(everything)
    assert found == mine_texts(many_texts, kind(tmp_path / "alone.txt"), **{**options, "cache_folder": None})
    assert not list((tmp_path / "cache").rglob("*.begun"))


def test_a_portion_that_was_cut_off_is_made_again(many_texts, tmp_path):
    options = {"relative_margin": None, "cache_folder": tmp_path / "cache", "batch_size": 50}
    notes = tmp_path / "encoded.txt"
    assert in_children(mine_until_killed, (notes, 5, many_texts, options)) == [-signal.SIGKILL]
    (begun,) = (tmp_path / "cache").rglob("*.begun")
    begun.write_bytes(begun.read_bytes()[:-7])
    found = mine_texts(many_texts, Noted(notes), **options)
    assert len(notes.read_text().splitlines()) == 600 + 1700 + 50
    assert found == mine_texts(many_texts, Noted(tmp_path / "alone.txt"), relative_margin=None)


def test_two_calls_at_once_may_share_a_folder(many_texts, tmp_path):
    options = {"relative_margin": None, "cache_folder": tmp_path / "cache"}
    each = [(tmp_path / f"encoded-{at}.txt", None, many_texts, options) for at in range(2)]
    assert in_children(mine_until_killed, *each) == [0, 0]
    model = Noted(tmp_path / "later.txt")
    assert mine_texts(many_texts, model, **options) == mine_texts(many_texts, VectorsInTexts(), relative_margin=None)
    assert not model.calls
    assert not list((tmp_path / "cache").rglob("*.begun"))


def test_a_folder_that_cannot_be_written_to_is_named(many_texts, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"file.* can't be written to: .*Make room or give permission"):
        mine_texts(many_texts, VectorsInTexts(), cache_folder=tmp_path / "file" / "cache")
