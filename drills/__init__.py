"""What is run by hand and takes long: faults of storages and hosts, the steps of recipes, an adaptation to photos."""
