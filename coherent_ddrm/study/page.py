"""The page that raters see: one HTML file, its style and script, the same for the server and for the static export.

What differs comes as JSON inside the page. Nothing is loaded from anywhere else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coherent_ddrm.study.questions import Study

WEB = Path(__file__).parent / "web"
ASSETS = {"study.css": "text/css", "study.js": "text/javascript"}
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


def asset(name: str) -> bytes:
    """The style or the script."""
    return (WEB / name).read_bytes()


def render(study: Study, **more: Any) -> bytes:
    """The HTML page with what a rater's browser may know of the study."""
    total = study.questions + study.catches
    known = {"study": study.id, "title": study.title, "prompt": study.prompt, "total": total, **more}
    text = json.dumps(known, separators=(",", ":"))
    for letter in "<>&":  # so that no title can end the script element
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    page = (WEB / "page.html").read_text(encoding="utf-8")
    policy = POLICY.replace("'self'", "'self' file:") if more.get("mode") == "file" else POLICY
    return page.replace("{{policy}}", policy).replace("{{study}}", text).encode()
