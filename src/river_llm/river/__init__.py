"""The method: when a token leaves the backbone, and the quantised copy of every decoder layer that
it goes on in (Shen and Zou, arXiv 2604.18396)."""
