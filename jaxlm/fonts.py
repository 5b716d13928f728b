"""Characters of every script in the figures that matplotlib draws."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

# Families with Chinese, Japanese and Korean characters, as Debian, Windows and macOS bring them.
_CJK = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
    "Droid Sans Fallback",
)  # fmt: skip


@contextlib.contextmanager
def any_script() -> Iterator[None]:
    """Lets figures name runs and files in any script; around all that draws one, or as a decorator.

    What matplotlib's own font lacks is taken from a font of this machine. Where none has a character, a box stands in
    its place, without matplotlib's warnings among a command's lines.
    """
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = [*matplotlib.rcParams["font.family"], *(name for name in _CJK if name in installed)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield
