"""Sphinx builds the documentation from this; ``make docs``."""

import inspect
import re

import thinwire

project = "thinwire"
author = "thinwire's authors"
copyright = "thinwire's authors, Apache License 2.0"
version = release = thinwire.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["tables"]  # included in pages
html_theme = "furo"
html_title = f"thinwire {release}"
html_copy_source = False

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what things are
autodoc_default_options = {"members": True, "inherited-members": False}
# Signatures show these as they are written, not as addresses in memory.
autodoc_preserve_defaults = True


# Docstrings list what a thing is given as "name: text", with what belongs to it indented, and the values of a name as
# "``value``  text". reStructuredText has definition lists and bullets for that.
_ITEM = re.compile(r"^(\w+(?:, \w+)*(?:\([\w, ]*\))?): (.*)$")
_VALUE = re.compile(r"^(\s+)(``\w+``)  +(.*)$")
_LITERAL = re.compile(r"(``.+?``|:\w+:`[^`]+`)")


def _plain(line):
    """A line in which | and a closing _ mean themselves, but in literals and roles."""
    parts = _LITERAL.split(line)
    parts[::2] = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", re.sub(r"([|*])", r"\\\1", part)) for part in parts[::2]]
    return "".join(parts)


def _as_list(paragraph):
    """A paragraph whose lines at the margin begin with names, as a definition list."""
    found, deeper = [], ""
    for line in paragraph:
        if item := _ITEM.match(line):
            deeper = ""
            found += [f"{item[1]}", f"    {_plain(item[2])}"]
        elif value := _VALUE.match(line):
            if not deeper:
                found.append("")
            deeper = "  "
            found.append(f"    * {value[2]}: {_plain(value[3])}")
        else:
            text = line.strip()
            if deeper and len(line) - len(line.lstrip()) <= 8:  # no longer of the last value
                found, deeper = [*found, ""], ""
            found.append(f"    {deeper}{_plain(text)}")
    return [*found, ""]


def _sentences_as_list(paragraph, names):
    """A paragraph of sentences "name: ... name: ...", all about these names, as a definition list."""
    some = "|".join(map(re.escape, names))
    _, *found = re.split(rf"(?:^|(?<=\.) )((?:{some})(?:, (?:{some}))*): ", " ".join(paragraph))
    return [line for name, text in zip(found[::2], found[1::2]) for line in (name, f"    {_plain(text)}")] + [""]


def _parameters(obj):
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def _paragraphs(lines):
    paragraph = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []


def _house_style(app, what, name, obj, options, lines):
    """Change a docstring's lines, in place, from the house's style to reStructuredText."""
    found, code, names = [], False, _parameters(obj)
    for paragraph in _paragraphs(lines):
        first = paragraph[0]
        margin = [line for line in paragraph if not line.startswith(" ")]
        if not margin and not re.match(r"\s+([*-]|\.\.|:)", first):  # code
            found += ([] if code else ["::", ""]) + ["    " + line for line in paragraph] + [""]
        elif _ITEM.match(first) and len(margin) < len(paragraph) and all(map(_ITEM.match, margin)):
            found += _as_list(paragraph)
        elif (item := _ITEM.match(first)) and set(item[1].split(", ")) <= names and margin == paragraph:
            found += _sentences_as_list(paragraph, names)
        else:
            found += [_plain(line) for line in paragraph] + [""]
        code = paragraph[-1].endswith("::")
    lines[:] = found


def setup(app):
    app.connect("autodoc-process-docstring", _house_style)
