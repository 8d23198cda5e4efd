"""A conversation with a model, without a screen: what was said, and the next answer as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from pegbox.data.templates import template_of
from pegbox.evaluate.generate import Decoding, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """Keeps the history; `say` answers.

        chat = Chat(model, tokenizer)
        for piece in chat.say("Hello"):
            print(piece, end="")

    Args:
        model: a model or tuned model that generates.
        decoding: how answers are drawn; its `system` opens the conversation, its `template` is what it is written in.

    Raises:
        DataError: there is no chat template.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoding: Decoding | None = None) -> None:
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding or Decoding()
        self.history: list[dict[str, Any]] = []
        template_of(tokenizer, self.decoding.template)

    def say(self, text: str) -> Iterator[str]:
        """The answer, in pieces; a user's turn and what was answered of it are in the history afterwards.

        Leaving off early keeps what had been said; an error before the first piece keeps nothing.
        """
        self.history.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            for piece in stream(self.model, self.tokenizer, self.history, self.decoding):
                said.append(piece)
                yield piece
        except Exception:
            if not said:
                self.history.pop()
            raise
        finally:
            if self.history and self.history[-1]["role"] == "user":
                self.history.append({"role": "assistant", "content": "".join(said)})

    def undo(self) -> None:
        """Take back the last turn of both."""
        del self.history[-2:]

    def reset(self) -> None:
        """Begin anew."""
        self.history.clear()
