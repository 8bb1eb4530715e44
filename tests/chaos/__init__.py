"""Kill, cut and damage: what the store must survive at every step."""
