"""The page at `/`: its files, what it must know of the served model, and drawings of molecules.

Everything else it asks OpenAI's routes for. Its files name no other origin and hold neither styles nor scripts inline,
so that the policy that goes with every reply lets a browser load nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from jaxlm.config import Decoding
from jaxlm.data.records import Record
from jaxlm.data.templates import TaskTemplate, load_template, template_names
from jaxlm.serve.bodies import read_body
from jaxlm.serve.problems import Problem
from jaxlm.serve.served import Served

DIRECTORY = Path(__file__).parent / "page"
CONTENT_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'; img-src 'self'"
)
# Fields of the routes: the name in Decoding, smallest, largest and step of the slider. A number may be typed beyond
# the largest.
SLIDERS: dict[str, tuple[str | None, float, float, float]] = {
    "temperature": ("temperature", 0, 2, 0.05),
    "top_p": ("top_p", 0, 1, 0.01),
    "top_k": ("top_k", 0, 100, 1),
    "min_p": ("min_p", 0, 1, 0.01),
    "max_tokens": ("max_new_tokens", 1, 2048, 1),
    "repetition_penalty": ("repetition_penalty", 1, 2, 0.05),
    "frequency_penalty": (None, 0, 2, 0.05),
    "presence_penalty": (None, 0, 2, 0.05),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", 0, 10, 1),
    "num_beams": ("num_beams", 1, 8, 1),
    "length_penalty": ("length_penalty", 0, 2, 0.1),
}
LONGEST_SMILES = 1000  # characters; drawing takes longer than in proportion to the number of atoms
ATOMS_DRAWN = 250
# SciMind's questions, which ask for a molecule's description and for a described molecule.
MOLECULE_TEMPLATES = {"describe": "smiles2text", "design": "text2smiles"}


@dataclasses.dataclass(frozen=True)
class MoleculeBody:
    """`/page/molecule`."""

    smiles: str


def settings(served: Served, defaults: Decoding) -> dict[str, Any]:
    """What the page shows before anything is asked.

    Args:
        served: the model.
        defaults: values of the sliders.

    Returns:
        models {id: template (its name), takes_turns}, sampling [{name, value, min, max, step}], modalities, prompts
        {template: texts with {instruction} and {input} in them}, molecule {describe, design: texts with {text}},
        schemas of extraction.
    """
    models = {}
    for model in served.models:
        prompter = served.prompter(served.adapter(model))
        models[model] = {"template": prompter.name, "takes_turns": prompter.takes_turns}
    sampling = []
    for name, (field, low, high, step) in SLIDERS.items():
        value = 0.0 if field is None else getattr(defaults, field)
        high = min(high, served.context) if name == "max_tokens" else high
        sampling.append({"name": name, "value": value, "min": low, "max": max(high, value), "step": step})
    return {
        "models": models,
        "sampling": sampling,
        "modalities": [modality.name for modality in served.tokenizer.modalities],
        "prompts": prompts(),
        "molecule": {way: _question(name, "{text}") for way, name in MOLECULE_TEMPLATES.items()},
        "schemas": json.loads((DIRECTORY / "schemas.json").read_text(encoding="utf-8")),
    }


@functools.cache
def prompts() -> dict[str, dict[str, str]]:
    """Prompts by jaxlm's own templates for an instruction, with {instruction} and {input} where they stand."""
    texts = {}
    for name in template_names():
        if name in ("text", "chat") or isinstance(template := load_template(name, None), TaskTemplate):
            continue
        fields = {"without_input": {}, "with_input": {"input": "{input}"}}
        texts[name] = {
            key: template.render_prompt(Record(name, {"instruction": "{instruction}", **extra})).segments[0].text
            for key, extra in fields.items()
        }
    return texts


def _question(name: str, text: str) -> str:
    """The prompt of a template that asks about one column, which holds a text."""
    template = load_template(name, None)
    assert isinstance(template, TaskTemplate)
    return template.render_prompt(Record(name, dict.fromkeys(template.asks_for, text))).segments[0].text


def routes(served: Served, defaults: Decoding) -> Sequence[BaseRoute]:
    """The page's routes; none of them changes anything.

    Args:
        served, defaults: see `settings`.
    """

    async def index(request: Request) -> Response:
        return FileResponse(DIRECTORY / "index.html")

    async def shown_settings(request: Request) -> Response:
        return JSONResponse(settings(served, defaults))

    return (
        Route("/", index),
        Route("/page/settings", shown_settings),
        Route("/page/molecule", molecule, methods=["POST"]),
        Mount("/page", StaticFiles(directory=DIRECTORY)),
    )


async def molecule(request: Request) -> Response:
    """`{"smiles": …}` as an SVG drawing; 400 for what is not a molecule, 501 without RDKit."""
    smiles = read_body(await request.body(), MoleculeBody).smiles
    if not 0 < len(smiles) <= LONGEST_SMILES:
        raise Problem(f"smiles: expected a text of 1 to {LONGEST_SMILES} characters", param="smiles")
    try:
        drawing = await run_in_threadpool(draw, smiles)
    except ImportError:
        text = "drawing molecules needs RDKit; install it where the server runs: pip install 'jaxlm[science]'"
        raise Problem(text, 501) from None
    if drawing is None:
        raise Problem(f"smiles: {smiles[:60]!r} is not a molecule of at most {ATOMS_DRAWN} atoms", param="smiles")
    return Response(drawing, media_type="image/svg+xml")


def draw(smiles: str) -> str | None:
    """An SVG drawing; None: the text is not SMILES, or has too many atoms.

    RDKit writes style attributes, which the page's policy forbids; they become attributes of their own.

    Raises:
        ImportError: RDKit is not installed.
    """
    # RDKit is optional, and slow to import.
    from rdkit import Chem, RDLogger
    from rdkit.Chem.Draw import rdMolDraw2D

    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None or not 0 < parsed.GetNumAtoms() <= ATOMS_DRAWN:
        return None
    canvas = rdMolDraw2D.MolDraw2DSVG(320, 220)
    options: Any = canvas.drawOptions()
    options.clearBackground = False
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, parsed)
    canvas.FinishDrawing()
    return re.sub(r"style='([^']*)'", lambda match: _attributes(match[1]), canvas.GetDrawingText())


def _attributes(style: str) -> str:
    pairs = (entry.split(":", 1) for entry in style.split(";") if ":" in entry)
    return " ".join(f"{name.strip()}='{value.strip()}'" for name, value in pairs)
