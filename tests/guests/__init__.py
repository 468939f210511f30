"""Real guests for the tests: a private libvirtd, a guest without an OS, and one with an OS and its agent."""
