"""Datasets on their way to the Hub."""

import logging
import re
import tempfile
from pathlib import Path
from typing import get_args

from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from mmtune.arguments import require_one_of
from mmtune.data.card import make_card
from mmtune.data.export import ExportLayout, Outgoing, Split, lay_out, warn_of_losses, write_files, writing_to
from mmtune.data.files import CARD, require_found
from mmtune.data.relevance import Relevance
from mmtune.errors import ConfigError, DatasetError
from mmtune.host import describe_offline

logger = logging.getLogger(__name__)

_REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def push_dataset(
    relevance: Relevance,
    repo_id: str,
    *,
    layout: ExportLayout | None,
    split: Split,
    private: bool | None,
    token: str | None,
    revision: str | None,
    show_progress_bar: bool,
) -> str:
    """Write a dataset to a repository of the Hub in one commit; see ``RetrievalDataset.push_to_hub``."""
    if not isinstance(repo_id, str) or not _REPO_ID.fullmatch(repo_id):
        raise ConfigError(
            f"repo_id={repo_id!r:.80}: expected the name of a dataset on the Hub, such as 'user/my-pages'."
        )
    if layout is not None:
        require_one_of("layout", layout, get_args(ExportLayout))
    require_one_of("split", split, get_args(Split))
    if not (private is None or isinstance(private, bool)):
        raise ConfigError(f"private={private!r:.80}: expected True, False or None.")
    for name, value in {"token": token, "revision": revision}.items():
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{name} is {type(value).__name__}: expected a text, or None.")
    outgoing = lay_out(relevance, layout) if layout else _choose_layout(relevance)
    require_found(relevance.tables)
    warn_of_losses(outgoing, stacklevel=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with writing_to(folder):
            write_files(outgoing, relevance, folder, split, show_progress_bar=show_progress_bar)
        try:
            return _upload(outgoing, relevance, repo_id, folder, split, private, token, revision)
        except DatasetError:
            raise
        except Exception as error:  # the Hub client raises many kinds; the name is what the user can mend
            raise DatasetError(
                f"{repo_id!r} could not be pushed: {type(error).__name__}: {error}. Check the name, the connection, "
                f"and that `hf auth login` was run with a token that may write.{describe_offline()}"
            ) from error


def _choose_layout(relevance: Relevance) -> Outgoing:
    """A row for each page where that holds everything, else the three tables, which hold most."""
    try:
        outgoing = lay_out(relevance, "id_rows")
        if not outgoing.losses:
            return outgoing
        why = f"it has no place for {'; '.join(outgoing.losses)}"
    except DatasetError as error:
        why = str(error)
    logger.info("Pushing with layout='beir' rather than 'id_rows': %s", why)
    return lay_out(relevance, "beir")


def _upload(
    outgoing: Outgoing,
    relevance: Relevance,
    repo_id: str,
    folder: Path,
    split: Split,
    private: bool | None,
    token: str | None,
    revision: str | None,
) -> str:
    api = HfApi(token=token)
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    repo_id = getattr(url, "repo_id", repo_id)  # with the user's name before it
    existing = _read_card(api, repo_id, revision)
    folders = list(outgoing.tables)
    _require_same_layout(existing, folders, repo_id)
    card = make_card(relevance, outgoing.layout, folders, split, name=repo_id, existing=existing)
    (folder / CARD).write_text(card, encoding="utf-8")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type="dataset",
        revision=revision,
        commit_message=f"Add {split} ({len(relevance.tables.queries)} queries)",
        # What an earlier push left of this split, should it have had more files.
        delete_patterns=[f"{name}/{split}-*.parquet" for name in folders],
    )
    logger.info("Pushed %s with layout=%r: %s", repo_id, outgoing.layout, commit)
    return str(url)


def _read_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    """The card of a repository; ``""`` where it has none."""
    try:
        path = api.hf_hub_download(repo_id, CARD, repo_type="dataset", revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return ""
    return Path(path).read_text(encoding="utf-8")


def _require_same_layout(card: str, folders: list[str], repo_id: str) -> None:
    """Make sure that other splits of a repository are not in another layout, so that it reads as one.

    Raises:
        DatasetError: They are.
    """
    configs = DatasetCard(card, ignore_metadata_errors=True).data.to_dict().get("configs", []) if card else []
    names = {"data" if config["config_name"] == "default" else config["config_name"] for config in configs}
    if names and names != set(folders):
        raise DatasetError(
            f"{repo_id!r} has the configurations {sorted(names)}, and this layout has {sorted(folders)}: one "
            "repository can't be read as both. Name another repository, or pass the layout of the one that is there."
        )
