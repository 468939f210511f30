"""Where a host's own machinery calls us: libvirt's qemu.d, oVirt's vdsm, and packages with entry points.

May import actions; only cli and the package's front door import it.
"""
