"""docs/protocols.md: `python -m coherent_ddrm.evaluation.protocols_markdown > docs/protocols.md`."""

from collections.abc import Mapping

from coherent_ddrm.evaluation.protocols import PROTOCOLS, Protocol, published_table
from coherent_ddrm.evaluation.published import Published

HEAD = """# Published protocols

Made by `python -m coherent_ddrm.evaluation.protocols_markdown`; do not edit. The numbers are those of the papers, as
they print them. (?) marks an unverified number, held from memory.
"""


def markdown() -> str:
    """Every protocol and its published numbers."""
    return "\n".join([HEAD, *(_section(protocol) for protocol in PROTOCOLS.values())])


def _section(protocol: Protocol) -> str:
    lines = [
        f"## {protocol.name}\n",
        f"{protocol.title}. {protocol.paper}, {protocol.link}\n",
        *(f"- pictures, {data.name}: {data.pictures}" for data in protocol.data),
        f"- size: {protocol.resolution} x {protocol.resolution}, rule `{protocol.resize}`. {protocol.published_resize}",
        "- holes: " + ", ".join(f"`{maker}` ({name})" for maker, name in protocol.masks.items()),
        "- scores: " + ", ".join(f"`{name}`" for name in protocol.metrics),
        *(f"- {note}" for note in protocol.notes),
    ]
    for data in protocol.data:
        for mask in protocol.masks:
            lines += _table(published_table(protocol, mask, data.name), f"{data.name}, {mask}")
    methods: dict[str, dict[str, None]] = {}
    for row in protocol.published:
        methods.setdefault(row.source, {})[row.method] = None
    sources = (f"- {source}: {', '.join(names)}" for source, names in methods.items())
    return "\n".join([*lines, "\nWhere the numbers are from:\n", *sources, ""])


def _table(rows: Mapping[str, Mapping[str, Published]], title: str) -> list[str]:
    if not rows:
        return []
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    lines = [f"\n**{title}**\n", f"| method | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for method, row in rows.items():
        cells = (row[name].printed + ("" if row[name].checked else " (?)") if name in row else "" for name in metrics)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print(markdown(), end="")
