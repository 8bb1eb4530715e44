"""A replica of several ranks: how they talk, and how one engine speaks for all of them."""
