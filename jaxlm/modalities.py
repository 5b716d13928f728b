"""Tokens of their own for molecules, proteins, nucleic acids and the like.

In a text such a thing stands between tags, `<smiles>CCO</smiles>`. As tokens it is a run of its modality's own pieces,
`{|C|} {|C|} {|O|}`: the delimiters around a piece keep it apart from ordinary text. The pieces' ids are one range for
each modality, by which the feed-forward's routers know them.

A tokenizer's modalities stand beside it in modalities.json, made by `convert extend-vocab`. The presets smiles, nucleic
and protein are SciMind's alphabets, in its order (fangxintao/SciMind, ACL L+M 2024).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.config import ModalityConfig
from jaxlm.errors import UserError
from jaxlm.jsonfields import build, check_version
from jaxlm.jsontext import parse

MODALITIES_FILE = "modalities.json"
VERSION = 1  # of that file
PADDING = -1  # modality id where there is no token; 0 is text, 1, 2, ... are those with tokens of their own

# All elements, as far as they have a name; inside brackets any may stand (OpenSMILES 1.0, section 3).
_ELEMENT_NAMES = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc "
    "Lv Ts Og"
)
_ELEMENTS = tuple(_ELEMENT_NAMES.split(" "))
_AROMATIC = ("b", "c", "n", "o", "p", "s", "se", "as", "te")
_SIGNS = (*r"[]().-=#$:/\@", "@@", *"+*%>~0123456789")
_LONG = "|".join(sorted((s for s in [*_ELEMENTS, *_AROMATIC] if len(s) == 2), reverse=True))
# Outside of brackets Cl and Br are the only two-letter atoms: Cn is a carbon and an aromatic nitrogen there. Inside,
# the next bracket is the closing one.
_ATOMS = rf"(?:{_LONG})(?=[^\[\]]*\])|Cl|Br|@@|."

PRESETS: dict[str, ModalityConfig] = {
    "smiles": ModalityConfig(
        name="smiles",
        delimiters=("{|", "|}"),
        tokens=tuple(r"C1(Oc2)N=#3.ln-sS[@H]/\oA+456BrIM0dFGeiTP7aK89ugUR%htWDyZbELfYVXpm"),
        tag_tokens=False,
    ),
    "nucleic": ModalityConfig(name="nucleic", delimiters=("*|", "|*"), tokens=tuple("GACTU"), tag_tokens=False),
    "protein": ModalityConfig(
        name="protein", delimiters=("<|", "|>"), tokens=tuple("LAGVSERTIDPKQNFYMHWCXBUZO.-"), tag_tokens=False
    ),
    "smiles_atoms": ModalityConfig(
        name="smiles", delimiters=("{|", "|}"), tokens=(*_ELEMENTS, *_AROMATIC, *_SIGNS), pattern=_ATOMS
    ),
}


class TextError(UserError):
    """A text that cannot be made into tokens; `number` is its place among the texts of the call."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Modality:
    """One modality, its ids known.

    Args:
        name: e.g. 'smiles'.
        delimiters: what is written before and after a piece in its token.
        pieces: what the tokens stand for, in the order of ids.
        pattern: regular expression whose matches are the pieces of a text; None: every character is one.
        tags: what opens and closes a run of pieces in a text.
        tag_tokens: the tags are tokens too. Without them an empty run, or two with nothing between, cannot be read.
        strip: white space beside a run is dropped, as SciMind's tokenizer does; the text does not come back exactly.
        fallback: 'error', or 'text': what has a piece that is not known is read as plain text.
        first: id of the first piece; the others follow. The tags stand before them: first - 2 and first - 1.
    """

    name: str
    delimiters: tuple[str, str]
    pieces: tuple[str, ...]
    pattern: str | None
    tags: tuple[str, str]
    tag_tokens: bool
    strip: bool
    fallback: str
    first: int

    @property
    def range(self) -> tuple[int, int]:
        """The ids of the pieces: first, last + 1."""
        return self.first, self.first + len(self.pieces)

    def spelled(self) -> list[str]:
        """The pieces as they stand in the vocabulary, in the order of ids."""
        before, after = self.delimiters
        return [f"{before}{piece}{after}" for piece in self.pieces]

    def tokens(self) -> list[str]:
        """Everything that this modality adds to a vocabulary, in the order of ids."""
        return [*(self.tags if self.tag_tokens else ()), *self.spelled()]


