"""GPU kernels, one folder per operation; import this package as ``jattn.pallas``.

An operation in ``jattn.ops`` chooses a kernel from here when one supports the call
on the device at hand, and its jnp form otherwise.
"""
