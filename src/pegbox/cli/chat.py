"""pegbox chat"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from pegbox.cli.verb import Verb

if TYPE_CHECKING:
    from pegbox.evaluate.chat import Chat

VERB = Verb(
    "chat",
    "pegbox.evaluate.generate:GenerateSettings",
    needs=(("adapter", "model"),),
    subject=("adapter", "model"),
    hidden=("prompt", "data", "output", "adapters", "batch_size", "raw"),
)
TOLD = "Say something; /undo takes back the last turn, /reset begins anew, /exit or Ctrl-D leaves."


def run(context: typer.Context) -> None:
    """Talk with a model, or a tuned one: chat out/ | chat model"""
    settings = VERB.read(context)
    import dataclasses

    from pegbox.evaluate.chat import Chat
    from pegbox.evaluate.generate import Decoding, opened_with

    what = settings.adapter or settings.model
    model, tokenizer = opened_with(what, base=settings.model if settings.adapter else None, quantise=settings.quantise)
    decoding = Decoding(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(Decoding)})
    _talk(Chat(model, tokenizer, decoding))


def _talk(chat: Chat) -> None:
    print(TOLD)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        if said == "/exit":
            return
        if said in ("/undo", "/reset"):
            (chat.undo if said == "/undo" else chat.reset)()
        elif said:
            _answer(chat, said)


def _answer(chat: Chat, said: str) -> None:
    """Print an answer as it comes; Ctrl-C ends the answer, not the conversation."""
    try:
        for piece in chat.say(said):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
