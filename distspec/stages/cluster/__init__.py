"""Explanations -> groups of spectra that are odd for the same reason.

- `stage`: `ClusterStage`: reads the weights, groups them, describes each group.
- `members`: what the members of a group have in common, and where their mean weights peak.
- `section`: its part of the page: groups in words and figures; what clusters.json holds.
- `section.html.jinja`: the same as HTML.
"""

__all__: list[str] = []