@dataclass(frozen=True)
class Run:
    """A stretch of a text: ids of one modality with the characters of each, or plain text when there are no ids."""

    begin: int
    end: int
    ids: list[int]
    offsets: list[tuple[int, int]]


def resolve(entries: Sequence[ModalityConfig], first: int) -> list[Modality]:
    """Modalities whose tokens stand one after the other from id `first` on.

    Raises:
        UserError: naming the entry and what is missing or contradicts itself.
    """
    modalities: list[Modality] = []
    for number, entry in enumerate(entries):
        modality = _resolve_one(entry, f"modality {number + 1}")
        start = first + (2 if modality.tag_tokens else 0)
        modalities.append(dataclasses.replace(modality, first=start))
        first = modalities[-1].range[1]
    for what, values in (
        ("name", [m.name for m in modalities]),
        ("tag", [tag for m in modalities for tag in m.tags]),
        ("token", [token for m in modalities for token in m.tokens()]),
    ):
        twice = next((value for at, value in enumerate(values) if value in values[:at]), None)
        if twice is not None:
            raise UserError(f"modalities: two of them have the {what} {twice!r}; give one of them another")
    return modalities


def _resolve_one(entry: ModalityConfig, where: str) -> Modality:
    if entry.preset is not None:
        preset = PRESETS.get(entry.preset)
        if preset is None:
            raise UserError(f"{where}: preset {entry.preset!r} is not one of {', '.join(PRESETS)}")
        default = ModalityConfig()
        changed = {
            field.name: getattr(entry, field.name)
            for field in dataclasses.fields(entry)
            if getattr(entry, field.name) != getattr(default, field.name)
        }
        entry = dataclasses.replace(preset, **changed)
    if not entry.name:
        raise UserError(f"{where}: say its name, or a preset ({', '.join(PRESETS)})")
    where = f"modality {entry.name}"
    if entry.name == "text" or not re.fullmatch(r"[A-Za-z][\w-]*", entry.name):
        raise UserError(f"{where}: a name has letters, digits, _ and -, and is not 'text'")
    pieces = entry.tokens or _lines(entry.tokens_file, where)
    if not pieces:
        raise UserError(
            f"{where}: has no tokens; list them (tokens), or name a file with one on each line (tokens_file)"
        )
    twice = next((piece for at, piece in enumerate(pieces) if piece in pieces[:at]), None)
    if twice is not None:
        raise UserError(f"{where}: the token {twice!r} is there twice")
    if any(piece == "" for piece in pieces):
        raise UserError(f"{where}: a token is empty")
    before, after = entry.delimiters
    if not before or not after:
        raise UserError(f"{where}: delimiters {list(entry.delimiters)}: both must be there, to tell pieces from text")
    tags = entry.tags or (f"<{entry.name}>", f"</{entry.name}>")
    if tags[0] == tags[1] or not all(tags):
        raise UserError(f"{where}: tags {list(tags)}: two different ones are needed, to open and to close")
    if entry.pattern is None:
        long = next((piece for piece in pieces if len(piece) > 1), None)
        if long is not None:
            raise UserError(
                f"{where}: the token {long!r} has several characters; give a pattern that finds such pieces"
            )
    else:
        _check_pattern(entry.pattern, where)
    tag_tokens = True if entry.tag_tokens is None else entry.tag_tokens
    return Modality(
        entry.name, (before, after), tuple(pieces), entry.pattern, tags, tag_tokens, entry.strip, entry.fallback, 0
    )


def _check_pattern(pattern: str, where: str) -> None:
    try:
        empty = re.compile(pattern, re.DOTALL).match("")
    except re.error as error:
        raise UserError(f"{where}: pattern {pattern!r} is not a regular expression: {error}") from None
    if empty is not None:
        raise UserError(f"{where}: pattern {pattern!r} also matches nothing at all; every piece has a character")


def _lines(name: str | None, where: str) -> tuple[str, ...]:
    if name is None:
        return ()
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: tokens_file {name} cannot be read ({error})") from None
    return tuple(line for line in (line.rstrip("\r") for line in text.split("\n")) if line)


