"""Reference pages made from the code when the documentation is built (`make docs`)."""
