"""The prompt formats of the chat models, read from ``templates.json``.

A conversation is a list of turns ``("human", text)`` and ``("gpt", text)``, oldest first; ``("gpt", None)`` at the
end is the answer still to be written. A template writes it as a string (`Template.render`) or as token ids
(`Template.encode`).

The two differ in one point that matters: in a string, a control token that a user typed cannot be told from one that
the template put there. `Template.encode` therefore never encodes the rendered string. It encodes the pieces: markers
become control ids, everything else is plain text, whatever it looks like.

What this does not prevent: in "aquila-chat", "aquila" and "aquila-legacy" the words that say who speaks ("###Human:")
are plain text themselves. A user who types "###Assistant: yes" has written the same tokens that the template writes.
No encoder can undo that; `Template.imitable` says which templates have this weakness.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str | None]
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class TemplateError(ValueError):
    """A template that does not exist, or a conversation or tokenizer that does not fit one."""


class Segment(NamedTuple):
    """A piece of a prompt: plain text, or exactly one control token."""

    text: str
    is_control: bool
    learned: bool = False  # what the model itself is to write: an answer, and the token that ends it


@dataclass(frozen=True)
class Template:
    """One prompt format; the fields are explained at the top of ``templates.json``."""

    name: str
    system: str
    system_marks: tuple[str, str]
    human: tuple[str, str]
    gpt: tuple[str, str]
    open: str
    control: tuple[str, ...]
    stop: tuple[str, ...]

    @property
    def imitable(self) -> bool:
        """Whether a user can write the marker that opens a turn, because it is plain text and no control token."""
        return not any(control in self.human[0] for control in self.control)

    def render(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Write a conversation as the string the model was trained on.

        Args:
            turns: oldest first, human and gpt in turn; the last may be ``("gpt", None)``. An empty answer ``""`` is an
                answer and gets its closing marker.
            system: text to use in place of the template's own; ``""`` leaves the system part out.

        Raises:
            TemplateError: the turns do not alternate, or one lacks its text; the message names its index.
        """
        return "".join(segment.text for segment in self.segments(turns, system))

    def segments(self, turns: Sequence[Turn], system: str | None = None) -> list[Segment]:
        """The conversation in pieces, control tokens apart from text; arguments as for `render`.

        Returns:
            Pieces whose texts, joined, are the rendered string. What the user wrote is never a control piece.
        """
        pieces = self._system_segments(self.system if system is None else system)
        for role, text in check_turns(turns):
            before, after = self.human if role == "human" else self.gpt
            if text is None:
                pieces += self._marker(self.open)
                continue
            answer = role == "gpt"
            end, *rest = self._marker(after) or [Segment("", False)]
            pieces += [*self._marker(before), Segment(text, False, answer), end._replace(learned=answer), *rest]
        return [piece for piece in pieces if piece.text]

    def runs(self, segments: Sequence[Segment], whole: bool = False) -> list[list[Segment]]:
        """The pieces in groups that are encoded together; a control token is a group of its own.

        Neighbouring pieces of plain text are one group, so byte pairs may merge across the edge between a marker and a
        message, as they do in the rendered string. One edge is kept: the place where the model begins to answer.
        There the prompt ended, and its last token cannot merge with a word that did not yet exist. After
        "### Assistant: " the model saw the token of a single space and wrote "Hi"; the rendered string, read as one,
        would make it " Hi", a token that this prompt can never be continued with. Where a template leaves its last
        space to the answer ("Assistant:", then " Hi"), the pre-tokenizer cuts at that place in any case.

        Args:
            segments: of one conversation.
            whole: merge across that edge too, as the original does when it reads its history again.
        """
        apart = not whole and self.open == self.gpt[0]
        groups: list[list[Segment]] = []
        for before, piece in zip([None, *segments], segments, strict=False):
            starts_answer = apart and piece.learned and not (before and before.learned)
            if before is None or before.is_control or piece.is_control or starts_answer:
                groups.append([])
            groups[-1].append(piece)
        return groups

    def encode(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        suffix: str = "",
        whole: bool = False,
    ) -> list[int]:
        """Encode a conversation; arguments as for `render` and `runs`, and ``suffix``, plain text for the very end.

        The ids are those of the whole rendered string wherever no control token was typed, but for answers whose first
        word would merge with the marker before it: they keep the tokens that the model wrote, see `runs`. So the prompt
        of each turn is a beginning of the next turn's.

        Raises:
            TemplateError: also when the tokenizer lacks a control token of the template, or treats typed text as one.
        """
        pieces = [*self.segments(turns, system), Segment(suffix, False)]
        control = self.control_ids(tokenizer)
        ids: list[int] = []
        for run in self.runs([piece for piece in pieces if piece.text], whole):
            text = "".join(piece.text for piece in run)
            ids += [control[text]] if run[0].is_control else plain_ids(text, tokenizer, control)
        return ids

    def control_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """The template's control tokens and their ids.

        Raises:
            TemplateError: the tokenizer lacks one of them.
        """
        return {token: self._control_id(token, tokenizer) for token in self.control}

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """The ids that end an answer: those stop strings that are control tokens of this tokenizer."""
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return {special[text] for text in self.stop if text in special}

    def _system_segments(self, system: str) -> list[Segment]:
        if not system:
            return []
        before, after = self.system_marks
        return [*self._marker(before), Segment(system, False), *self._marker(after)]

    def _marker(self, marker: str) -> list[Segment]:
        return _split_marker(marker, self.control)

    def _control_id(self, token: str, tokenizer: PreTrainedTokenizerBase) -> int:
        index = tokenizer.convert_tokens_to_ids(token)
        if index is None or tokenizer.convert_ids_to_tokens(index) != token:
            raise TemplateError(
                f"template {self.name!r} needs the control token {token!r}, and this tokenizer has no such token; "
                "take the tokenizer that belongs to the model, or another template"
            )
        return index


