"""The Helm chart's values: their types, their schema and the pages made from them."""
