"""How fast it is: backbone, river and peers in turn in one run, beside the memory's bandwidth."""
