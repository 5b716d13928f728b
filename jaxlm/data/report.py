"""What became of the records of each source, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlm.config import DataConfig
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

_MANY_EMPTY = 0.1  # share of empty answers that is worth a warning


@dataclass
class SourceReport:
    """What became of a source.

    `records` counts all that were read, or after a split off for validation those that are left; tokens are those kept.

    Attributes:
        why: why `auto` stands for this template; empty where the template was named.
        ends: trained tokens that end an answer; `end_ids` are their ids.
        empty: records whose answers are all empty, of `answered` that have answers.
        unused: what holds something in records and is not read, with the number of records.
        lost: roles of messages that the chat template changes or leaves out, with the number of records.
    """

    path: str
    template: str
    why: str = ""
    records: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    split: int = 0
    dropped_too_long: int = 0
    dropped_without_target: int = 0
    dropped_unknown: int = 0
    dropped_equal: int = 0
    dropped_pieces: int = 0
    tokens_dropped: int = 0
    ends: int = 0
    end_ids: frozenset[int] = frozenset()
    answered: int = 0
    empty: int = 0
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    lost: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return self.dropped_too_long + self.dropped_without_target + self.dropped_unknown + self.dropped_equal

    def line(self) -> str:
        """One line for a log."""
        chosen = f"{self.template}: {self.why}" if self.why else self.template
        text = f"{self.path} ({chosen}): {self.records:,} records, {self.tokens:,} tokens"
        text += f", {self.trained_tokens:,} of them trained"
        if self.truncated:
            text += f"; {self.truncated:,} records cut to data.sequence_length ({self.tokens_cut:,} tokens lost)"
        if self.split:
            text += f"; {self.split:,} records longer than data.sequence_length split into pieces"
        if self.dropped_pieces:
            text += f"; {self.dropped_pieces:,} pieces with nothing to learn dropped ({self.tokens_dropped:,} tokens)"
        if self.dropped_too_long:
            text += f"; {self.dropped_too_long:,} records dropped as too long"
        if self.dropped_equal:
            text += f"; {self.dropped_equal:,} pairs of equal answers left out"
        if self.dropped_unknown:
            text += f"; {self.dropped_unknown:,} records dropped for an unknown token (data.drop_unknown)"
        if self.dropped_without_target:
            text += f"; {self.dropped_without_target:,} records dropped because nothing to learn is left of them"
        if self.empty:
            text += f"; {self.empty:,} records have an empty answer"
        return text

    def remarks(self) -> list[str]:
        """Further lines: what is not used, and what looks like a mistake."""
        lines = []
        if self.unused:
            columns = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
            lines.append(f"{self.path}: columns that hold something (number of records) and are not used: {columns}")
            beside = [name for name in ("system", "history", "tools") if name in self.unused]
            if beside:
                lines.append(
                    f"warning: {self.path}: the template {self.template} has no place for {' and '.join(beside)}; "
                    "chat and vicuna_v1.1 read system and history, chat also tools"
                )
        if self.lost:
            roles = " and ".join(f"{role} messages in {count:,} records" for role, count in self.lost.items())
            lines.append(
                f"warning: {self.path}: the chat template changes or leaves out {roles}; see --preview, or choose "
                "another template"
            )
        if self.empty and self.empty >= _MANY_EMPTY * self.answered:
            all_of_them = self.empty == self.answered
            share = "every answer is" if all_of_them else f"{self.empty:,} of {self.answered:,} answers are"
            lines.append(
                f"warning: {self.path}: {share} empty: the model learns to say nothing there. Name the right column, "
                "e.g. columns: {output: NAME}, or leave these records out"
            )
        return lines


@dataclass(frozen=True)
class Report:
    """What the data came to, per source; `notes` are about all of them."""

    train: tuple[SourceReport, ...]
    validation: tuple[SourceReport, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Lines for a log, one a source."""
        return [f"train {r.line()}" for r in self.train] + [f"validation {r.line()}" for r in self.validation]

    def remarks(self) -> list[str]:
        """What else is worth a line: how records begin and end, what is not used, what looks like a mistake."""
        return [*self.notes, *(line for report in (*self.train, *self.validation) for line in report.remarks())]


def check_ends(reports: Sequence[SourceReport], config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses a run that learns answers, but nothing that ends one.

    Raises:
        UserError: saying why that is so and how to train nevertheless.
    """
    answering = [report for report in reports if report.answered]
    if config.allow_no_end or not answering or any(report.ends for report in answering):
        return
    if not config.add_eos:
        why = (
            "data.add_eos is false"
            if tokenizer.eos_id is not None
            else f"the tokenizer of {tokenizer.path} names no eos_token"
        )
    else:
        why = "all ends are cut off by data.sequence_length" if any(r.truncated for r in answering) else "none is there"
    raise UserError(
        f"data: nothing that ends an answer is trained, so that the model would never stop ({why}); "
        "set data.add_eos: true, name eos_token in tokenizer_config.json, or raise data.sequence_length; "
        "data.allow_no_end: true trains nevertheless"
    )
