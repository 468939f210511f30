"""What nova writes into the metadata of its domains (nova/virt/libvirt/config.py, LibvirtConfigGuestMetaNovaInstance)."""

from __future__ import annotations

from xml.sax.saxutils import escape

NAMESPACE = "http://openstack.org/xmlns/libvirt/nova/"
PROJECT = "5e2a2b6f0f9b4a0a8b8f1c6f8e5b1d11"


def instance(name: str, version: str = "1.1") -> str:
    """The element of an instance that people call `name`."""
    return f"""
<nova:instance xmlns:nova="{NAMESPACE}{version}">
  <nova:package version="27.1.0"/>
  <nova:name>{escape(name)}</nova:name>
  <nova:creationTime>2026-11-02 08:15:42</nova:creationTime>
  <nova:flavor name="m1.small">
    <nova:memory>2048</nova:memory>
    <nova:disk>20</nova:disk>
    <nova:swap>0</nova:swap>
    <nova:ephemeral>0</nova:ephemeral>
    <nova:vcpus>1</nova:vcpus>
  </nova:flavor>
  <nova:owner>
    <nova:user uuid="f3b2b0d1b8ac4d4ab0d6a7d5ee7b8f10">admin</nova:user>
    <nova:project uuid="{PROJECT}">shop</nova:project>
  </nova:owner>
  <nova:root type="image" uuid="155d900f-4e14-4e4c-a73d-069cbf4541e6"/>
  <nova:ports>
    <nova:port uuid="2c0f6b5c-67d2-4a44-8ab0-05f0d2c2f0d7">
      <nova:ip type="fixed" address="10.0.0.7" ipVersion="4"/>
    </nova:port>
  </nova:ports>
</nova:instance>"""
