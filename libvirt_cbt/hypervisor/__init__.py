"""Everything that is said to libvirt, and nothing else: the only room that imports libvirt.

A `connection.Host` is handed in; values come out, never a libvirt object.
"""
