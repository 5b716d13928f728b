"""A Modelfile beside a GGUF file: what `ollama create` wants, with the template that the model was trained with.

Ollama has templates of its own, in Go's language, and takes a chat template of a file only where it knows that very
text. So a template of jaxlm's is written for it too. Source: Ollama `docs/modelfile.mdx`, `docs/template.mdx`.
"""

from __future__ import annotations

from jaxlm.data.templates import ConversationTemplate, PromptTemplate, Template

FILE = "Modelfile"


def modelfile(file: str, template: Template | None, stops: tuple[str, ...]) -> str:
    """The text of the file.

    Args:
        file: the GGUF file's name, beside it.
        template: what the model was trained with; None: what the GGUF file holds.
        stops: texts of tokens that end an answer.
    """
    lines = [f"# ollama create NAME -f {FILE} && ollama run NAME", f"FROM ./{file}"]
    written = None if template is None else go_template(template, stops[0] if stops else "")
    if written is not None:
        lines.append(f'TEMPLATE """{written}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"


def go_template(template: Template, end: str) -> str | None:
    """A template in Go's language; None for one that it cannot say.

    Args:
        end: what stands behind each answer.
    """
    if isinstance(template, PromptTemplate):
        text = template.prompt_no_input
        if _is_taken(text) or text.count("{instruction}") != 1 or text.count("{") != 1:
            return None
        return text.replace("{instruction}", "{{ .Prompt }}")
    if not isinstance(template, ConversationTemplate):
        return None
    separator, user, assistant = template.separator, template.user, template.assistant
    if any(map(_is_taken, (template.system, separator, user, assistant, end))):
        return None
    return (
        f"{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{template.system}{{{{ end }}}}{separator}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}: {{{{ .Content }}}}{separator}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}: {{{{ .Content }}}}{end}{{{{ end }}}}{{{{ end }}}}'
        f"{assistant}:"
    )


def _is_taken(text: str) -> bool:
    """Whether a text has signs that mean something in a Modelfile or in Go's templates."""
    return "{{" in text or "}}" in text or '"""' in text
