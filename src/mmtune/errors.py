"""The errors of mmtune.

.. code-block:: text

    MmtuneError
    ├── DatasetError            (also ValueError)   tables, rows, ids
    │   ├── MissingDocumentError                    an id that no document has
    │   └── MediaDecodeError                        a sound or a clip that can't be decoded
    │       └── ImageDecodeError                    a page that is no readable image
    └── ConfigError             (also ValueError)   arguments, models, output folders
        └── MissingExtraError   (also ImportError)  an optional package is not installed

Each message gives the value and where it came from, what was expected, and what to do next.
"""


class MmtuneError(Exception):
    """Base of every error that mmtune raises on purpose."""


class DatasetError(MmtuneError, ValueError):
    """The data can't be used as it is: a column, an id, a row or a page."""


class MissingDocumentError(DatasetError):
    """An id refers to a document that is not in the corpus."""


class MediaDecodeError(DatasetError):
    """A sound or a clip could not be decoded; of a page it is an ``ImageDecodeError``."""


class ImageDecodeError(MediaDecodeError):
    """A page could not be decoded as an image."""


class ConfigError(MmtuneError, ValueError):
    """An argument, a model or an output folder does not fit the run."""


class MissingExtraError(ConfigError, ImportError):
    """An optional package that this step needs is not installed."""
