"""Faults: what a crash, a signal, a dead hypervisor or a full disk leaves, and that nothing is lost by it."""
