"""Where objects are: an accelerator that may be lost at any moment (see `kvstore.contracts`)."""
