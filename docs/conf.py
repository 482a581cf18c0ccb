"""The site of `make docs`: README.md is its start page, docs/*.md the others.

Sphinx with MyST and Furo, because all three are kept up, the theme brings everything it needs (nothing is fetched, when
building or when reading), and Sphinx takes the Markdown files as they lie: links between pages, to headings and to
source files work on a code-hosting site and here, and with `-W` a broken one, or a page that is not in PAGES, fails
the build.
"""

from sphinx.application import Sphinx

PAGES = [  # in the order of the side bar; titles are the pages' own
    "docs/quickstarts",
    "docs/models",
    "docs/real-model",
    "docs/lora",
    "docs/methods",
    "docs/losses",
    "docs/data",
    "docs/forms",
    "docs/configuration",
    "docs/studies",
    "docs/metrics",
    "docs/answers",
    "docs/restart",
    "docs/accelerators",
    "docs/preflight",
    "docs/performance",
    "docs/results",
    "docs/faq",
    "docs/development",
    "docs/adding-a-method",
    "CHANGELOG",
]

project = "sera_jax"
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md"]
exclude_patterns = [".*", "runs", "site"]  # not walked through

extensions = ["myst_parser"]
myst_heading_anchors = 3  # headings are link targets, named as code-hosting sites name them
smartquotes = False  # -- is a flag, not a dash

html_theme = "furo"
html_title = "sera_jax"
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_static_path = ["style"]
html_css_files = ["wide.css"]


def setup(app: Sphinx) -> None:
    """Give the start page its list of pages, which the README itself has no place for."""
    listing = "\n".join(["", "```{toctree}", ":hidden:", "", *PAGES, "```", ""])

    def add_pages(app: Sphinx, name: str, source: list[str]) -> None:
        if name == root_doc:
            source[0] += listing

    app.connect("source-read", add_pages)
