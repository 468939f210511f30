"""The soak: a random machine that does to a guest and its repositories whatever may happen to them, and a model of both."""
