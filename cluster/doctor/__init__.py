"""What `penstock doctor` looks at, one file for each side of a machine."""
