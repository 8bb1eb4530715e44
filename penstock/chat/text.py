"""The text-only families: plain role-tagged lines, and the shipped model's running text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.chat.encoder import Segment, TextChat
from penstock.chat.messages import Message

LEDGER_REFUSAL = "UNKNOWN"


class PlainChat(TextChat):
    """Role-tagged lines, for the fake and for models that bring no rule of their own."""

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        for message in messages:
            yield Segment(f"{message.role}: ")
            yield Segment(message.text)
            yield Segment("\n", ends_message=True)
        yield Segment("assistant: ")


class LedgerChat(TextChat):
    """The shipped model's: texts separated by blank lines; the question's subject is restated."""

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        before, asked = "", ""
        for index, message in enumerate(messages):
            if message.role == "assistant":
                yield Segment(message.text)
                stop = "" if message.text.endswith(".") else "."
                yield Segment(stop, ends_message=True)
            else:
                asked = message.text if message.role == "user" else asked
                yield from self._text(before, message.text)
                if _next_role(messages, index) in ("assistant", None):
                    yield Segment(self._opening(asked))
            before = "\n\n"

    @staticmethod
    def _text(before: str, text: str) -> Iterable[Segment]:
        """The document and its question apart, so that a state is kept between them."""
        at = text.rfind("\n\n" + _QUESTION)
        if at > 0:
            yield Segment(before + text[:at], ends_message=True)
            yield Segment(text[at:], ends_message=True)
        else:
            yield Segment(before + text, ends_message=True)

    @staticmethod
    def _opening(text: str) -> str:
        """What the answer begins with: the subject of the last question, restated."""
        end = len(text)
        while end > 0:
            at = text.rfind("\n" + _QUESTION, 0, end) + 1
            line = text[at:end].split("\n", 1)[0].rstrip()
            if line.startswith(_QUESTION) and line.endswith("?"):
                return f"\nAnswer: {line[len(_QUESTION) : -1]} is "
            end = at - 1
        return "\nAnswer: "


_QUESTION = "Question: what is "


def _next_role(messages: Sequence[Message], index: int) -> str | None:
    return messages[index + 1].role if index + 1 < len(messages) else None
