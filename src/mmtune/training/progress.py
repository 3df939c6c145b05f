"""Progress bars of a call: all of them, or none."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Hides the bars of transformers and datasets too where the call is to show none; afterwards all is as it was.

    ``disable_tqdm`` by itself leaves those for loading and saving weights, and for tables (transformers 5.23).
    """
    hide_of_transformers = not shown and logging.is_progress_bar_enabled()
    hide_of_datasets = not shown and not datasets.are_progress_bars_disabled()
    if hide_of_transformers:
        logging.disable_progress_bar()
    if hide_of_datasets:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide_of_transformers:
            logging.enable_progress_bar()
        if hide_of_datasets:
            datasets.enable_progress_bars()
