"""What ``fimo init`` writes: a spec and a module for each kind of workload, that run as they are, and a spec's schema.

Files, not modules of fimo: nothing here imports them. The schema is written by ``fimo.orchestrator.report.reference``.
"""

KINDS = {
    "tabular": "tabular",
    "image": "image",
    "text": "text",
    "language-model": "language_model",
    "kronfluence": "from_kronfluence",
}
"""Kind -> the stem of its files. kronfluence's own is not its name: beside a spec, it would hide the library."""
