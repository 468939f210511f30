"""What is kept on disk: files and their order of writing.  Knows neither libvirt nor NBD.

docs/repository-format.md says enough to restore without this package.
"""
