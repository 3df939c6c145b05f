"""`generate_queries` in processes that are killed, for `test_queries.py`.

Each is a fork of one that has imported everything, so that the import is paid for once.

    python killed_generation.py URL STORE REPLIES_AT_EACH_KILL
"""

import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

import conftest  # noqa: F401 - before the host is imported

# isort: split

from datasets import Dataset

from mmtune import OpenAICompatible, RetrievalDataset, generate_queries

NUM_PAGES = 24


def run(url: str, store: Path) -> RetrievalDataset:
    """Two queries about each page, with a judge, and a near miss for each."""
    pages = {"document_id": [f"d{k}" for k in range(NUM_PAGES)], "text": [f"page {k}" for k in range(NUM_PAGES)]}
    queries = Dataset.from_dict({"query_id": ["q"], "text": ["Which is the first page?"]})
    qrels = Dataset.from_dict({"query_id": ["q"], "document_id": ["d0"], "score": [1]})
    model = OpenAICompatible(url, "m", max_retries=0)
    data = RetrievalDataset(Dataset.from_dict(pages), queries, qrels)
    return generate_queries(
        data, model, judge=model, near_misses=1, store=store, max_workers=4, show_progress_bar=False
    )


def stored(store: Path) -> list[tuple[str, str]]:
    """What the store has answers to: the text of the page and the instruction."""
    replies = [json.loads(path.read_text()) for path in store.glob("*/*.json")]
    return [(f"The text of the page:\npage {reply['document_id'][1:]}", reply["instruction"]) for reply in replies]


def counts(url: str) -> dict[tuple[str, str], int]:
    """How often the server was asked for each."""
    with urllib.request.urlopen(f"{url}/counts") as reply:
        return {(page, instruction): count for page, instruction, count in json.loads(reply.read())}


def run_and_kill(url: str, store: Path, replies: int) -> bool:
    """Kill a run as soon as the store has so many replies; whether it was still running."""
    process_id = os.fork()
    if not process_id:
        try:
            run(url, store)
        finally:
            os._exit(0)
    while os.waitpid(process_id, os.WNOHANG) == (0, 0):
        if len(list(store.glob("*/*.json"))) >= replies:
            os.kill(process_id, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) == -signal.SIGKILL
        time.sleep(0.001)
    return False


if __name__ == "__main__":
    url, store, moments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    kills = []
    for replies in moments:
        killed = run_and_kill(url, store, replies)
        before, answered = counts(url), stored(store)
        kills.append((killed, answered, before))
    data = run(url, store)
    after = counts(url)
    sys.stdout.write(
        json.dumps(
            {
                "killed": [killed for killed, _, _ in kills],
                "stored": [len(answered) for _, answered, _ in kills],
                "repeated": [sum(after[call] != before[call] for call in answered) for _, answered, before in kills],
                "partial": len(list(store.rglob("*.partial"))),
                "requests": sum(after.values()),
                "calls": len(after),
                "queries": data.queries.to_dict(),
            }
        )
    )
