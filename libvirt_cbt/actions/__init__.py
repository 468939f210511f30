"""One verb per file; the only place where hypervisor, nbdio and repository meet."""
