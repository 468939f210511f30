"""Tests, room by room: unit, nbd, libvirt, faults."""
