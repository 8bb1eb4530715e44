"""The only file here is what MkDocs loads: it puts this folder on the search path."""
