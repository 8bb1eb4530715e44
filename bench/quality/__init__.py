"""Quality of answers over long documents: `penstock eval`. docs/evaluation.md has the figures."""