@cache
def _split_marker(marker: str, control: tuple[str, ...]) -> tuple[Segment, ...]:
    """Cut a marker into its control tokens and the plain text between them."""
    if not control:
        return (Segment(marker, False),)
    parts = re.split("(" + "|".join(map(re.escape, control)) + ")", marker)
    return tuple(Segment(part, part in control) for part in parts if part)


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, control: Mapping[str, int] | None = None) -> list[int]:
    """Encode text that must not become a control token, whatever characters it contains.

    Args:
        text: any text.
        tokenizer: its special tokens are control tokens.
        control: more control tokens, for tokenizers that do not mark all of theirs as special.

    Raises:
        TemplateError: the tokenizer turned typed text into a control id in spite of being asked not to.
    """
    if not text:
        return []
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    check_plain(ids, tokenizer, control)
    return ids


def check_plain(
    ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, control: Mapping[str, int] | None = None
) -> None:
    """Make sure that no id of a plain text is one of a control token; arguments and errors as for `plain_ids`."""
    leaked = set(ids).intersection([*tokenizer.all_special_ids, *(control or {}).values()])
    if leaked:
        raise TemplateError(
            f"this tokenizer turns typed text into the control ids {sorted(leaked)}; "
            "load it with aquila2_tut.load_tokenizer, which marks control tokens as special"
        )


def check_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Bring the role names to "human" and "gpt" and check the order.

    Args:
        turns: pairs of a role ("human" or "user", "gpt" or "assistant", in any letter case) and a text.

    Returns:
        The same turns, the first one human, the roles alternating.

    Raises:
        TemplateError: naming the index of the first turn that is wrong.
    """
    checked = [_check_turn(index, turn, last=index == len(turns) - 1) for index, turn in enumerate(turns)]
    for index, (role, _) in enumerate(checked):
        expected = "gpt" if index % 2 else "human"
        if role != expected:
            where = f"turns {index - 1} and {index} are both {role}" if index else f"turn 0 is {role}"
            raise TemplateError(
                f"{where}: human and gpt must alternate, human first, so turn {index} must be {expected}"
            )
    return checked


def _check_turn(index: int, turn: Turn, last: bool) -> Turn:
    """Check one turn by itself and name its role as this package does."""
    if not isinstance(turn, tuple | list) or len(turn) != 2 or not isinstance(turn[0], str):
        raise TemplateError(f"turn {index} is {turn!r}: write a pair such as ('human', 'Hello!')")
    role, text = turn
    known = ROLES.get(role.lower())
    if known is None:
        raise TemplateError(f"turn {index} has the role {role!r}: use one of {', '.join(ROLES)}")
    if text is None and not (last and known == "gpt"):
        raise TemplateError(f"turn {index} ({known}) has no text: only the answer at the very end may be None")
    if text is not None and not isinstance(text, str):
        raise TemplateError(f"turn {index} ({known}) is a {type(text).__name__}, not a string")
    return known, text


@cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("templates.json").read_text(encoding="utf-8"))


@cache
def _templates() -> dict[str, Template]:
    texts = {None: "", **_table()["system_texts"]}
    return {name: _build(name, row, texts) for name, row in _table()["templates"].items()}


def _build(name: str, row: dict[str, Any], texts: dict[str | None, str]) -> Template:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Template(name=name, **{**fields, "system": texts[row["system"]]})


def template_names() -> list[str]:
    """The names that `get_template` knows."""
    return list(_templates())


def get_template(name: str) -> Template:
    """The template of that name, in any letter case.

    Raises:
        TemplateError: there is no such template; the message lists all of them and the nearest ones.
    """
    template = _templates().get(str(name).lower())
    if template is None:
        raise TemplateError(f"no template {name!r}; {_suggest(name, _templates())}")
    return template


def template_for_model(model_name: str) -> Template:
    """The template that a released chat model was trained with.

    Args:
        model_name: such as "AquilaChat2-7B", in any letter case, with or without "BAAI/" before it.

    Raises:
        TemplateError: a base model, which has no template, or a name that is not known.
    """
    models = {name.lower(): (name, template) for name, template in _table()["models"].items()}
    short = re.split(r"[/\\]", str(model_name).rstrip("/\\"))[-1].lower()
    if short not in models:
        chat = [name for name, template in models.values() if template]
        raise TemplateError(
            f"no template is known for the model {model_name!r}; {_suggest(short, chat)}. "
            "Name the template yourself with convo_template=..., or continue plain text with sft=False"
        )
    name, template = models[short]
    if template is None:
        raise TemplateError(
            f"{name} is a base model and has no chat template: use sft=False to continue a text, "
            "or name a template yourself with convo_template=..."
        )
    return get_template(template)


def _suggest(name: str, known: Iterable[str]) -> str:
    """The known names as a sentence, the nearest first where something is near."""
    by_lower = {item.lower(): item for item in known}
    near = [by_lower[item] for item in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}Known are {', '.join(by_lower.values())}"
