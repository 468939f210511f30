"""NBD: the only room that imports libnbd's `nbd`, and the one that starts qemu-nbd and qemu-storage-daemon."""