def save(modalities: Sequence[Modality], directory: Path) -> None:
    """Writes modalities.json."""
    content = {"version": VERSION, "modalities": [dataclasses.asdict(modality) for modality in modalities]}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (directory / MODALITIES_FILE).write_text(text + "\n", encoding="utf-8")


def load(path: Path, id_of: Callable[[str], int | None]) -> list[Modality]:
    """Reads modalities.json.

    Args:
        id_of: the tokenizer's: every token must be in its vocabulary with the id that follows from `first`.

    Raises:
        UserError: for another file, or one of another tokenizer.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
        check_version(content, VERSION, path)
        listed = list(content["modalities"])
        entries = [build(Modality, entry, f"{path}: {n}") for n, entry in enumerate(listed)]
        for modality in entries:
            re.compile(modality.pattern or "")
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{path}: is not what `convert extend-vocab` writes ({error!r}); copy the file again") from None
    for modality in entries:
        start = modality.first - (2 if modality.tag_tokens else 0)
        for number, token in enumerate(modality.tokens()):
            if id_of(token) != start + number:
                raise UserError(
                    f"{path}: the token {token!r} of {modality.name} should have id {start + number}, the tokenizer "
                    f"beside it says {id_of(token)}; the two do not belong together"
                )
    return entries


class Modalities:
    """What a tokenizer does with the texts and ids of its modalities."""

    def __init__(self, entries: Sequence[Modality]) -> None:
        self.entries = tuple(entries)
        tags = {tag: (modality, side) for modality in entries for side, tag in enumerate(modality.tags)}
        self._tags = tags
        # Longest first, so that a tag which begins another does not win.
        self._any_tag = re.compile("|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)))
        self._ids = {m.name: {piece: m.first + at for at, piece in enumerate(m.pieces)} for m in entries}
        self._pattern = {m.name: re.compile(m.pattern, re.DOTALL) for m in entries if m.pattern is not None}
        self._owner = {index: m for m in entries for index in range(*m.range)}
        self._tag_ids = {m.first - 2 + side: (m, side) for m in entries if m.tag_tokens for side in (0, 1)}

    def split(self, text: str, number: int) -> list[Run]:
        """The text as runs of pieces and plain text, in order.

        Args:
            number: place of the text among those of the call, for errors.

        Raises:
            TextError: tags that are not in pairs, a piece that is not known, or a run that could not be told apart
                again, with the character and the place.
        """
        runs: list[Run] = []
        last = 0
        opened: tuple[Modality, re.Match[str]] | None = None
        for match in self._any_tag.finditer(text):
            modality, side = self._tags[match.group()]
            if side == 0:
                if opened is not None:
                    raise self._unclosed(
                        number, text, opened[1], f"before {match.group()} at character {match.start()}"
                    )
                opened = modality, match
                continue
            if opened is None or opened[0] is not modality:
                raise TextError(
                    number,
                    f"{match.group()} at character {match.start()} closes what was not opened: "
                    f"{_around(text, match.start(), match.end())}; put {modality.tags[0]} in front of it",
                )
            run = self._run(modality, text, opened[1], match, number)
            if run is not None:
                if runs and self._would_merge(runs[-1], text[last : run.begin], modality):
                    raise TextError(
                        number,
                        f"two runs of {modality.name} with nothing between them at character {run.begin} would become "
                        f"one: {_around(text, run.begin, run.begin)}; put a word between them",
                    )
                if run.begin > last:
                    runs.append(Run(last, run.begin, [], []))
                runs.append(run)
                last = run.end
            opened = None
        if opened is not None:
            raise self._unclosed(number, text, opened[1], "in the rest of the text")
        if last < len(text):
            runs.append(Run(last, len(text), [], []))
        return list(self._stripped(runs, text))

    def _would_merge(self, before: Run, between: str, modality: Modality) -> bool:
        gap = between.strip() if modality.strip else between
        return not modality.tag_tokens and not gap and self._owner.get(before.ids[-1]) is modality

    def _unclosed(self, number: int, text: str, match: re.Match[str], where: str) -> TextError:
        closing = self._tags[match.group()][0].tags[1]
        return TextError(
            number,
            f"{match.group()} at character {match.start()} is not closed {where}: "
            f"{_around(text, match.start(), match.end())}; end it with {closing}",
        )

    def _run(
        self, modality: Modality, text: str, opening: re.Match[str], closing: re.Match[str], number: int
    ) -> Run | None:
        """The tokens from tag to tag; None when they are to be read as plain text."""
        begin, end = opening.end(), closing.start()
        pattern, ids = self._pattern.get(modality.name), self._ids[modality.name]
        if pattern is None:
            places = [(at, at + 1) for at in range(begin, end)]
        else:
            places = [match.span() for match in pattern.finditer(text, begin, end)]
        tokens: list[int] = []
        at = begin
        for place in [*places, (end, end)]:
            piece = text[slice(*place)]
            if place[0] != at or (piece and piece not in ids):
                if modality.fallback == "text":
                    return None
                unknown = piece if place[0] == at else text[at : place[0]]
                raise TextError(
                    number,
                    f"{unknown!r} at character {at} is not a token of the modality {modality.name}: "
                    f"{_around(text, opening.start(), closing.end())}; correct it, or let "
                    "all from tag to tag be read as plain text (fallback: text, of the modality)",
                )
            if piece:
                tokens.append(ids[piece])
            at = place[1]
        if modality.tag_tokens:
            outer = [modality.first - 2, *tokens, modality.first - 1]
            return Run(opening.start(), closing.end(), outer, [opening.span(), *places, closing.span()])
        if not tokens:
            raise TextError(
                number,
                f"{modality.tags[0]}{modality.tags[1]} at character {opening.start()} holds nothing, and this "
                f"tokenizer has no tokens for the tags: {_around(text, opening.start(), closing.end())}; take it out",
            )
        return Run(opening.start(), closing.end(), tokens, places)

    def _stripped(self, runs: Sequence[Run], text: str) -> Iterator[Run]:
        strips = {index for m in self.entries if m.strip for index in range(*m.range)}
        for at, run in enumerate(runs):
            if run.ids or not strips:
                yield run
                continue
            begin, end = run.begin, run.end
            before, after = (runs[k].ids if 0 <= k < len(runs) else [] for k in (at - 1, at + 1))
            if before and before[-1] in strips:
                begin += len(text[begin:end]) - len(text[begin:end].lstrip())
            if after and after[0] in strips:
                end -= len(text[begin:end]) - len(text[begin:end].rstrip())
            if begin < end:
                yield Run(begin, end, [], [])

    def decode(self, ids: Sequence[int], plain: Callable[[Sequence[int]], str], open_end: bool) -> str:
        """Text of ids, modalities between their tags.

        Pieces outside of the tags that should hold them are written with their delimiters, which are read back too.

        Args:
            plain: text of ids that belong to no modality.
            open_end: more ids may follow: a run at the end is not closed.
        """
        parts: list[str] = []
        run: list[int] = []
        inside: Modality | None = None

        def flush() -> None:
            if run:
                parts.append(plain(run))
                run.clear()

        for index in ids:
            owner, tag = self._owner.get(index), self._tag_ids.get(index)
            if inside is not None and not inside.tag_tokens and owner is not inside:
                parts.append(inside.tags[1])
                inside = None
            if tag is not None:
                flush()
                parts.append(tag[0].tags[tag[1]])
                inside = tag[0] if tag[1] == 0 else None
            elif owner is not None:
                flush()
                if inside is None and not owner.tag_tokens:
                    parts.append(owner.tags[0])
                    inside = owner
                piece = owner.pieces[index - owner.first]
                before, after = ("", "") if inside is owner else owner.delimiters
                parts.append(f"{before}{piece}{after}")
            else:
                run.append(index)
        flush()
        if inside is not None and not inside.tag_tokens and not open_end:
            parts.append(inside.tags[1])
        return "".join(parts)


def _around(text: str, begin: int, end: int) -> str:
    """A quotation of some characters with a few before and behind."""
    start, stop = max(0, begin - 20), min(len(text), end + 20)
    shown = text[start:stop]
    if len(shown) > 120:
        shown = f"{shown[:60]} … {shown[-50:]}"
    return repr(f"{'…' if start else ''}{shown}{'…' if stop < len(text) else ''}")
