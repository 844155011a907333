"""What the site needs beyond Markdown: formulas as MathML, and docstrings without Sphinx's roles.

Browsers draw MathML themselves: the site needs no script and no network.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves, with generic: true.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# Docstrings mark names as Sphinx does; mkdocstrings leaves the mark in front of the code.
_ROLE = re.compile(r":(?:class|func|data|meth|mod|attr|exc):(?=<code>)")
# Browsers break lines at hyphens, even between the two that an option begins with.
_OPTION = re.compile(r"<code>(--[a-z-]+)</code>")
_THIN_SPACE = '<mspace width="0.17em"/>'


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of each page."""
    whole = _OPTION.sub(r'<code class="option">\1</code>', content)
    return _ROLE.sub("", _FORMULA.sub(_mathml, whole))


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = convert(html.unescape(match[3]).strip(), display=display)
    # Browsers set names of functions without the space that TeX gives them.
    formula = re.sub("(<mi>(?:log|ln)</mi>)", rf"{_THIN_SPACE}\1{_THIN_SPACE}", formula)
    # Around the formula and not on it: Chromium gives a formula that scrolls two pairs of arrows.
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
