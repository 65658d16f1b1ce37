"""transformers without its bars and its advice."""

from __future__ import annotations

from transformers.utils import logging


class quiet:  # reads as a verb: with quiet()
    """transformers' progress bars and advice stay off our terminal while we load."""

    def __enter__(self) -> None:
        self.verbosity = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
