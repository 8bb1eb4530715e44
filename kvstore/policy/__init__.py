"""Which objects leave a full store: pure policies behind one contract, and their replay."""
