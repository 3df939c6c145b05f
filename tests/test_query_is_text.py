"""A query is a text, whatever it looks like: nothing is opened, nothing is fetched."""

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from mmtune import RetrievalDataset, build_evaluator, finetune
from mmtune.testing import generated_pages

_opened: list[str] = []


def _watch(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], (str, bytes, Path)):
        _opened.append(str(args[0]))


# An audit hook can't be taken off again; it costs nearly nothing.
sys.addaudithook(_watch)


@pytest.fixture
def listening() -> Iterator[tuple[int, list]]:
    """The port of a server on this machine, and the connections it has seen."""
    seen: list = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    stop = threading.Event()

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, address = server.accept()
                connection.close()
                seen.append(address)
            except TimeoutError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    yield server.getsockname()[1], seen
    stop.set()
    thread.join()
    server.close()


def test_the_watch_sees_a_connection_and_an_opened_file(listening: tuple[int, list], tmp_path: Path) -> None:
    port, seen = listening
    (tmp_path / "file.txt").write_text("x")
    assert str(tmp_path / "file.txt") in _opened
    with socket.create_connection(("127.0.0.1", port)):
        pass
    for _ in range(100):
        if seen:
            break
        threading.Event().wait(0.05)
    assert len(seen) == 1


def test_queries_that_are_paths_and_urls(clip_path: str, tmp_path: Path, listening: tuple[int, list]) -> None:
    port, seen = listening
    rows = generated_pages(8, seed=5)
    image = tmp_path / "private.png"
    rows[0]["image"].save(image)
    asking = [at for at, query in enumerate(rows["query"]) if query is not None]
    queries = list(rows["query"])
    queries[asking[0]], queries[asking[1]] = str(image), f"http://127.0.0.1:{port}/page.png"
    data = RetrievalDataset.from_id_rows(rows.remove_columns("query").add_column("query", queries))
    _opened.clear()

    result = finetune(
        clip_path, data, data, allow_overlap=True, output_dir=tmp_path / "run", max_steps=3, learning_rate=1e-3
    )
    embeddings = build_evaluator(data, show_progress_bar=False).encode(result.model).queries

    assert str(image) not in _opened
    assert seen == []
    model = SentenceTransformer(str(tmp_path / "run" / "final"), device="cpu")
    for at, query in enumerate(data.queries["text"]):
        as_text = model.encode_query({"text": query}, convert_to_tensor=True)
        assert embeddings[at].tolist() == pytest.approx(as_text.tolist(), abs=1e-5)
